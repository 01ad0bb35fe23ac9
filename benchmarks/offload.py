"""Offloading against its limit: a step's time over what the disk or the computing alone would take.

    python benchmarks/make_store.py /tmp/mixtral --preset mixtral-8x7b --layers 8 --routing trace:A,B,C
    python benchmarks/make_store.py /tmp/qwen --preset qwen3-30b-a3b --layers 8 --vocab 32000 --routing trace:A,B,C
    python benchmarks/offload.py /tmp/mixtral /tmp/qwen --arena 0.5 --json offload.json

The stores replay recorded expert choices and uniform ones (make_store.py, replay.py); tokens are checked.

*A round*: raw bandwidth is measured; an engine with an arena of ``--arena`` of the experts' bytes (or GiB, as 3GiB)
answers the requests, then one with everything resident the same ones; each after one prefill and one decode that do
not count. ``--rounds`` rounds, each with other prompts; everything below is within a round, and tables show medians.
- *step*: seconds of a decoded token (after a prompt of 16, of the tokens after the first), or of a whole prompt from
  the call to its first token, from the caller's side of Ray;
- *missed*: bytes that had to come from the disk for it, by the engine's counters. Of a prompt each expert counts once,
  so at most the bytes of the different experts that it chooses;
- *disk*: missed / raw bandwidth (disk.py);
- *compute*: the same step with everything resident; with --no-resident, for stores larger than memory, the capped step
  without the time in which the step loop waited for experts;
- *limit*: the larger of disk and compute. *x limit*: step / limit; the goal is at most 1.15.

Of decodes, what the dependencies between layers leave possible is printed too (step_floor.py): *floor*, without
predictions, *foreseen floor*, with those that the store's replay has; all within a round, as above.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from capped import Options
from common import describe_machine, print_table
from disk import store_bandwidth
from offload_runs import DECODE, Ask, Sample, run_all
from replay import Kind, Replay, load_replay
from replay_prompts import ReplayPrompts
from step_floor import Misses, Times, replay_misses

from moray.runtime.memory import format_bytes
from moray.runtime.store.store import Store

GOAL = 1.15
_PREFILLS = (64, 512)


@dataclass(frozen=True)
class Floor:
    """Seconds of a token, and simulated misses and those of them that the layer before predicted."""

    floor_s: float
    foreseen_s: float
    missed: float
    foreseen: float


@dataclass(frozen=True)
class Step:
    """One request against its limit; seconds and bytes of a token, or of a prompt."""

    routing: Kind
    phase: str
    step_s: float
    missed_bytes: float
    read_bytes: float
    hit_rate: float
    wait_s: float
    disk_s: float
    compute_s: float
    bandwidth: float
    floor: Floor | None  # of a decode with an arena

    @property
    def limit_s(self) -> float:
        return max(self.disk_s, self.compute_s)

    @property
    def ratio(self) -> float:
        return self.step_s / self.limit_s


def make_asks(replay: Replay, kind: Kind, seed: int, tokens: int) -> tuple[list[Ask], list[Ask]]:
    """What is not counted, and what is."""
    prompts = ReplayPrompts(replay.texts(kind), seed)

    def asks() -> list[Ask]:
        prefills = [Ask(tuple(prompts.make(length)), 1) for length in _PREFILLS]
        return [*prefills, Ask(tuple(prompts.make(16, tokens)), tokens)]

    return asks()[1:], asks()


def measure_round(store: Path, options: Options, seed: int, arguments: argparse.Namespace) -> list[Step]:
    replay, steps = load_replay(store), []
    with Store.open(store) as opened:
        shard_bytes, slot_bytes = opened.manifest.layers[0].layout.num_bytes, opened.manifest.slot_bytes
    for kind in arguments.routing:
        bandwidth = store_bandwidth(store, 0.3).bytes_per_s
        warm, asks = make_asks(replay, kind, seed, arguments.tokens)
        capped = run_all(store, options, arguments.threads, warm, asks, replay)
        resident = capped
        if not arguments.no_resident:
            resident = run_all(store, Options(), arguments.threads, warm, asks, replay)
        misses = None
        if options.arena_bytes is not None:
            misses = replay_misses([*warm, *asks], replay, options.arena_bytes // slot_bytes)
        pairs = zip(capped, resident, strict=True)
        steps += [against_limit(kind, sample, other, bandwidth, shard_bytes, misses) for sample, other in pairs]
    return steps


def against_limit(
    kind: Kind, sample: Sample, resident: Sample, bandwidth: float, shard_bytes: int, misses: Misses | None
) -> Step:
    """``resident`` is ``sample`` itself where nothing can be measured without waiting. ``misses``: of the decode."""
    missed = sample.per_unit("missed_bytes")
    if sample.phase != DECODE:
        missed = min(missed, sample.distinct_experts * shard_bytes)
    compute = resident.seconds - (resident.per_unit("wait_s") if resident is sample else 0.0)
    floor = None
    if misses is not None and sample.phase == DECODE:
        floor = find_floor(misses, shard_bytes / bandwidth, compute, resident)
    return Step(
        routing=kind,
        phase=sample.phase,
        step_s=sample.seconds,
        missed_bytes=missed,
        read_bytes=sample.per_unit("read_bytes"),
        hit_rate=sample.counters.hit_rate,
        wait_s=sample.per_unit("wait_s"),
        disk_s=missed / bandwidth,
        compute_s=compute,
        bandwidth=bandwidth,
        floor=floor,
    )


def find_floor(misses: Misses, read_s: float, step_s: float, resident: Sample) -> Floor:
    """``read_s``: of one expert. ``step_s``: of a token without waiting."""
    num_layers = misses.missed_TL.shape[1]
    experts_s = resident.per_unit("compute_s")
    active = resident.counters.uses // resident.counters.layer_calls
    floors = misses.floors(Times(read_s, experts_s / num_layers, step_s - experts_s), active)
    tokens = len(misses.missed_TL)
    return Floor(*floors, misses.missed_TL.sum() / tokens, misses.foreseen_TL.sum() / tokens)


def print_steps(steps: Sequence[Step]) -> None:
    rows = []
    for routing, phase in dict.fromkeys((step.routing, step.phase) for step in steps):
        same = [step for step in steps if (step.routing, step.phase) == (routing, phase)]
        of = {name: median(getattr(step, name) for step in same) for name in _COLUMNS}
        ratios = [step.ratio for step in same]
        cells = [f"{1e3 * of['step_s']:.1f}", f"{of['missed_bytes'] / 1e6:.1f}", f"{of['read_bytes'] / 1e6:.1f}"]
        cells += [f"{of['hit_rate']:.1%}", *(f"{1e3 * of[name]:.1f}" for name in ("wait_s", "disk_s", "compute_s"))]
        verdict = "met" if median(ratios) <= GOAL else "missed"
        cells += [f"{median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}", verdict]
        rows.append((f"{phase}, {routing}", *cells))
    header = ("", "step, ms", "missed, MB", "read, MB", "hit rate", "waiting, ms", "disk, ms", "compute, ms", "x limit")
    print_table((*header, "lowest-highest", f"goal {GOAL}"), rows)
    print_floors([step for step in steps if step.floor is not None])


def print_floors(steps: Sequence[Step]) -> None:
    for routing in dict.fromkeys(step.routing for step in steps):
        pairs = [(step, step.floor) for step in steps if step.routing == routing and step.floor is not None]
        missed, foreseen = (median(getattr(floor, name) for _, floor in pairs) for name in ("missed", "foreseen"))
        print(
            f"\n{DECODE}, {routing}: {missed:.1f} experts missed a token, {foreseen:.1f} of them foreseen (simulated)"
        )
        for name, what in (("floor_s", "floor"), ("foreseen_s", "foreseen floor")):
            least = median(getattr(floor, name) for _, floor in pairs)
            limits = median(getattr(floor, name) / step.limit_s for step, floor in pairs)
            steps_over = median(step.step_s / getattr(floor, name) for step, floor in pairs)
            print(f"{what}: {1e3 * least:.1f} ms, {limits:.2f} of the limit; step / {what} {steps_over:.2f}")


_COLUMNS = ("step_s", "missed_bytes", "read_bytes", "hit_rate", "wait_s", "disk_s", "compute_s")


def arena_bytes(store: Path, text: str) -> int | None:
    """A share of the experts' bytes, or GiB; None for ``all``."""
    if text == "all":
        return None
    if text.endswith("GiB"):
        return round(float(text.removesuffix("GiB")) * 2**30)
    with Store.open(store) as opened:
        return round(float(text) * len(opened.manifest.shards) * opened.manifest.slot_bytes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--arena", default="0.5", help="share of the experts' bytes, GiB as 3GiB, or all (0.5)")
    parser.add_argument("--routing", choices=("trace", "random"), nargs="+", default=["trace", "random"])
    parser.add_argument("--policy", help="instead of the engine's default")
    parser.add_argument("--prefetch", help="instead of the engine's default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of a decode (64)")
    parser.add_argument("--no-resident", action="store_true", help="the store is larger than memory")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    print(f"{describe_machine()}\n{arguments.threads} threads, {arguments.rounds} rounds")
    found: dict[str, list[Step]] = {str(store): [] for store in arguments.stores}
    for seed in range(arguments.rounds):
        for store in arguments.stores:
            options = Options(arena_bytes(store, arguments.arena), arguments.policy, arguments.prefetch)
            found[str(store)] += measure_round(store, options, seed, arguments)
            if arguments.json:
                document = {name: [asdict(step) for step in steps] for name, steps in found.items()}
                arguments.json.write_text(json.dumps(document, indent=1))
    for name, steps in found.items():
        size = arena_bytes(Path(name), arguments.arena)
        print(f"\n## {name}, arena {'of all experts' if size is None else format_bytes(size)}\n")
        print(f"raw bandwidth {median(step.bandwidth for step in steps) / 1e9:.2f} GB/s\n")
        print_steps(steps)


if __name__ == "__main__":
    main()
