"""moray against llama.cpp: tokens/s of whole models of the same geometry and the same bits, measured in pairs.

    python benchmarks/peer.py --peer-python /tmp/peer/venv/bin/python            # about 15 minutes
    python benchmarks/peer.py --directory /tmp/models --only mixtral             # keep the models, or use kept ones
    python benchmarks/peer.py --quick                                            # tiny models: does it work?

The peer is llama.cpp through llama-cpp-python, in an environment of its own (``python -m venv DIR`` and
``DIR/bin/pip install llama-cpp-python numpy``, which compiles it for this CPU); --peer-python or $MORAY_PEER_PYTHON
names its interpreter.

Models: ``--layers`` layers (4) of Mixtral-8x7B's geometry and of Qwen3-30B-A3B's (geometry.py), whole, with embeddings
and head. Weights are random with mean 0, so that tokens route evenly; each side has its own (make_store.py,
make_gguf.py), with the same bits a weight in every class of tensors (printed). Experts, attention, embedding and head
have 4.5 bits: moray's hqq4:64 with float16 scales and zeros, llama.cpp's Q4_0.

Sides, loaded together, each with ``--threads`` threads (all cores), only one at work at a time:
- *moray*: ``moray.launch(store, hosts=1, device="cpu")``, numerics class int8, measured by the caller, through Ray;
- *llama.cpp*: its defaults (load mode, repacking of weights, flash attention auto, F16 KV cache), one batch of up to
  512 tokens, measured inside its process around ``llama_decode`` and the search for the largest logit. What it says
  about buffers and repacking when it loads is printed.

Phases, batch 1, greedy, new random token ids for each pair and the same for both sides; no prompt begins like another,
and nothing of earlier requests is used (asserted):
- *decode*: after a prompt of 32 tokens and the first token, 64 tokens / seconds from the first token to the last;
- *prefill N*: N / seconds from the call to the first token.
*tokens per expert* is T * K / E: tokens, times experts a token, over experts.

Numbers: medians over ``--rounds`` pairs after one that is not counted; the two sides of a pair run one right after the
other, and who is first alternates. *moray / llama.cpp* is the median of the ratios within pairs, higher is better for
moray, with the lowest and highest. *others* is the share of this machine's CPU time that went to neither side during a
pair. Pairs where it is above 10 % are *disturbed* and do not count; more are measured instead, up to twice as many in
all. With fewer than 3 undisturbed pairs all count, and the table says how many are disturbed. Before each pair it waits
for quiet, for ``--patience`` seconds a model in all.
*idle CPU* is the CPU time of the side that waits, as a share of one core, while the other one works.

Breakdown of moray's time, in ms a token (decode) or a prompt (prefill), by the engine's own clocks: *kernel* (the
experts' products), *grouping* and *lease*, *rest* (what is left of the step loop: trunk, routers, sampling, Python),
*delivery* (from the step loop to the caller, through Ray). --trunk also loads the store into this process afterwards,
alone, and clocks the modules of a decode step (layer_clock.py).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import describe_machine, in_process, working_directory
from geometry import PRESETS, Geometry
from make_gguf import make_gguf
from make_store import write_store
from overhead import InProcess, print_layer_times
from peer_client import add_peer_python, open_peer, telling_lines
from peer_report import DISTURBED, PHASES, Pair, Phase, Result, print_result
from peer_sides import LlamaCpp, Moray, Side, Watch
from peer_sizes import gguf_sizes, store_sizes

import moray
from moray.runtime.convert.recipe import Recipe
from moray.runtime.memory import available_memory, format_bytes
from moray.runtime.store.store import Store

RECIPE = "experts=hqq4:64,attention=hqq4:64,embeddings=hqq4:64"
_FIRST_ID = 3
_ENOUGH = 3  # undisturbed pairs


# ---------------------------------------------------------------------------------------- measuring


class Prompts:
    """Random prompts, each with another first token."""

    def __init__(self, vocab: int) -> None:
        self._vocab, self._num_made = vocab, 0

    def make(self, length: int) -> list[int]:
        random = np.random.default_rng(1000 + self._num_made)
        self._num_made += 1
        first = _FIRST_ID + self._num_made
        return [first, *random.integers(_FIRST_ID, self._vocab, length - 1).tolist()]


def measure_pair(phase: Phase, first: Side, second: Side, prompt: list[int]) -> Pair:
    rates, idle = {}, {}
    watch = Watch((first, second))
    for side, waiting in ((first, second), (second, first)):
        asleep = waiting.cpu_s()
        run = side.generate(prompt, phase.count)
        idle[waiting.name] = (waiting.cpu_s() - asleep) / (run.first_s + run.later_s)
        rates[side.name] = phase.rate(run)
    return Pair(rates, idle, watch.others())


class Pairs:
    """Measures pairs, and waits for quiet before each as long as there is patience."""

    def __init__(self, sides: tuple[Side, Side], prompts: Prompts, patience_s: float) -> None:
        self._sides, self._prompts, self._patience_s = sides, prompts, patience_s

    def measure(self, phase: Phase, rounds: int) -> list[Pair]:
        """Undisturbed pairs, or all if there were hardly any."""
        pairs: list[Pair] = []
        quiet: list[Pair] = []
        measure_pair(phase, *self._sides, self._prompts.make(phase.prompt_tokens))
        for index in range(2 * rounds):
            self._patience_s = Watch(self._sides).wait(DISTURBED, self._patience_s)
            turn = self._sides if index % 2 else self._sides[::-1]
            pairs.append(measure_pair(phase, *turn, self._prompts.make(phase.prompt_tokens)))
            quiet = [pair for pair in pairs if pair.others <= DISTURBED]
            if len(quiet) == rounds:
                break
        return quiet if len(quiet) >= min(_ENOUGH, rounds) else pairs


def measure(result: Result, ours: Moray, peer: LlamaCpp, rounds: int, patience_s: float) -> None:
    prompts = Prompts(result.geometry.vocab)
    pairs = Pairs((ours, peer), prompts, patience_s)
    for phase in PHASES:
        result.pairs[phase.name] = pairs.measure(phase, rounds)
    for phase in PHASES:
        asked = [prompts.make(phase.prompt_tokens) for _ in range(3)]
        result.breakdowns[phase.name] = ours.breakdown(asked, phase.count)
    decode, prefill = PHASES[0], PHASES[-1]
    for side in (ours, peer):
        run = side.generate(prompts.make(decode.prompt_tokens), decode.count)
        result.distinct_tokens[side.name] = len(set(run.ids)) / len(run.ids)
    before = np.array(ours.tokens_per_expert())
    ours.generate(prompts.make(prefill.prompt_tokens), 1)
    counts = np.array(ours.tokens_per_expert()) - before
    result.routing = [(int(row.min()), float(np.median(row)), int(row.max())) for row in counts]


# ------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Models:
    """One geometry on disk, twice."""

    title: str
    geometry: Geometry
    store: Path
    gguf: Path


def prepare(root: Path, name: str, geometry: Geometry) -> Models:
    """Write what is not there. A model that was kept must have as many layers."""
    store, gguf = root / f"{name}-store", root / f"{name}.gguf"
    if not store.exists():
        with TemporaryDirectory(dir=root) as partial:
            write_store(Path(partial) / "store", geometry, Recipe.parse(RECIPE)).rename(store)
    if not gguf.exists():
        make_gguf(root / f"{name}.gguf.partial", geometry).rename(gguf)
    found = json.loads((store / "config.json").read_text())["num_hidden_layers"]
    if found != geometry.layers:
        raise SystemExit(f"{store} has {found} layers, expected {geometry.layers}; name another --directory")
    title = f"{name}: {geometry.layers} layers, hidden {geometry.hidden}, {geometry.experts} experts of "
    return Models(f"{title}{geometry.intermediate}, top {geometry.active}", geometry, store, gguf)


@contextmanager
def open_sides(models: Models, python: Path, threads: int) -> Iterator[tuple[Moray, LlamaCpp, dict[str, Any]]]:
    needed = models.gguf.stat().st_size + sum(file.stat().st_size for file in models.store.iterdir()) + (3 << 30)
    if needed > available_memory():
        raise SystemExit(f"this needs {format_bytes(needed)} of memory, {format_bytes(available_memory())} are free")
    with open_peer(python) as peer:
        loaded = peer.load(models.gguf, threads=threads)
        with moray.launch(models.store, hosts=1, device="cpu", threads=threads) as engine:
            yield Moray(engine, peer.pid), LlamaCpp(peer), loaded


def compare(models: Models, python: Path, threads: int, rounds: int, patience_s: float) -> Result:
    with Store.open(models.store) as store:
        sizes = store_sizes(store.manifest)
    with open_sides(models, python, threads) as (ours, peer, loaded):
        result = Result(
            models.title,
            models.geometry,
            sizes,
            gguf_sizes(models.gguf),
            loaded["version"],
            loaded["system"],
            telling_lines(loaded["log"]),
        )
        measure(result, ours, peer, rounds, patience_s)
    return result


def print_trunk(models: Models) -> None:
    """Where a decode step's time goes by module, in this process."""
    with in_process(models.store) as runner:
        clocked = InProcess("hqq4", runner)
        prompts = Prompts(models.geometry.vocab)
        clocked.layer_times(prompts.make(32), 8)
        print_layer_times({"in this process": clocked.layer_times(prompts.make(32), 64)})


