"""Bytes loaded a token by batches whose experts do not all fit, beside what the union of their choices implies.

    python benchmarks/batch_capped.py                          # both geometries, half of the experts in memory
    python benchmarks/batch_capped.py --models qwen3 --share 0.25

The stores are those of batch.py: uniformly random choices, planted, so what each token chooses is known. A host in this
process holds ``--share`` of all experts in its arena, policy layer-lru (each layer has its share of the slots), without
prefetch, and loads the others from the disk when a layer needs them. B sequences decode as in batch.py.

*union*: different experts that the B tokens of a step choose, the mean over steps and layers, from the recorded
choices. *used*: their bytes, of all layers, a token (divided by B). *implied*: what of these must be loaded. What is in
memory says nothing about choices that are uniform, so each wanted expert is there with probability r / E, where r of a
layer's E experts are in memory at its turn: its share of the slots, or less if the union is more than a share, for the
layer before has then taken slots of the others: (slots - union) / (layers - 1). *loaded*: what the host read from the
disk, a token. Both also relative to B = 1.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from batch import MODELS, follow, prefill
from bookkeeping import arena_of, runner_of
from common import describe_machine, print_table, working_directory
from geometry import Geometry
from make_store import write_store
from replay import Replay
from routing import replay_of

from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.memory import reuse_freed_memory
from moray.runtime.model.batch import cache_kind_of, make_batch_forward
from moray.runtime.store.store import Store

BATCHES = (1, 2, 4, 8)
_POLICY = "layer-lru"


@dataclass(frozen=True)
class Loads:
    """Of one B: experts a layer call, bytes a token."""

    union: float
    used_bytes: float
    loaded_bytes: float


def measure(runner: Runner, host: ShardHost, replay: Replay, size: int, steps: int, shard_bytes: int) -> Loads:
    """``steps`` steps of B sequences."""
    batch = make_batch_forward(runner.model, cache_kind_of(runner.model))
    assert batch is not None
    tokens, caches = prefill(runner.model, size)
    before, unions = host.stats().loader.bytes_read, []
    for _ in range(steps):
        unions += [len(np.unique(chosen)) for chosen in replay.chosen_TLK[tokens].swapaxes(0, 1)]
        tokens = follow(tokens, batch(tokens, caches))
    loaded = host.stats().loader.bytes_read - before
    num_tokens = steps * size
    return Loads(float(np.mean(unions)), sum(unions) * shard_bytes / num_tokens, loaded / num_tokens)


def run(name: str, geometry: Geometry, root: Path, share: float, steps: int) -> None:
    replay = replay_of("random", geometry)
    assert replay is not None
    path, threads = write_store(root / name, geometry, Recipe.parse(DEFAULT_RECIPE), replay=replay), _threads()
    num_slots = round(share * geometry.experts) * geometry.layers
    with (
        torch.inference_mode(),
        Store.open(path) as store,
        arena_of(store, threads, num_slots=num_slots, policy=_POLICY, prefetch="off") as arena,
        runner_of(store, arena.source) as runner,
    ):
        shard_bytes = store.manifest.layers[0].layout.num_bytes
        found = {size: measure(runner, arena.host, replay, size, steps, shard_bytes) for size in BATCHES}
    report(name, geometry, found, num_slots / (geometry.experts * geometry.layers))


def implied_bytes(loads: Loads, geometry: Geometry, share: float) -> float:
    """Of the bytes used, a token, those of experts that cannot be expected in memory."""
    quota, layers = share * geometry.experts, geometry.layers
    resident = quota if layers == 1 else min(quota, (quota * layers - loads.union) / (layers - 1))
    return loads.used_bytes * (1 - resident / geometry.experts)


def report(name: str, geometry: Geometry, found: dict[int, Loads], share: float) -> None:
    print(
        f"\n{name}: {geometry.experts} experts, top-{geometry.active}, {geometry.layers} layers; "
        f"{share:.0%} of the experts in memory; MB a token\n"
    )
    implied = {size: implied_bytes(loads, geometry, share) for size, loads in found.items()}
    rows, first = [], BATCHES[0]
    for size, loads in found.items():
        rows.append(
            (
                str(size),
                f"{loads.union:.1f}",
                *(f"{value / 1e6:.1f}" for value in (loads.used_bytes, implied[size], loads.loaded_bytes)),
                f"{loads.loaded_bytes / implied[size]:.2f}",
                f"{implied[size] / implied[first]:.2f}",
                f"{loads.loaded_bytes / found[first].loaded_bytes:.2f}",
            )
        )
    header = ("B", "union", "used", "implied", "loaded", "loaded/implied", "implied, of B = 1", "loaded, of B = 1")
    print_table(header, rows)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--share", type=float, default=0.5, help="of the experts in memory (0.5)")
    parser.add_argument("--steps", type=int, default=24, help="of each B (24)")
    arguments = parser.parse_args()
    set_num_threads(_threads())
    reuse_freed_memory()
    print(describe_machine())
    for name in arguments.models:
        with working_directory(5 << 29) as root:
            run(name, MODELS[name], root, arguments.share, arguments.steps)
        gc.collect()


if __name__ == "__main__":
    main()
