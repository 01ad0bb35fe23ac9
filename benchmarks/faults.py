"""Faults during generation: is the answer the same, and how long does it stall?

    python benchmarks/faults.py                         # every fault, 50 times each
    python benchmarks/faults.py --times 5 --only "kill a host" "kill the compute actor"
    python benchmarks/faults.py --nodes 2 --gbit 10     # as root: another node, and the link to it (else 1 Gbit/s)

One engine, one stream after the other; each is struck after a random one of its tokens.
*stall*: the longest time between two events of the stream (which come every 40 ms) from the fault on. *same*: tokens
and text are those of the undisturbed stream, greedy and sampled with a seed in turn. *whole after*: from the fault
until the engine was whole again and the answer at its end. Half of the experts fit in memory, so that hosts are needed
all the time. With two nodes (two_nodes.py) all that the other one has in memory is computed there, and a fault is over
when the other node computes again. Ends with status 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

from common import describe_machine, print_table
from fault_injection import FAULTS, PROMPT, SAMPLINGS, Fault, generate_struck

import moray
from moray.deploy.engine import Engine

BOUND_S = 2.0  # for the loss of a host
NOT_A_HOST = ("compute", "orchestrator")  # whose loss the bound is not for


@contextmanager
def launched(
    num_nodes: int, store: Path | None, host_memory: str, gbit: int = 1
) -> Iterator[tuple[Engine, Sequence[Fault]]]:
    """An engine on one node or two, with a link of so many Gbit/s, and the faults that there are."""
    with ExitStack() as stack:
        if num_nodes == 1:
            yield (
                stack.enter_context(moray.launch(store, hosts=2, host_memory=host_memory)),
                [kind() for kind in FAULTS],
            )
            return
        from two_nodes import await_use, faults_of, two_nodes

        nodes = stack.enter_context(two_nodes(gbit))
        engine = stack.enter_context(nodes.launch(store, host_memory))
        await_use(engine, nodes)
        yield engine, faults_of(nodes)


@dataclass(frozen=True)
class Run:
    """One struck stream."""

    fault: str
    same: bool
    at_s: float
    stall_s: float
    whole_s: float


def strike_often(engine: Engine, fault: Fault, times: int, tokens: int, random: Random) -> list[Run]:
    """So many streams of so many tokens, one after the other, each struck once."""
    options = [{"max_new_tokens": tokens} | sampling for sampling in SAMPLINGS]
    expected = [engine.generate(PROMPT, **each) for each in options]
    runs = []
    for number in range(times):
        alone, each = expected[number % len(options)], options[number % len(options)]
        struck = generate_struck(engine, fault, random, **each)
        is_same = (struck.token_ids, struck.text) == (alone.token_ids, alone.text)
        runs.append(Run(fault.name, is_same, struck.at_s, struck.stall_s, struck.whole_s))
    return runs


def report(runs: Sequence[Run]) -> list[str]:
    """A row of the table, of one fault."""
    stalls, num_same = [run.stall_s for run in runs], sum(run.same for run in runs)
    times = f"{median(stalls):.2f}", f"{max(stalls):.2f}", f"{median(run.whole_s for run in runs):.1f}"
    return [runs[0].fault, f"{num_same} of {len(runs)}", *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a converted checkpoint; none: the demonstration model")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--gbit", type=int, default=1, help="of the link between two nodes")
    parser.add_argument("--times", type=int, default=50, help="of each fault")
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--host-memory", default="6MiB", help="of all arenas of the compute node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for every single result")
    arguments = parser.parse_args()
    random, runs, rows = Random(arguments.seed), [], []
    with launched(arguments.nodes, arguments.store, arguments.host_memory, arguments.gbit) as (engine, faults):
        names = [fault.name for fault in faults]
        if unknown := {*(arguments.only or ())}.difference(names):
            parser.error(f"no fault is called {', '.join(unknown)}; there are {', '.join(names)}")
        for fault in faults:
            if not arguments.only or fault.name in arguments.only:
                found = strike_often(engine, fault, arguments.times, arguments.tokens, random)
                runs += found
                rows.append(report(found))
                print(" | ".join(rows[-1]), flush=True)
        events = [json.loads(event.line()) for event in engine.events()]
    print(f"\n{describe_machine()}\n")
    print_table(["fault", "same", "stall, median s", "worst s", "whole after, median s"], rows)
    worst_s = max((run.stall_s for run in runs if not any(word in run.fault for word in NOT_A_HOST)), default=0.0)
    print(f"\nworst stall of a lost host: {worst_s:.2f} s, {'<=' if worst_s <= BOUND_S else '>'} {BOUND_S:g} s")
    if arguments.json:
        document = {"runs": [asdict(run) for run in runs], "events": events}
        arguments.json.write_text(json.dumps(document, indent=1))
    sys.exit(0 if all(run.same for run in runs) else 1)


if __name__ == "__main__":
    main()