# -------------------------------------------------------------------------------------------- main

_NAMES = {"mixtral": "mixtral-8x7b", "qwen": "qwen3-30b-a3b"}
_TINY = {"mixtral": "tiny", "qwen": "tiny-qwen"}


@contextmanager
def _models(arguments: argparse.Namespace) -> Iterator[list[Models]]:
    names = [arguments.only] if arguments.only else list(_NAMES)
    geometries = {
        name: PRESETS[_TINY[name]] if arguments.quick else replace(PRESETS[_NAMES[name]], layers=arguments.layers)
        for name in names
    }
    prefix = "tiny-" if arguments.quick else ""
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        yield [prepare(arguments.directory, prefix + name, geometry) for name, geometry in geometries.items()]
        return
    with working_directory(sum(6 * geometry.num_parameters // 5 for geometry in geometries.values())) as root:
        yield [prepare(root, prefix + name, geometry) for name, geometry in geometries.items()]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_python(parser)
    parser.add_argument("--directory", type=Path, help="where models are and stay; without it, a temporary one")
    parser.add_argument("--only", choices=sorted(_NAMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each phase (5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (all cores)")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for quiet, a model (120)")
    parser.add_argument("--trunk", action="store_true", help="also clock the modules of a decode step, in this process")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    results = []
    print(f"{describe_machine()}\nmoray {moray.__version__}, {arguments.threads} threads each")
    with _models(arguments) as found:
        for models in found:
            results.append(
                compare(models, arguments.peer_python, arguments.threads, arguments.rounds, arguments.patience)
            )
            print_result(results[-1], arguments.rounds)
            if arguments.trunk:
                print_trunk(models)
    if arguments.json:
        document = {
            "machine": describe_machine(),
            "moray": moray.__version__,
            "threads": arguments.threads,
            "models": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
