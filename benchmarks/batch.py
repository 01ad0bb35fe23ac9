"""Decoding several sequences in one forward pass, against the bytes that it must read.

    python benchmarks/batch.py                                     # both geometries, uniformly random choices
    python benchmarks/batch.py --models qwen3 --rounds 9
    python benchmarks/batch.py --recipe experts=hqq4,attention=hqq4   # a head of 16 bits
    python benchmarks/batch.py --models qwen3 --rounds 2 --context 2000

Stores of random weights with planted choices (make_store.py): 2 layers of Mixtral-8x7B, 4 of Qwen3-30B-A3B (--layers:
so many of each) and the whole output head, 8 bits unless ``--recipe`` says otherwise; each in this process, all
experts in memory. B sequences at different places, of ``--context`` tokens and up, are prefilled, then decode greedily;
after id t must come t + 1, for every sequence and B.

*step*: median seconds of one forward pass over a new token of each of B sequences, without sampling. *in turn*: of B
passes of one token each. *bytes*: what a step reads: the trunk (an embedding's rows are not counted), each expert that
at least one of the B tokens chose, and the sequences' keys and values. *reading*: bytes / bandwidth, that of the faster
reader of ``runtime/kernels/readers.py``, the mean of measurements just before and just after the steps. *of reading*:
reading / step; 1 would be reading alone. *multiplying*: what the int8 products of a step take at the rate of
products.py, where nothing is read. *of bound*: the larger of reading and multiplying, / step.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import describe_machine, in_process, print_table, working_directory
from geometry import PRESETS, Geometry
from make_store import write_store
from products import product_rate
from routing import replay_of
from transformers import DynamicCache

from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.readers import read_bandwidth
from moray.runtime.model.batch import BatchForward, cache_kind_of, make_batch_forward
from moray.runtime.model.families import build_model, load_config
from moray.runtime.model.kv_layer import new_cache
from moray.runtime.model.weights_read import trunk_bytes_read
from moray.runtime.store.store import Store

BATCHES = (1, 2, 4, 8)
MODELS = {
    "mixtral": replace(PRESETS["mixtral-8x7b"], layers=2),
    "qwen3": replace(PRESETS["qwen3-30b-a3b"], layers=4),
}
_READ_BYTES = 512 << 20
_CONTEXT = 48


@dataclass(frozen=True)
class Machine:
    """What it does at its best: bytes and int8 products a second."""

    bandwidth: float
    products: float

    @classmethod
    def measure(cls, buffer: np.ndarray) -> Machine:
        return cls(read_bandwidth(buffer, len(os.sched_getaffinity(0)), passes=3), product_rate())

    def mean(self, other: Machine) -> Machine:
        return Machine((self.bandwidth + other.bandwidth) / 2, (self.products + other.products) / 2)


@dataclass(frozen=True)
class Steps:
    """Of one round: seconds a step, the same in turn, bytes a step, and what reading and multiplying take alone."""

    step_s: float
    in_turn_s: float
    num_bytes: float
    reading_s: float
    multiplying_s: float

    @property
    def of_reading(self) -> float:
        return self.reading_s / self.step_s

    @property
    def of_bound(self) -> float:
        return max(self.reading_s, self.multiplying_s) / self.step_s


def prefill(model: Any, size: int, context: int = _CONTEXT) -> tuple[list[int], list[DynamicCache]]:
    """The next token of each of B sequences at different places, and their caches."""
    caches, tokens = [new_cache(model.config) for _ in range(size)], []
    for row, cache in enumerate(caches):
        first = 1000 * (row + 1)
        ids = list(range(first, first + context + 3 * row))
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens += follow(ids[-1:], logits[0])
    return tokens, caches


def follow(tokens: list[int], logits: torch.Tensor) -> list[int]:
    """The greedy tokens after these, which must be the planted ones."""
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    assert chosen == [token + 1 for token in tokens], f"after {tokens} came {chosen}"
    return chosen


def products_of_token(geometry: Geometry) -> int:
    """Weights that one token is multiplied with: attention's, its experts' and the head's. Routers are not int8."""
    attention = 2 * geometry.hidden * geometry.head_dim * (geometry.heads + geometry.kv_heads)
    layer = attention + geometry.active * geometry.expert_parameters
    return geometry.layers * layer + geometry.vocab * geometry.hidden


