"""The device's tier, with the CPU as the device: the cache, experts in mixed lanes, whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.matrices import assert_same_bits
from helpers.reference import greedy, runner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moray.deploy.config import demo_store
from moray.runtime.arena import Arena
from moray.runtime.arrays import Ints
from moray.runtime.device.cache import DeviceCache, Entry
from moray.runtime.device.experts import DeviceExperts
from moray.runtime.device.tier import DeviceTier
from moray.runtime.errors import ConfigError
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.experts.source import FixedLease, InProcessSource
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels import ops
from moray.runtime.lanes.calibrate import calibrate
from moray.runtime.lanes.lane import Lane, Resource
from moray.runtime.lanes.rates import Rate
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.families import expert_modules
from moray.runtime.model.loader import bind_experts, load_model
from moray.runtime.residency.policies.lru import LRU
from moray.runtime.store.store import Store

CPU = torch.device("cpu")
SLOT = 64


# -------------------------------------------------------------------------------------- the cache


class ManualTransfer:
    """A copy that ends when the test says so, or when it is waited for."""

    def __init__(self, source: Any, target: torch.Tensor) -> None:
        self._source, self._target = source, target
        self.has_ended = False

    def end(self) -> None:
        if not self.has_ended:
            self._target.copy_(self._source)
            self.has_ended = True

    def is_done(self) -> bool:
        return self.has_ended

    def join(self) -> None:
        self.end()

    def wait(self) -> float:
        self.end()
        return 0.001


class ManualMover:
    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self.started: list[ManualTransfer] = []

    def register(self, address: int, num_bytes: int) -> bool:
        return True

    def start(self, address: int, target: torch.Tensor, after: Any | None) -> ManualTransfer:
        first = address - self._arena.data_ptr()
        made = ManualTransfer(self._arena[first : first + len(target)], target)
        self.started.append(made)
        return made

    def mark(self) -> Any | None:
        return None

    def close(self) -> None:
        assert all(transfer.has_ended for transfer in self.started)


def shard(cache: DeviceCache, expert: int) -> torch.Tensor:
    return cache.memory[cache.offset(expert) :][:SLOT]


class CacheMachine(RuleBasedStateMachine):
    """Copies that end late, sources that change under them, held shards: a resident shard has its expert's bytes."""

    @initialize(num_slots=st.integers(1, 4), num_experts=st.integers(1, 9))
    def make(self, num_slots: int, num_experts: int) -> None:
        self.arena = torch.zeros(num_experts * SLOT, dtype=torch.uint8)
        self.generations = [0] * num_experts
        self.cache = DeviceCache(CPU, num_slots * SLOT + SLOT // 2, SLOT, num_experts, LRU())
        self.mover = ManualMover(self.arena)
        self.cache._mover = self.mover
        self.held: list[int] = []
        self.entries: list[Entry] = []
        self.truth: dict[int, int] = {}  # what each expert's resident copy was made of
        for expert in range(num_experts):
            self.write(expert)

    def write(self, expert: int) -> None:
        """The host loads other bytes into the slot, under a new generation."""
        self.generations[expert] += 2
        self.arena[expert * SLOT : (expert + 1) * SLOT] = (17 * expert + self.generations[expert]) % 256

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        expert = data.draw(st.integers(0, len(self.generations) - 1))
        if self.cache.resident([expert])[0] or any(e.expert == expert for e in self.cache._copying):
            return
        leased, address = self.generations[expert], self.arena.data_ptr() + expert * SLOT
        busy = len(self.cache._copying) + len(self.held)
        entry = self.cache.copy(expert, address, SLOT, lambda: self.generations[expert] == leased)
        if entry is None:
            assert busy >= self.cache.num_slots
        else:
            self.entries.append(entry)

    @precondition(lambda self: self.mover.started)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.mover.started)).end()

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        self.write(data.draw(st.integers(0, len(self.generations) - 1)))

    @rule()
    def collect(self) -> None:
        self.cache.collect([])

    @rule(data=st.data())
    def collect_wanted(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(st.integers(0, len(self.generations) - 1), max_size=3))
        self.cache.collect(wanted)
        assert not {entry.expert for entry in self.cache._copying} & set(wanted)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Some resident shards are in use while others are copied."""
        resident = [e for e in range(len(self.generations)) if self.cache.resident([e])[0]]
        held = data.draw(st.lists(st.sampled_from(resident), unique=True)) if resident else []
        with self.cache.holding(held):
            self.held = held
            for _ in range(3):
                self.copy(data)
                assert all(self.cache.resident(held))
            self.cache.used(held)
            self.cache.tell_policy(held)
            self.held = []

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.validate()
        for entry in self.cache._entries.values():
            if entry.transfer is None and entry.expert not in self.truth:
                value = shard(self.cache, entry.expert)
                # Settled just now, with the generation that it was leased with: the present one.
                assert bool((value == value[0]).all()) and int(value[0]) == int(self.arena[entry.expert * SLOT])
                self.truth[entry.expert] = int(value[0])
        for expert in list(self.truth):
            if not self.cache.resident([expert])[0]:
                del self.truth[expert]
            else:
                assert bool((shard(self.cache, expert) == self.truth[expert]).all()), "overwritten while resident"

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            self.cache.validate()
            assert not self.cache.is_copying
            self.cache.clear()
            assert self.cache.num_resident == 0


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_budget_below_one_shard_is_refused_with_both_sizes() -> None:
    with pytest.raises(ConfigError, match=r"is 1.0 MiB, one expert takes 2.0 MiB; give at least that, or 0"):
        DeviceCache(CPU, 1 << 20, 2 << 20, 8, LRU())


def test_a_budget_above_all_experts_takes_no_more_than_they_need() -> None:
    assert DeviceCache(CPU, 1 << 20, SLOT, 8, LRU()).num_slots == 8


def test_the_least_recently_used_goes_first() -> None:
    policy = LRU()
    for expert in (3, 1, 2):
        policy.loaded(expert)
    policy.used([3, 9])
    assert policy.victim(7, lambda expert: True) == 1
    assert policy.victim(7, lambda expert: expert == 3) == 3
    policy.evicted(1)
    assert policy.victim(7, lambda expert: True) == 2
    assert policy.victim(7, lambda expert: False) is None


# ------------------------------------------------------------------------------------ the experts


class Model:
    """The demonstration model in this process."""

    def __init__(self, store: Store, numerics: Numerics) -> None:
        self.manifest, self.source = store.manifest, InProcessSource(store)
        model = load_model(store, numerics, CPU)
        bind_experts(model, store, self.source, numerics)
        self.module = expert_modules(model)[1][1]


class Layer:
    """Its second layer, the experts on a device of so many slots."""

    def __init__(self, model: Model, num_slots: int, lanes: str = "auto") -> None:
        self.tier = DeviceTier.of(model.manifest, CPU, num_slots * model.manifest.slot_bytes, lanes)
        self.module, self.source = model.module, model.source
        self.binding: ExpertsBinding = self.module.moray  # type: ignore[assignment]
        self.binding.use_device(self.tier)
        assert self.binding.device is not None
        self.device: DeviceExperts = self.binding.device

    def inputs(self, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_tokens, 256, generator=generator)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(num_tokens)])
        return x, ids, torch.rand(num_tokens, 2, generator=generator)

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The CPU's own way."""
        device, self.binding.device = self.binding.device, None
        out = self.binding.forward(self.module, x, ids, weights)
        self.binding.device = device
        return out

    def grouping(self, ids: torch.Tensor) -> ops.Grouping:
        return ops.group_by_expert(ids.numpy(), 8)

    def compute(
        self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], lanes: list[Lane] | None = None
    ) -> torch.Tensor:
        x, ids, weights = inputs
        grouping = self.grouping(ids)
        _, lease = self.source.fetch(1, grouping.active).take()
        return self.device.compute(self.module, x, weights, grouping, lease, lanes)


