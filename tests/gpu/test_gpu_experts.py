"""Experts on a CUDA device: copies beside computing, mixed lanes, budgets below what a model needs.

Runs like tests/gpu/test_gpu.py, and with it:

    PYTHONPATH=src HF_HUB_OFFLINE=1 python3 -m pytest tests/gpu -W ignore
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moray.runtime.arena import Arena
from moray.runtime.device.cache import DeviceCache
from moray.runtime.experts.source import InProcessSource
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels import ops
from moray.runtime.lanes.calibrate import calibrate
from moray.runtime.lanes.lane import Lane
from moray.runtime.model.families import expert_modules
from moray.runtime.residency.policies.lru import LRU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is false"),
]

_ROOT = Path(__file__).parents[2]
_STORE = _ROOT / "deploy" / "demo" / "store"
_DEVICE = torch.device("cuda")
_PROMPT = "class Parser:\n    def __init__(self, name, default=None):\n"


@pytest.fixture(scope="module")
def common() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_ROOT / "benchmarks"))
        return importlib.import_module("common")


@pytest.fixture(scope="module")
def expected(common: Any) -> torch.Tensor:
    """Logits of the prompt, CPU, class float."""
    with common.in_process(_STORE, "float") as runner:
        return runner.logits(list(runner.encode(_PROMPT)))


def logits(runner: Runner) -> torch.Tensor:
    return runner.logits(list(runner.encode(_PROMPT)))


@pytest.mark.parametrize(("lanes", "slots"), [("auto", 5), ("auto", 48), ("device-copy", 1), ("host-cpu", 5)])
def test_logits_are_near_the_reference_with_any_lanes(
    common: Any, expected: torch.Tensor, lanes: str, slots: int
) -> None:
    with common.in_process(_STORE, "float", "cuda", slots=slots, lanes=lanes) as runner:
        for _ in range(3):  # the later ones find shards there
            found = logits(runner)
            errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert torch.isfinite(found).all() and errors.median() < 0.02
        stats = runner.device_stats()
    assert stats is not None and stats.num_slots == slots and stats.dropped == 0
    if lanes == "host-cpu":
        assert stats.copies == 0


def test_few_slots_give_the_bits_of_many(common: Any) -> None:
    """Slots are used again while the device still computes: a copy that came too early would show."""
    with common.in_process(_STORE, "float", "cuda", slots=48, lanes="device-copy") as runner:
        first, hits = logits(runner), logits(runner)
    assert torch.equal(first, hits)
    for slots in (1, 2, 7):
        with common.in_process(_STORE, "float", "cuda", slots=slots, lanes="device-copy") as runner:
            assert torch.equal(logits(runner), first) and torch.equal(logits(runner), first)


@pytest.fixture(scope="module")
def runner(common: Any) -> Iterator[Runner]:
    with common.in_process(_STORE, "float", "cuda", slots=3) as made:
        yield made


@torch.inference_mode()
def test_mixed_lanes_through_three_slots(runner: Runner) -> None:
    module: Any = expert_modules(runner.model)[1][1]
    source: InProcessSource = module.moray.source
    generator = torch.Generator().manual_seed(0)
    for turn in range(100):
        x = torch.randn(9, 256, generator=generator).to(_DEVICE, torch.bfloat16)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator).to(_DEVICE)
        grouping = ops.group_by_expert(ids.numpy(), 8)
        draws = torch.rand(len(grouping.active), generator=generator) < (turn % 5) / 4
        lanes = [Lane.HOST_CPU if on_cpu else Lane.DEVICE_COPY for on_cpu in draws.tolist()]
        lease = source.lease(1, grouping.active)
        found = module.moray.device.compute(module, x, weights, grouping, lease, lanes)
        on_cpu = [Lane.HOST_CPU] * len(lanes)
        reference = module.moray.device.compute(module, x, weights, grouping, lease, on_cpu)
        assert (found - reference).float().norm() / reference.float().norm() < 0.02
    stats = runner.device_stats()
    assert stats is not None and stats.evictions > 100
    assert min(stats.rates[name].num_observations for name in ("cpu", "device", "link")) > 10


def test_rates_are_calibrated(runner: Runner) -> None:
    module: Any = expert_modules(runner.model)[1][1]
    shards = module.moray.source.lease(1, np.arange(8)).addresses
    tier = module.moray.device._tier
    calibrate(tier.rates, module.moray.device.loads(module, shards, torch.bfloat16))
    tier.rates.validate()


@pytest.mark.parametrize("is_registered", [True, False])
def test_copies_have_the_bytes_of_a_read_only_arena(is_registered: bool) -> None:
    """Registered memory is read by the device itself; where it cannot be, copies go through pinned buffers."""
    random = np.random.default_rng(0)
    owner = Arena.create(6, 1 << 20)
    contents = random.integers(0, 256, (6, 1 << 20), dtype=np.uint8)
    for slot in range(6):
        _write(owner, slot, contents[slot])
    reader = Arena.attach(owner.ref)
    cache = DeviceCache(_DEVICE, 4 << 20, 1 << 20, 6, LRU())
    if is_registered:
        print("registered:", cache.register(reader.base_address, reader.num_bytes))
    addresses = reader.addresses(np.arange(6)).tolist()

    def shard(expert: int) -> torch.Tensor:
        return cache.memory[cache.offset(expert) :][: 1 << 20]

    for turn in range(40):
        expert = turn % 6
        if not cache.resident([expert])[0]:
            entry = cache.copy(expert, addresses[expert], 1 << 20, lambda: True)
            assert entry is not None and entry.transfer is not None
            entry.transfer.join()
            joined = shard(expert).clone()  # in the stream of computing, behind the copy
            assert cache.settle(entry)
            assert np.array_equal(joined.cpu().numpy(), contents[expert])
        cache.used([expert])
        cache.tell_policy([expert])
        cache.validate()
        assert np.array_equal(shard(expert).cpu().numpy(), contents[expert])
    changed = cache.copy(next(e for e in range(6) if not cache.resident([e])[0]), addresses[0], 1 << 20, lambda: False)
    assert changed is not None and not cache.settle(changed)
    cache.close()
    reader.close()
    owner.close()


def _write(arena: Arena, slot: int, content: np.ndarray) -> None:
    with arena.writing(slot) as buffer:
        buffer[:] = content.data
