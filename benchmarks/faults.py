"""Faults during generation: is the answer the same, and how long does it stall?

    python benchmarks/faults.py                         # every fault, 50 times each
    python benchmarks/faults.py --times 5 --only "kill a host" "kill the compute actor"

One engine, one stream after the other; each is struck at a random time within the duration of an undisturbed one.
*stall*: the longest time between two events of the stream (which come every 40 ms) from the fault on. *same*: tokens
and text are those of the undisturbed stream, greedy and sampled with a seed in turn. Half of the experts fit in
memory, so that hosts are needed all the time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from statistics import median

from common import describe_machine, print_table
from fault_injection import FAULTS, PROMPT, SAMPLINGS, generate_struck

import moray

BOUND_S = 2.0  # for the loss of a host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a converted checkpoint; none: the demonstration model")
    parser.add_argument("--times", type=int, default=50, help="of each fault")
    parser.add_argument("--only", nargs="*", help="names of faults", default=[fault.name for fault in FAULTS])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--host-memory", default="6MiB", help="of all arenas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for every single result")
    arguments = parser.parse_args()
    random, rows, records = Random(arguments.seed), [], []
    with moray.launch(arguments.store, hosts=2, host_memory=arguments.host_memory) as engine:
        options = [{"max_new_tokens": arguments.tokens} | sampling for sampling in SAMPLINGS]
        expected = [engine.generate(PROMPT, **each) for each in options]
        alone_s = min(each.timings.prefill_s + each.timings.decode_s for each in expected)
        num_tokens = min(len(each.token_ids) for each in expected)
        for kind in FAULTS:
            if kind.name not in arguments.only:
                continue
            fault, stalls, num_wrong = kind(), [], 0
            for number in range(arguments.times):
                which = number % len(SAMPLINGS)
                struck = generate_struck(engine, fault, random, alone_s, **options[which])
                is_same = (struck.token_ids, struck.text) == (expected[which].token_ids, expected[which].text)
                num_wrong += not is_same
                stalls.append(struck.stall_s)
                records.append({"fault": kind.name, "same": is_same, "at_s": struck.at_s, "stall_s": struck.stall_s})
            verdict = f"{len(stalls) - num_wrong} of {len(stalls)}"
            rows.append([kind.name, verdict, f"{median(stalls):.2f}", f"{max(stalls):.2f}"])
            print(
                f"{kind.name}: same {verdict}, stalls median {median(stalls):.2f} s, worst {max(stalls):.2f} s",
                flush=True,
            )
        events = engine.events()
    print(f"\n{describe_machine()}\n{alone_s:.2f} s an undisturbed stream of {num_tokens} tokens or more\n")
    print_table(["fault", "same", "stall, median s", "worst s"], rows)
    print(f"\nworst stall of a lost host {'<=' if _worst_host(records) <= BOUND_S else '>'} {BOUND_S:g} s")
    if arguments.json:
        lines = [json.loads(event.line()) for event in events]
        arguments.json.write_text(json.dumps({"runs": records, "events": lines}, indent=1))


def _worst_host(records: list[dict[str, object]]) -> float:
    hosts = ("kill a host", "kill all hosts", "stop a host")
    return max((float(str(record["stall_s"])) for record in records if record["fault"] in hosts), default=0.0)


if __name__ == "__main__":
    main()