@pytest.fixture(scope="module")
def models(demo: Store) -> Iterator[dict[Numerics, Model]]:
    made: dict[Numerics, Model] = {"float": Model(demo, "float"), "int8": Model(demo, "int8")}
    yield made
    for model in made.values():
        model.source.close()


@pytest.fixture
def make_layer(models: dict[Numerics, Model]) -> Iterator[Callable[..., Layer]]:
    made: list[Layer] = []

    def make(num_slots: int, numerics: Numerics = "float", lanes: str = "auto") -> Layer:
        made.append(Layer(models[numerics], num_slots, lanes))
        return made[-1]

    yield make
    for layer in made:
        layer.tier.close()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@settings(deadline=None, max_examples=25)
@given(
    num_tokens=st.sampled_from([1, 1, 2, 5, 40]),
    seed=st.integers(0, 10**6),
    draws=st.lists(st.sampled_from([Lane.DEVICE_COPY, Lane.HOST_CPU]), min_size=8, max_size=8),
    num_slots=st.sampled_from([1, 3, 8]),
)
def test_any_mix_of_lanes_gives_the_layers_output(
    models: dict[Numerics, Model], num_tokens: int, seed: int, draws: list[Lane], num_slots: int
) -> None:
    """Also with fewer slots than experts, and twice in a row: what is kept is used."""
    layer = Layer(models["float"], num_slots)
    inputs = layer.inputs(num_tokens, seed)
    active = layer.grouping(inputs[1]).active
    missing = layer.device.missing(active)
    assert layer.tier.cache is not None and missing.all()
    lanes = draws[: len(active)]
    for _ in range(2):
        assert error(layer.compute(inputs, lanes), layer.expected(*inputs)) < 2e-6
        layer.tier.cache.validate()
    assert (~layer.device.missing(active)).sum() == min(num_slots, lanes.count(Lane.DEVICE_COPY))
    layer.tier.close()


