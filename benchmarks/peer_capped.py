"""moray against llama.cpp with less memory than the model: same weights resident, same tokens, same expert choices.

    python benchmarks/peer_capped.py --peer-python /tmp/peer/venv/bin/python --directory /tmp/models
    python benchmarks/peer_capped.py --preset full --directory /tmp/models       # 26 GB twice on disk, 18 GiB resident
    python benchmarks/peer_capped.py --quick                                     # tiny models: does it work?

Models: 8 layers of Mixtral-8x7B's geometry, or (full) all 32, at 4.5 bits a weight in every class of tensors: moray's
hqq4:64 with float16 scales and zeros, llama.cpp's Q4_0. Random weights with planted choices (planted.py): token id t
chooses the same experts in both, and both generate t + 1 after t, which is checked. Choices are those of recorded
traces of a trained model on several texts, mapped to these layers (replay.py), or (--routing random) uniform.

*Cap X*: X bytes of weights in memory on both sides. moray: its trunk and an arena of X - trunk. llama.cpp: mmap, no
repacking (which would copy the weights), in a memory cgroup of X + other, where *other* is what it holds beside the
file's pages (anonymous memory, the kernel's, libraries; measured before in such a group without a limit). *none*:
everything resident, llama.cpp with its defaults. Each side's other memory is printed; moray's is the private memory of
all its processes, this program's and Ray's included, without the trunk. It has no limit, but reads past the page cache,
and the share of its files in the page cache is printed.

*A turn*: the pages of both models are dropped, one side starts, answers a cold request, then one prefill and one
decode that are not counted, then the measured requests, and ends. Sides take turns, ``--turns`` times each for every
cap, and get the same prompts; a ratio compares the same prompt. Only one side is loaded at a time. Batch 1, greedy,
``--threads`` threads each.
- *decode*: after a prompt of 16 tokens and the first token, N tokens / seconds from the first token to the last;
- *prefill 64*: 64 / seconds from the call to the first token;
- *cold start*: the first request of a turn. Odd turns: a prompt of 64; even turns: one token. *start* is the time until
  a side takes requests (moray: launch, Ray included; llama.cpp: the process and its load), *first token* the time from
  then. *bytes needed*: of moray's trunk and of the different experts that the prompt chooses.
Times are moray's from the caller's side of Ray, and llama.cpp's inside its process. *others*: the share of this
machine's CPU time that went to neither side, the median.
*raw bandwidth*: disk.py, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import psutil
from capped import Memory, Options, memory_of, open_engine
from capped_report import SIDES, Cold, Outcome, Request, Turn, print_outcome
from common import describe_machine, working_directory
from disk import cached_bytes, cached_share, drop_cached, expert_files, store_bandwidth
from geometry import PRESETS, Geometry
from make_gguf import make_gguf
from make_store import write_store
from memory_group import memory_group
from peer_client import Peer, add_peer_python, open_peer, telling_lines
from peer_report import Phase
from peer_sides import LlamaCpp, Moray, Side, Watch
from replay import Kind, Replay, load_replay
from replay_prompts import ReplayPrompts, Walking
from routing import replay_of

from moray.runtime.convert.recipe import Recipe
from moray.runtime.memory import available_memory, format_bytes, reuse_freed_memory
from moray.runtime.store.store import Store

RECIPE = "experts=hqq4:64,attention=hqq4:64,embeddings=hqq4:64"
_MMAP = 1  # llama.cpp's load mode
_TRACES = Path(__file__).parents[1] / "tests/data/traces"
_GIB = 1 << 30


@dataclass(frozen=True)
class Preset:
    geometry: Geometry
    caps: tuple[int | None, ...]
    phases: tuple[Phase, ...]


_MIXTRAL = PRESETS["mixtral-8x7b"]
_PREFILL = Phase("prefill 64", 64, 1)
_PRESETS = {
    "layers8": Preset(replace(_MIXTRAL, layers=8), (3 * _GIB, 4 * _GIB, None), (Phase("decode", 16, 17), _PREFILL)),
    "full": Preset(_MIXTRAL, (18 * _GIB,), (Phase("decode", 16, 9), _PREFILL)),
    "quick": Preset(
        replace(PRESETS["tiny"], hidden=512, vocab=8192), (8 << 20, None), (Phase("decode", 16, 33), _PREFILL)
    ),
}


@dataclass(frozen=True)
class Models:
    """One model, twice."""

    store: Path
    gguf: Path
    geometry: Geometry
    replay: Replay

    @property
    def files(self) -> list[Path]:
        return [self.gguf, *(path for path in self.store.iterdir() if path.is_file())]


@dataclass(frozen=True)
class Plan:
    """What a turn asks for: the same of both sides."""

    cold: list[int]
    warm: list[tuple[Phase, list[int]]]
    measured: list[tuple[Phase, list[int]]]

    @classmethod
    def make(cls, models: Models, kind: Kind, phases: tuple[Phase, ...], turn: int, rounds: int) -> Plan:
        prompts = ReplayPrompts(models.replay.texts(kind), seed=turn)

        def ask(phase: Phase) -> tuple[Phase, list[int]]:
            return phase, prompts.make(phase.prompt_tokens, phase.count)

        cold = prompts.make(1 if turn % 2 else 64)
        return cls(cold, [ask(phase) for phase in phases[::-1]], [ask(phase) for phase in phases * rounds])


# ---------------------------------------------------------------------------------------- measuring


def run_turn(side: Side, plan: Plan, start_s: float) -> tuple[Cold, list[Request]]:
    walking = Walking(side)
    cold = Cold(len(plan.cold), start_s, walking.generate(plan.cold, 1).first_s)
    for phase, prompt in plan.warm:
        walking.generate(prompt, phase.count)
    requests = []
    for phase, prompt in plan.measured:
        watch = Watch((walking,))
        run = walking.generate(prompt, phase.count)
        requests.append(Request(phase.name, prompt[0], phase.rate(run), watch.others()))
    return cold, requests


def moray_turn(models: Models, plan: Plan, cap: int | None, threads: int) -> Turn:
    drop_cached(models.files)
    with Store.open(models.store) as store:
        trunk = store.manifest.trunk_bytes
    if cap is not None and cap <= trunk:
        raise SystemExit(f"a cap of {format_bytes(cap)} is less than the trunk, {format_bytes(trunk)}")
    started = perf_counter()
    with open_engine(models.store, Options(None if cap is None else cap - trunk), threads) as engine:
        cold, requests = run_turn(Moray(engine, -1), plan, perf_counter() - started)
        memory = memory_of(engine)
        cached = cached_share(expert_files(models.store))
    return Turn("moray", cold, requests, memory, {"page cache share of its experts": f"{cached:.1%}"})


def llama_turn(models: Models, plan: Plan, cap: int | None, other: int, python: Path, threads: int) -> Turn:
    drop_cached(models.files)
    started = perf_counter()
    with memory_group("peer") as group, open_peer(python) as peer:
        group.add(peer.pid)
        group.limit(None if cap is None else cap + other)
        loaded = _load(peer, models, cap, threads)
        cold, requests = run_turn(LlamaCpp(peer), plan, perf_counter() - started)
        pages, used = cached_bytes(models.gguf), group.used()
        resident = psutil.Process(peer.pid).memory_info().rss
    memory = Memory(pages, 0, used - pages)
    return Turn("llama.cpp", cold, requests, memory, {"resident set": format_bytes(resident)} | loaded)


def other_memory(models: Models, plan: Plan, python: Path, threads: int) -> int:
    """What llama.cpp holds beside its mapped file after such a turn's requests."""
    drop_cached(models.files)
    with memory_group("probe") as group, open_peer(python) as peer:
        group.add(peer.pid)
        _load(peer, models, 0, threads)
        for phase, prompt in plan.warm:
            Walking(LlamaCpp(peer)).generate(prompt, phase.count)
        return group.used() - cached_bytes(models.gguf)


