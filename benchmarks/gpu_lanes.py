"""The lanes of one expert, measured one by one on a device: hit, copy, CPU, and all at once.

Needs no Ray and no installation, like benchmarks/gpu.py. From the repository's root:

    PYTHONPATH=src HF_HUB_OFFLINE=1 python3 benchmarks/gpu_lanes.py

`--device cpu` tries it out where there is no GPU; `--preset tiny --layers 1` makes that short.

One MoE layer of random hqq4 weights (default: Mixtral-8x7B's, 8 experts of ~99 MB), its shards in an arena that is
mapped read-only as an engine maps it. Two experts a token.

- *link*: one pinned buffer of a shard's size to the device, again and again, in GB/s: the yardstick of copies.
- *us an expert*: a call of the layer's experts by wall clock, synchronized, over the experts in it; medians of
  ``--rounds`` calls after 3. 1 token: two experts of one token. 64 tokens: all experts, as routed at random.
- *hit*: all experts on the device. *copy*: no call finds its experts there, each copies its shards (1 token: six of the
  eight experts in turn, through two slots). *registered*: the device reads the arena itself (cudaHostRegister);
  *staged*: through pinned buffers. *CPU*: the kernels in place, activations moved to the CPU and outputs back.
- *shard GB/s*: bytes of shards / time. *x link*: for copies, that over the link's; 1.0 is a lane that costs nothing but
  the copy.
- *rates*: what ``calibrate`` finds, alone and with CPU and link loaded at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import describe_machine, print_table, working_directory
from geometry import PRESETS
from make_store import write_store

from moray.runtime.arena import Arena
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.device.experts import DeviceExperts
from moray.runtime.device.tier import DeviceTier
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.experts.source import FixedLease
from moray.runtime.kernels import ops
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.lanes.calibrate import calibrate
from moray.runtime.lanes.lane import Lane
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.families import expert_modules
from moray.runtime.model.loader import compute_dtype, load_model
from moray.runtime.store.store import Store


class Bench:
    """One layer's experts on a device."""

    def __init__(self, store: Store, arena: Arena, device: torch.device, slots: int, is_registered: bool) -> None:
        self.layer = store.manifest.layers[0]
        self.device = device
        self._arena = arena
        self.tier = DeviceTier.of(store.manifest, device, slots * store.manifest.slot_bytes)
        assert self.tier.cache is not None
        self.is_registered = is_registered and self.tier.cache.register(arena.base_address, arena.num_bytes)
        model = load_model(store, "int8", device)
        self.module: Any = expert_modules(model)[0][1]
        if not hasattr(self.module, "has_post_expert_norm"):  # transformers 5.17
            self.module.has_post_expert_norm = False
        nowhere: Any = None  # leases are made here
        binding = ExpertsBinding(self.module, 0, self.layer.layout, nowhere, "int8")
        binding.use_device(self.tier)
        assert binding.device is not None
        self.experts: DeviceExperts = binding.device
        self.hidden = binding._down_kernel.spec.rows

    def lease(self, active: np.ndarray) -> FixedLease:
        return FixedLease(self._arena.addresses(active))

    @torch.inference_mode()
    def call(self, ids: torch.Tensor, lane: Lane) -> tuple[float, int]:
        """Seconds of a call, and its experts."""
        x = torch.randn(len(ids), self.hidden, device=self.device, dtype=compute_dtype(self.device))
        weights = torch.full(ids.shape, 0.5, device=self.device)
        grouping = ops.group_by_expert(ids.numpy(), self.layer.num_experts)
        synchronize(self.device)
        started = perf_counter()
        self.experts.compute(
            self.module, x, weights, grouping, self.lease(grouping.active), [lane] * len(grouping.active)
        )
        synchronize(self.device)
        return perf_counter() - started, len(grouping.active)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_link(num_bytes: int, device: torch.device) -> float:
    """Bytes/s."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(13):
        synchronize(device)
        started = perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        times.append(perf_counter() - started)
    return num_bytes / median(times[3:])


@contextmanager
def filled_arena(store: Store) -> Iterator[Arena]:
    """The first layer's shards, mapped read-only."""
    count = store.manifest.layers[0].num_experts
    owner = Arena.create(count, store.manifest.slot_bytes)
    for expert in range(count):
        _load(owner, store, expert)
    reader = Arena.attach(owner.ref)
    try:
        yield reader
    finally:
        reader.close()
        owner.close()