def measure(
    runner: Runner,
    batch: BatchForward,
    size: int,
    context: int,
    steps: int,
    trunk_bytes: int,
    products: int,
    measure_machine: Callable[[], Machine],
) -> tuple[Steps, Machine]:
    """B sequences, ``steps`` tokens each in one pass, then as many in turn."""
    tokens, caches = prefill(runner.model, size, context)
    machine = measure_machine()
    before, together, apart, kv_bytes = runner.stats(), [], [], 0
    for _ in range(steps):
        started = perf_counter()
        logits = batch(tokens, caches)
        together.append(perf_counter() - started)
        tokens = follow(tokens, logits)
        kv_bytes += sum(layer.keys.nbytes + layer.values.nbytes for cache in caches for layer in cache.layers)
    after, machine = runner.stats(), machine.mean(measure_machine())
    for _ in range(max(3, steps // 3)):
        started = perf_counter()
        rows = [
            runner.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0]
            for token, cache in zip(tokens, caches, strict=True)
        ]
        apart.append(perf_counter() - started)
        tokens = follow(tokens, torch.cat(rows))
    read = sum(after.bytes_by_source.values()) - sum(before.bytes_by_source.values())
    num_bytes = trunk_bytes + (read + kv_bytes) / steps
    reading_s, multiplying_s = num_bytes / machine.bandwidth, size * products / machine.products
    return Steps(median(together), median(apart), num_bytes, reading_s, multiplying_s), machine


def run(name: str, geometry: Geometry, root: Path, options: argparse.Namespace) -> None:
    replay, rounds = replay_of(options.routing, geometry), options.rounds
    path = write_store(root / name, geometry, Recipe.parse(options.recipe), replay=replay)
    buffer, products = np.ones(_READ_BYTES, dtype=np.uint8), products_of_token(geometry)
    results: dict[int, list[Steps]] = {size: [] for size in BATCHES}
    machines = []
    with in_process(path) as runner, torch.inference_mode(), Store.open(path) as store:
        trunk_bytes = trunk_bytes_read(build_model(load_config(path), torch.float32, "meta"), store.manifest, "cpu")
        torch.set_num_threads(1)  # as the step loop does it
        batch = make_batch_forward(runner.model, cache_kind_of(runner.model))
        assert batch is not None and batch.kind == "fused"
        for number in range(-1, rounds):
            for size in BATCHES:
                measure_machine = partial(Machine.measure, buffer)
                found, machine = measure(
                    runner, batch, size, options.context, options.steps, trunk_bytes, products, measure_machine
                )
                if number >= 0:
                    results[size].append(found)
                    machines.append(machine)
    report(name, geometry, results, machines)


def report(name: str, geometry: Geometry, results: dict[int, list[Steps]], machines: list[Machine]) -> None:
    bandwidths, rates = [machine.bandwidth for machine in machines], [machine.products for machine in machines]
    print(
        f"\n{name}: {geometry.experts} experts, top-{geometry.active}, {geometry.layers} layers; bandwidth "
        f"{median(bandwidths) / 1e9:.1f} GB/s ({min(bandwidths) / 1e9:.1f}-{max(bandwidths) / 1e9:.1f}), "
        f"{median(rates) / 1e9:.0f} G products/s ({min(rates) / 1e9:.0f}-{max(rates) / 1e9:.0f})\n"
    )
    rows = []
    for size, found in results.items():
        of_reading = [steps.of_reading for steps in found]
        step = median(steps.step_s for steps in found)
        rows.append(
            (
                str(size),
                f"{1e3 * step:.1f}",
                f"{1e3 * median(steps.in_turn_s for steps in found):.1f}",
                f"{median(steps.num_bytes for steps in found) / 1e6:.0f}",
                f"{1e3 * median(steps.reading_s for steps in found):.1f}",
                f"{1e3 * median(steps.multiplying_s for steps in found):.1f}",
                f"{median(of_reading):.2f}",
                f"{min(of_reading):.2f}-{max(of_reading):.2f}",
                f"{median(steps.of_bound for steps in found):.2f}",
                f"{size / step:.1f}",
            )
        )
    times = ("step ms", "in turn ms", "MB", "reading ms", "multiplying ms")
    print_table(("B", *times, "of reading", "lowest-highest", "of bound", "tokens/s"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="of each model")
    parser.add_argument("--routing", default="random", help="as make_store.py's; must plant choices (random)")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"as moray convert's ({DEFAULT_RECIPE})")
    parser.add_argument("--context", type=int, default=_CONTEXT, help=f"tokens of the shortest sequence ({_CONTEXT})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a round, each B (12)")
    arguments = parser.parse_args()
    print(describe_machine())
    for name in arguments.models:
        geometry = MODELS[name]
        geometry = replace(geometry, layers=arguments.layers or geometry.layers)
        with working_directory(5 << 29) as root:
            run(name, geometry, root, arguments)
        gc.collect()


if __name__ == "__main__":
    main()