def _load(peer: Peer, models: Models, cap: int | None, threads: int) -> dict[str, str]:
    mode, repack = (None, None) if cap is None else (_MMAP, False)
    loaded = peer.load(models.gguf, threads=threads, load_mode=mode, repack=repack)
    return {"llama-cpp-python": loaded["version"], "log": "; ".join(telling_lines(loaded["log"]))}


def compare(models: Models, preset: Preset, kind: Kind, arguments: argparse.Namespace) -> Iterator[Outcome]:
    python, threads = arguments.peer_python, arguments.threads
    with Store.open(models.store) as store:
        shard_bytes, trunk = store.manifest.layers[0].layout.num_bytes, store.manifest.trunk_bytes
    for cap in preset.caps:
        plans = [Plan.make(models, kind, preset.phases, turn, arguments.rounds) for turn in range(arguments.turns)]
        needed = [
            trunk + shard_bytes * sum(map(len, models.replay.distinct(plan.cold[0], len(plan.cold)))) for plan in plans
        ]
        bandwidth = store_bandwidth(models.store, 0.3).bytes_per_s
        other = 0 if cap is None else other_memory(models, plans[0], python, threads)
        turns: list[Turn] = []
        for index, plan in enumerate(plans):
            for side in SIDES if index % 2 else SIDES[::-1]:
                print(f"turn {index + 1} of {side}, {kind} routing, cap {cap}", file=sys.stderr, flush=True)
                if side == "moray":
                    turns.append(moray_turn(models, plan, cap, threads))
                else:
                    turns.append(llama_turn(models, plan, cap, other, python, threads))
        yield Outcome(kind, cap, preset.phases, bandwidth, needed, turns)


