"""What a layer costs beside reading its weights: of models so small that hardly anything is left to compute.

    python benchmarks/layer_cost.py                     # 128 experts, top-8, as Qwen3-30B-A3B; half a minute

Two stores of random hqq4 weights with Qwen3-30B-A3B's attention layout and routing, but hidden 128 and experts of 64
columns, one with 4 layers and one with 36, each in this process. *a step*: seconds of one decoded token, the median of
``--tokens`` tokens after a prompt of 32; pairs of both models are interleaved. *a layer*: (step of 36 layers - step of
4 layers) / 32. Embedding, head, sampling and the step loop are the same in both, so they are not in it.
*launch*: the time in the one call of the kernels that computes consecutive layers (layers.py): attention, routing and
experts of these small matrices, with the waking of the threads. *Python*: the rest of a layer.
Goal: at most 60 us.
"""

from __future__ import annotations

import argparse
import secrets
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from common import describe_machine, in_process, print_table, working_directory
from geometry import PRESETS
from make_store import write_store

from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.model import layer_run

LAYERS = (4, 36)
GOAL_US = 60.0
_SMALL = replace(PRESETS["qwen3-30b-a3b"], hidden=128, intermediate=64, head_dim=32, vocab=512)
_PROMPT = tuple(range(3, 35))


def write_model(root: Path, layers: int) -> Path:
    return write_store(root / str(layers), replace(_SMALL, layers=layers), Recipe.parse(DEFAULT_RECIPE))


def step_times(runner: Runner, tokens: int) -> tuple[float, float]:
    """Median microseconds of a decoded token, and of the launch of its layers."""
    request, launches, launch = GenerationRequest(secrets.token_hex(8), _PROMPT, tokens + 1), [], layer_run.layers_at

    def clocked(*arguments: Any) -> int:
        started = perf_counter()
        index = launch(*arguments)
        launches.append(perf_counter() - started)
        return index

    layer_run.layers_at = clocked
    try:
        times = [perf_counter() for _ in runner.stream(request)]
    finally:
        layer_run.layers_at = launch
    assert launches, "a token's layers were not computed in one launch"
    return 1e6 * median(b - a for a, b in pairwise(times)), 1e6 * median(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128, help="of a pair, each model (128)")
    arguments = parser.parse_args()
    print(describe_machine())
    rows = []
    with working_directory(1 << 30) as root:
        few, many = (write_model(root, layers) for layers in LAYERS)
        with in_process(few) as small, in_process(many) as large:
            for _ in range(arguments.pairs + 1):
                rows.append((step_times(small, arguments.tokens), step_times(large, arguments.tokens)))
    report(rows[1:])


def report(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    layers = LAYERS[1] - LAYERS[0]
    whole = [(large[0] - small[0]) / layers for small, large in pairs]
    launched = [(large[1] - small[1]) / layers for small, large in pairs]
    rest = [a - b for a, b in zip(whole, launched, strict=True)]
    print(f"{_SMALL.experts} experts, top-{_SMALL.active}, {len(pairs)} pairs of {LAYERS[0]} and {LAYERS[1]} layers\n")
    print_table(
        ("us, medians", "a layer", "launch", "Python", "lowest-highest", "goal"),
        [
            (
                "decode, a token",
                *(f"{median(values):.1f}" for values in (whole, launched, rest)),
                f"{min(rest):.1f}-{max(rest):.1f}",
                f"{GOAL_US:.0f} {'met' if median(rest) <= GOAL_US else 'missed'}",
            )
        ],
    )


if __name__ == "__main__":
    main()