def _load(arena: Arena, store: Store, expert: int) -> None:
    with arena.writing(expert) as buffer:
        store.read_shard_into(ExpertKey(0, expert), buffer)


def measure(bench: Bench, next_ids: Callable[[int], torch.Tensor], lane: Lane, rounds: int) -> float:
    """Median seconds an expert."""
    found = [bench.call(next_ids(i), lane) for i in range(rounds + 3)][3:]
    return median(seconds / count for seconds, count in found)


def print_lanes(store: Store, device: torch.device, rounds: int) -> None:
    manifest = store.manifest
    num_experts, num_bytes = manifest.layers[0].num_experts, manifest.layers[0].layout.num_bytes
    link = measure_link(num_bytes, device)
    print(f"shard: {num_bytes / 1e6:.1f} MB; link: {link / 1e9:.2f} GB/s\n")
    random = torch.Generator().manual_seed(0)
    many = torch.stack([torch.randperm(num_experts, generator=random)[:2] for _ in range(64)])

    def pair(i: int) -> torch.Tensor:
        return torch.tensor([[2 * i % num_experts, (2 * i + 1) % num_experts]])

    rows = []
    with filled_arena(store) as arena:
        for name, lane, slots, is_registered in (
            ("hit", Lane.DEVICE_HIT, num_experts, False),
            ("copy, registered", Lane.DEVICE_COPY, 2, True),
            ("copy, staged", Lane.DEVICE_COPY, 2, False),
            ("CPU", Lane.HOST_CPU, 1, False),
        ):
            bench = Bench(store, arena, device, slots, is_registered)
            try:
                if is_registered and not bench.is_registered:
                    rows.append((name, "refused", "-", "-", "-"))
                    continue
                if lane is Lane.DEVICE_HIT:
                    bench.call(torch.arange(num_experts).view(-1, 2), Lane.DEVICE_COPY)
                one_s, many_s = measure(bench, pair, lane, rounds), measure(bench, lambda i: many, lane, rounds)
                rate = num_bytes / one_s
                ratio = f"{rate / link:.2f}" if lane is Lane.DEVICE_COPY else "-"
                rows.append((name, f"{1e6 * one_s:.0f}", f"{1e6 * many_s:.0f}", f"{rate / 1e9:.2f}", ratio))
            finally:
                bench.tier.close()
        print_table(("lane", "us an expert, 1 token", "us, 64 tokens", "shard GB/s, 1 token", "x link"), rows)
        print()
        print_calibration(store, arena, device)


def print_calibration(store: Store, arena: Arena, device: torch.device) -> None:
    bench = Bench(store, arena, device, 2, True)
    try:
        shards = arena.addresses(np.arange(bench.layer.num_experts))
        calibrate(bench.tier.rates, bench.experts.loads(bench.module, shards, compute_dtype(device)), seconds=0.5)
        rates = [rate for rate in bench.tier.stats().rates.resources if rate.num_observations]
    finally:
        bench.tier.close()
    rows = [
        (r.name, f"{r.bytes_per_s / 1e9:.2f}", f"{r.bytes_per_s_together / 1e9:.2f}", f"{r.token_us:.1f}")
        for r in rates
    ]
    print_table(("rates", "shard GB/s alone", "together", "us a token more"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mixtral-layer")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; run this on a machine with one, or try it out with --device cpu")
    set_num_threads(len(os.sched_getaffinity(0)))
    print(describe_machine())
    print(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}\n")
    geometry = replace(PRESETS[arguments.preset], layers=arguments.layers)
    with working_directory(2 << 30) as root:
        path = write_store(Path(root) / "store", geometry, Recipe.parse(DEFAULT_RECIPE))
        with Store.open(path) as store:
            print_lanes(store, device, arguments.rounds)


if __name__ == "__main__":
    main()
