"""What the layers' experts on a device share: the cache, the rates, and how often each expert is used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch

from moray.runtime.arrays import Bools, Floats, Ints
from moray.runtime.device.cache import DeviceCache
from moray.runtime.device.stats import DeviceStats
from moray.runtime.lanes.lane import AUTO, Lane, Resource, parse_lanes
from moray.runtime.lanes.rates import Rates
from moray.runtime.residency.policies.lru import LRU
from moray.runtime.residency.policy import Policy
from moray.runtime.store.manifest import Manifest

_HEAT_STEP = 1 / 32  # weight of a layer's newest call in how often its experts are used
_KEPT_CALLS = 32  # calls of its layer for which a shard is expected to stay


def default_budget(manifest: Manifest, device: torch.device) -> int:
    """Bytes for experts on a GPU where nobody says: half of what is free now, 0 if that is less than one expert."""
    half: int = torch.cuda.mem_get_info(device)[0] // 2
    return half if half >= manifest.slot_bytes else 0


class DeviceTier:
    """One for an engine. Used by the step loop's thread."""

    def __init__(
        self, cache: DeviceCache | None, device: torch.device, rates: Rates, layer_sizes: list[int], lanes: str = AUTO
    ) -> None:
        """``cache`` None: no shard is ever on the device. ``lanes``: see ``parse_lanes``; raises ConfigError."""
        self.cache, self.device, self.rates = cache, device, rates
        self.forced = Lane.HOST_CPU if cache is None else parse_lanes(lanes)
        self.first_expert = np.concatenate([[0], np.cumsum(layer_sizes)]).tolist()
        self.helper = ThreadPoolExecutor(1, "moray-host-lane")  # waits for the CPU's kernels
        self.clock = CudaClock(device) if device.type == "cuda" else PlainClock()
        self._heat: Floats = np.zeros(self.first_expert[-1], dtype=np.float32)
        self._uses, self._bytes = [0] * len(Lane), [0] * len(Lane)

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        device: torch.device,
        budget_bytes: int,
        lanes: str = AUTO,
        policy: Policy | None = None,
    ) -> DeviceTier:
        """For a store; a budget of 0 is none. ``policy``: global LRU if None. Raises ConfigError, ResourceError."""
        sizes = [layer.num_experts for layer in manifest.layers]
        parse_lanes(lanes)
        cache = None
        if budget_bytes:
            policy = LRU() if policy is None else policy
            cache = DeviceCache(device, budget_bytes, manifest.slot_bytes, sum(sizes), policy)
        return cls(cache, device, Rates(), sizes, lanes)

    def reuse(self, layer: int, active: Ints) -> list[float]:
        """How often each of a layer's experts is expected to be used again while it would be kept."""
        found: list[float] = (_KEPT_CALLS * self._heat[active + self.first_expert[layer]]).tolist()
        return found

    def record(self, layer: int, active: Ints, lanes: list[Lane], shard_bytes: int) -> None:
        """Count a layer call."""
        heat = self._heat[self.first_expert[layer] : self.first_expert[layer + 1]]
        heat *= 1 - _HEAT_STEP
        heat[active] += _HEAT_STEP
        for lane in lanes:
            self._uses[lane] += 1
            self._bytes[lane] += shard_bytes

    def observe(self) -> None:
        """Learn from what is done."""
        if self.cache is not None:
            for num_bytes, seconds, concurrent in self.cache.take_link_times():
                self.rates.observe(Resource.LINK, num_bytes, 0, seconds, concurrent)
        for num_bytes, tokens, seconds in self.clock.take():
            self.rates.observe(Resource.DEVICE, num_bytes, tokens, seconds, concurrent=False)

    def stats(self) -> DeviceStats:
        cache = self.cache
        names = [lane.name.lower().replace("_", "-") for lane in Lane]
        return DeviceStats(
            device=str(self.device),
            num_slots=cache.num_slots if cache else 0,
            num_resident=cache.num_resident if cache else 0,
            slot_bytes=cache.slot_bytes if cache else 0,
            uses_by_lane=dict(zip(names, self._uses, strict=True)),
            bytes_by_lane=dict(zip(names, self._bytes, strict=True)),
            copies=cache.counts.copies if cache else 0,
            evictions=cache.counts.evictions if cache else 0,
            dropped=cache.counts.dropped if cache else 0,
            rates=self.rates.snapshot(),
        )

    def resident(self) -> list[Bools] | None:
        """bool [E] of each layer: experts on the device; None if none ever is. From any thread, while copies go on."""
        cache = self.cache
        if cache is None:
            return None
        return [np.array(cache.resident(range(a, b)), dtype=np.bool_) for a, b in pairwise(self.first_expert)]

    def close(self) -> None:
        """Wait for what still reads the arenas. Call it before the source is closed."""
        self.helper.shutdown()
        if self.cache is not None:
            self.cache.close()


class PlainClock:
    """How long the device computed, where a call returns when it is done."""

    def __init__(self) -> None:
        self._started = 0.0
        self._done: list[tuple[int, int, float]] = []

    def start(self) -> None:
        self._started = perf_counter()

    def stop(self, num_bytes: int, tokens: int) -> None:
        self._done.append((num_bytes, tokens, perf_counter() - self._started))

    def take(self) -> list[tuple[int, int, float]]:
        """Bytes, tokens and seconds of what is done, once."""
        done, self._done = self._done, []
        return done


class CudaClock:
    """How long the device computed: read later, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: Any = None
        self._pending: list[tuple[int, int, Any, Any]] = []

    def start(self) -> None:
        self._started = self._event()

    def stop(self, num_bytes: int, tokens: int) -> None:
        self._pending.append((num_bytes, tokens, self._started, self._event()))

    def take(self) -> list[tuple[int, int, float]]:
        done = [work for work in self._pending if work[3].query()]
        self._pending = self._pending[len(done) :]  # a stream ends them in order
        return [(num_bytes, tokens, 1e-3 * begin.elapsed_time(end)) for num_bytes, tokens, begin, end in done]

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