def test_the_cpus_class_keeps_its_error_and_the_device_has_its_own(make_layer: Callable[..., Layer]) -> None:
    """int8 on the CPU: its lane has that class's bits, the device's lane is nearer to the exact result."""
    layer = make_layer(8, "int8")
    inputs = layer.inputs(1, 5)
    on_cpu, on_device = layer.compute(inputs, [Lane.HOST_CPU] * 2), layer.compute(inputs, [Lane.DEVICE_COPY] * 2)
    assert error(on_cpu, layer.expected(*inputs)) < 1e-6
    assert 1e-4 < error(on_device, on_cpu) < 0.03


@pytest.mark.parametrize("lanes", [[Lane.DEVICE_COPY] * 2, [Lane.HOST_CPU] * 2])
def test_a_lane_gives_the_same_bits_every_time(make_layer: Callable[..., Layer], lanes: list[Lane]) -> None:
    layer = make_layer(8)
    inputs = layer.inputs(1, 3)
    first = layer.compute(inputs, lanes)
    assert layer.tier.cache is not None
    assert_same_bits(layer.compute(inputs, lanes).numpy(), first.numpy())
    layer.tier.cache.clear()
    assert_same_bits(layer.compute(inputs, lanes).numpy(), first.numpy())


def test_a_hit_has_the_bits_of_a_copy_and_needs_no_lease(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(8)
    x, ids, weights = inputs = layer.inputs(6, 4)
    grouping = layer.grouping(ids)
    assert layer.device.missing(grouping.active).all()
    copied = layer.compute(inputs, [Lane.DEVICE_COPY] * len(grouping.active))
    assert not layer.device.missing(grouping.active).any()
    nothing = FixedLease(np.zeros(len(grouping.active), dtype=np.int64))
    assert_same_bits(layer.device.compute(layer.module, x, weights, grouping, nothing).numpy(), copied.numpy())
    stats = layer.tier.stats()
    assert stats.uses_by_lane["device-hit"] == stats.uses_by_lane["device-copy"] == len(grouping.active)
    assert stats.bytes_by_lane["device-hit"] == len(grouping.active) * layer.binding._layout.num_bytes
    assert stats.copies == stats.num_resident == len(grouping.active) and stats.evictions == stats.dropped == 0


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_budget_below_one_layer_is_enough(make_layer: Callable[..., Layer], num_slots: int) -> None:
    layer = make_layer(num_slots, lanes="device-copy")
    for seed in range(3):
        inputs = layer.inputs(20, seed)  # all eight experts
        assert error(layer.compute(inputs), layer.expected(*inputs)) < 2e-6
        assert layer.tier.cache is not None
        layer.tier.cache.validate()
    stats = layer.tier.stats()
    assert stats.num_slots == num_slots == stats.num_resident and stats.uses_by_lane["host-cpu"] == 0
    assert stats.copies - stats.evictions == num_slots


def test_without_a_budget_everything_is_computed_on_the_cpu(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(0)
    inputs = layer.inputs(20, 1)
    assert error(layer.compute(inputs), layer.expected(*inputs)) < 1e-6
    assert layer.device.missing(layer.grouping(inputs[1]).active).all()
    stats = layer.tier.stats()
    assert stats.num_slots == 0 and stats.uses_by_lane["host-cpu"] == 8 and stats.copies == 0


class MovingLease:
    """A lease on slots of an arena, by generation, as the hosts grant it."""

    def __init__(self, arena: Arena, slots: Ints) -> None:
        self.addresses = arena.addresses(slots)
        self._arena, self._slots = arena, slots
        self._generations = arena.generations[slots].copy()

    def is_valid(self) -> bool:
        return bool((self._arena.generations[self._slots] == self._generations).all())

    def release(self) -> None:
        pass


def load(arena: Arena, store: Store, expert: int) -> None:
    store.read_shard_into(ExpertKey(1, expert), arena.begin_write(expert, None))
    arena.end_write(expert, expert)


@pytest.fixture
def arena(demo: Store) -> Iterator[Arena]:
    """Layer 1 of the demonstration model."""
    made = Arena.create(8, 8, demo.manifest.slot_bytes)
    for expert in range(8):
        load(made, demo, expert)
    yield made
    made.close()


def test_what_was_copied_under_an_evicted_slot_is_never_used(
    make_layer: Callable[..., Layer], arena: Arena, demo: Store
) -> None:
    """The slot is overwritten before the lease is looked at again: the copy is dropped, the caller tries again."""
    layer = make_layer(8, lanes="device-copy")
    x, ids, weights = inputs = layer.inputs(1, 2)
    grouping = layer.grouping(ids)
    lease, victim = MovingLease(arena, grouping.active), int(grouping.active[0])

    def overwritten() -> bool:
        if arena.generations[victim] == 2:
            buffer = arena.begin_write(victim, victim)
            buffer[:] = bytes(len(buffer))
            arena.end_write(victim, None)
        return MovingLease.is_valid(lease)

    lease.is_valid = overwritten  # type: ignore[method-assign]
    layer.device.compute(layer.module, x, weights, grouping, lease)
    assert not lease.is_valid()
    assert layer.device.missing(grouping.active).all() and layer.tier.stats().dropped == 2
    load(arena, demo, victim)
    retried = MovingLease(arena, grouping.active)
    found = layer.device.compute(layer.module, x, weights, grouping, retried)
    assert retried.is_valid() and error(found, layer.expected(*inputs)) < 2e-6


def test_a_copy_that_no_layer_waited_for_is_dropped_if_its_slot_moved(
    make_layer: Callable[..., Layer], arena: Arena
) -> None:
    layer = make_layer(4)
    x, ids, weights = inputs = layer.inputs(1, 2)
    grouping = layer.grouping(ids)
    slow_link(layer)
    for _ in range(3):  # what is used more than once is worth keeping
        lease = MovingLease(arena, grouping.active)
        assert error(layer.device.compute(layer.module, x, weights, grouping, lease), layer.expected(*inputs)) < 2e-6
    assert layer.tier.cache is not None and layer.tier.stats().uses_by_lane["device-copy"] == 0
    assert layer.tier.stats().copies >= 1
    layer.tier.cache.clear()
    warmed = layer.device.missing(grouping.active)
    layer.device.compute(layer.module, x, weights, grouping, MovingLease(arena, grouping.active))
    assert warmed.all() and layer.tier.cache.is_copying
    for expert in grouping.active.tolist():
        arena.begin_write(expert, expert)
        arena.end_write(expert, None)
    layer.tier.cache.collect()
    assert layer.device.missing(grouping.active).all() and layer.tier.stats().dropped == 1


def slow_link(layer: Layer) -> None:
    """Copies that never pay by themselves, to a device that is faster than the CPU, whatever was measured."""
    for resource, byte_s in ((Resource.LINK, 1e-5), (Resource.CPU, 1e-9), (Resource.DEVICE, 1e-12)):
        layer.tier.rates.seed(resource, Rate(0.0, byte_s, 0.0), Rate(0.0, byte_s, 0.0))


def test_the_cache_warms_by_itself_until_nothing_is_missing(make_layer: Callable[..., Layer]) -> None:
    """No copy pays by itself, but experts that come again are copied beside the layers."""
    layer = make_layer(8)
    inputs = layer.inputs(3, 7)
    active = layer.grouping(inputs[1]).active
    slow_link(layer)
    for _ in range(2 * len(active)):
        slow_link(layer)
        assert error(layer.compute(inputs), layer.expected(*inputs)) < 2e-6
    assert not layer.device.missing(active).any()
    stats = layer.tier.stats()
    assert stats.uses_by_lane["device-copy"] == 0 < stats.uses_by_lane["device-hit"]


def test_rates_are_measured_while_it_runs(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(3)
    for seed in range(4):
        inputs = layer.inputs(20, seed)
        layer.compute(inputs, 4 * [Lane.DEVICE_COPY, Lane.HOST_CPU])
    rates = layer.tier.stats().rates
    assert rates["cpu"].num_observations >= 4 and rates["link"].num_observations >= 6
    assert rates["device"].num_observations >= 3 and rates["disk"].num_observations == 0
    layer.tier.rates.validate()


def test_a_calibration_loads_every_local_resource(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(2)
    shards = layer.source.fetch(1, np.arange(8)).take()[1].addresses
    calibrate(layer.tier.rates, layer.device.loads(layer.module, shards, torch.float32), seconds=0.0)
    rates = layer.tier.stats().rates
    assert [rate.name for rate in rates.resources if rate.num_observations] == ["cpu", "device", "link"]
    layer.tier.rates.validate()
    assert layer.tier.stats().copies == 0  # nothing of it stays


def test_the_device_fails_and_the_next_call_works(
    make_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(4)
    inputs = layer.inputs(20, 1)
    lanes = 4 * [Lane.DEVICE_COPY, Lane.HOST_CPU]
    with monkeypatch.context() as patch:
        patch.setattr("moray.runtime.device.compute.dequantize", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.compute(inputs, lanes)
    assert error(layer.compute(inputs, lanes), layer.expected(*inputs)) < 2e-6
    assert layer.tier.cache is not None
    layer.tier.cache.validate()


# ----------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("lanes", ["auto", "device-copy", "host-cpu"])
def test_text_is_the_same_with_any_lanes_and_a_few_slots(lanes: str, demo_float: Runner) -> None:
    prompt = list(demo_float.encode("def main(argv):\n"))
    expected = demo_float.logits(prompt)
    with runner(demo_store(), "float", device_slots=5, lanes=lanes) as made:
        assert (made.logits(prompt) - expected).abs().max() < 1e-3
        assert greedy(made, prompt, 8) == greedy(demo_float, prompt, 8)
        stats = made.device_stats()
    assert stats is not None and stats.num_slots == 5 and sum(stats.uses_by_lane.values()) > 100
    assert demo_float.device_stats() is None


@pytest.fixture(scope="module")
def demo_float() -> Iterator[Runner]:
    with runner(demo_store(), "float") as made:
        yield made


def test_layers_that_are_alike_are_warmed_up_once(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[DeviceExperts] = []
    monkeypatch.setattr(DeviceExperts, "warm_up", lambda self, module, dtype: warmed.append(self))
    model, source = load_model(demo, "float", CPU), InProcessSource(demo)
    tier = DeviceTier.of(demo.manifest, CPU, demo.manifest.slot_bytes)
    bind_experts(model, demo, source, "float", tier)
    assert len(expert_modules(model)) == 6 and len(warmed) == 1
    tier.close()
    source.close()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_families_with_biases_and_their_own_gates_in_mixed_lanes(family: str, store: Callable[..., Path]) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    path = store(family, "none")
    with runner(path, "float") as plain:
        expected = plain.logits(prompt)
    with runner(path, "float", device_slots=3) as made:
        for _, module in expert_modules(made.model):
            module.moray.device.compute = mixed(module.moray.device)  # type: ignore[union-attr]
        assert (made.logits(prompt) - expected).abs().max() < 1e-5
        stats = made.device_stats()
    assert stats is not None and stats.uses_by_lane["host-cpu"] > 0 and stats.copies > 0


def mixed(device: DeviceExperts) -> Callable[..., torch.Tensor]:
    """Every other expert on the CPU."""
    compute = device.compute

    def alternating(module: Any, x: torch.Tensor, weights: torch.Tensor, grouping: Any, lease: Any) -> torch.Tensor:
        lanes = [(Lane.DEVICE_COPY, Lane.HOST_CPU)[i % 2] for i in range(len(grouping.active))]
        return compute(module, x, weights, grouping, lease, lanes)

    return alternating


def test_a_gate_without_a_kernel_is_computed_by_the_module(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(8)
    device = layer.device
    device._parts = replace(device._parts, fused=None)
    inputs = layer.inputs(20, 3)
    for lanes in (8 * [Lane.HOST_CPU], 4 * [Lane.DEVICE_COPY, Lane.HOST_CPU]):
        assert error(layer.compute(inputs, lanes), layer.expected(*inputs)) < 2e-6