# ------------------------------------------------------------------------------------------- models


@contextmanager
def prepared(arguments: argparse.Namespace, preset: Preset) -> Iterator[Models]:
    """Write what is not there."""
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        yield _prepare(arguments.directory, arguments, preset)
        return
    with working_directory(6 * preset.geometry.num_parameters // 5) as root:
        yield _prepare(root, arguments, preset)


def _prepare(root: Path, arguments: argparse.Namespace, preset: Preset) -> Models:
    store, gguf = root / f"capped-{arguments.preset}-store", root / f"capped-{arguments.preset}.gguf"
    reuse_freed_memory()
    if not (store.exists() and gguf.exists()):
        files = ",".join(str(path) for path in arguments.traces)
        replay = replay_of(f"trace:{files}", preset.geometry)
        if not gguf.exists():
            make_gguf(gguf.with_suffix(".partial"), preset.geometry, replay=replay).rename(gguf)
        if not store.exists():
            with TemporaryDirectory(dir=root) as partial:
                made = write_store(Path(partial) / store.name, preset.geometry, Recipe.parse(RECIPE), replay=replay)
                for path in (*made.parent.glob("*.npz"), made):
                    path.rename(root / path.name)
    found = json.loads((store / "config.json").read_text())
    if (found["num_hidden_layers"], found["hidden_size"]) != (preset.geometry.layers, preset.geometry.hidden):
        raise SystemExit(f"{store} is not {preset.geometry}; name another --directory")
    return Models(store, gguf, preset.geometry, load_replay(store))


# -------------------------------------------------------------------------------------------- main


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_python(parser)
    parser.add_argument("--preset", choices=("layers8", "full"), default="layers8")
    parser.add_argument("--directory", type=Path, help="where models are and stay; without it, a temporary one")
    parser.add_argument("--traces", type=Path, nargs="+", default=sorted(_TRACES.glob("*.msgpack")))
    parser.add_argument("--routing", choices=("trace", "random"), nargs="+", default=["trace"])
    parser.add_argument("--caps", nargs="+", help="GiB of weights, or none, instead of the preset's")
    parser.add_argument("--turns", type=int, default=5, help="of each side for every cap (5)")
    parser.add_argument("--rounds", type=int, default=2, help="measured requests of each phase in a turn (2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (all cores)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.preset = "quick"
    return arguments


def main() -> None:
    arguments = _parse()
    preset = _PRESETS[arguments.preset]
    if arguments.caps:
        caps = tuple(None if cap == "none" else round(float(cap) * _GIB) for cap in arguments.caps)
        preset = replace(preset, caps=caps)
    largest = max((cap for cap in preset.caps if cap), default=0)
    if largest > available_memory():
        raise SystemExit(f"a cap of {format_bytes(largest)}, and {format_bytes(available_memory())} of memory are free")
    print(f"{describe_machine()}\n{arguments.threads} threads each, {preset.geometry}")
    document: dict[str, Any] = {"machine": describe_machine(), "geometry": asdict(preset.geometry), "outcomes": []}
    with prepared(arguments, preset) as models:
        for kind in arguments.routing:
            for outcome in compare(models, preset, kind, arguments):
                print_outcome(outcome)
                document["outcomes"].append(asdict(outcome))
                if arguments.json:
                    arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
