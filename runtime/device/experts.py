"""One MoE layer's experts on a device, beside its host's CPU.

    lanes for the active experts -> copies start -> the CPU computes its experts in place, in another thread ->
    the device computes hits, then copies as they arrive -> everything summed in the router's order

Class ``gpu-*``: the order of the sum is fixed, and a device hit has the bits of a device copy. An expert that the CPU
computes has the bits of the CPU's class instead (float32 activations, or int8), so results of different lanes agree
within tolerances and not bit for bit; ``lanes="device-copy"`` and ``"host-cpu"`` give the same bits every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import torch

from moray.runtime.arrays import Floats, Ints
from moray.runtime.device.cache import DeviceCache, Entry
from moray.runtime.device.compute import DeviceCompute, LayerCall, LayerParts, activate
from moray.runtime.device.tier import DeviceTier
from moray.runtime.device.transfer import bytes_at
from moray.runtime.experts.source import FixedLease, Lease
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import NO_BIASES, Grouping
from moray.runtime.lanes.calibrate import Load
from moray.runtime.lanes.cost import Work, choose
from moray.runtime.lanes.lane import Lane, Resource
from moray.runtime.layout.shard import ShardTensor

# Shapes: T tokens, K experts a token, P pairs, E active experts, H hidden.


class DeviceExperts:
    """Computes a layer's experts for hidden states on a device. Called by the step loop's thread."""

    def __init__(self, tier: DeviceTier, layer: int, parts: LayerParts) -> None:
        self._tier, self._layer, self._parts = tier, layer, parts
        self._first = tier.first_expert[layer]
        self._num_bytes = parts.layout.num_bytes
        self._on_device = DeviceCompute(parts, tier.device)

    def warm_up(self, module: Any, dtype: torch.dtype) -> None:
        """Compile what the layer needs on the device, before rates learn from how long its work takes."""
        if self._tier.cache is not None and self._tier.device.type != "cpu":
            self._on_device.warm_up(module, self._tier.cache.memory, dtype)

    def missing(self, active: Ints) -> Ints:
        """bool [E]: which experts are not on the device, and so must be leased for the next ``compute``."""
        if self._tier.cache is None:
            return np.ones(len(active), dtype=bool)
        return ~np.array(self._tier.cache.resident((active + self._first).tolist()), dtype=bool)

    def compute(
        self,
        module: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        grouping: Grouping,
        lease: Lease,
        lanes: Sequence[Lane] | None = None,
    ) -> torch.Tensor:
        """[T, H] on x's device and of its type: the weighted sum of the experts' outputs, in the router's order.

        ``lease.addresses`` int64 [E], 0 for experts that are not ``missing`` and not leased. It must hold during the
        call; afterwards the caller checks ``is_valid`` and, if it fails, drops the result and tries again.
        ``is_valid`` may be called until the next call, also after ``release``. ``lanes``: [E], for tests and
        measurements; else the cost model chooses, or what the tier forces.
        """
        tier, cache = self._tier, self._tier.cache
        call, warm = self._call(module, x_TH, grouping, lease), -1
        if cache is not None:
            cache.collect(call.experts)
        tier.observe()
        if lanes is None:
            chosen, warm = self._choose(call)
        else:
            chosen = list(lanes)
        self._run(call, chosen)
        if cache is not None:
            if warm >= 0 and not cache.is_copying:
                self._copy(cache, call, warm, concurrent=False)
            cache.tell_policy(call.experts)
        tier.record(self._layer, grouping.active, chosen, self._num_bytes)
        return _combine(call.y_PH, grouping, weights_TK).to(x_TH.dtype)

    def _call(self, module: Any, x_TH: torch.Tensor, grouping: Grouping, lease: Lease) -> LayerCall:
        num_pairs = len(grouping.token_of_pair)
        return LayerCall(
            module=module,
            x_TH=x_TH,
            grouping=grouping,
            starts=grouping.starts.tolist(),
            experts=(grouping.active + self._first).tolist(),
            addresses=lease.addresses.tolist(),
            is_valid=lease.is_valid,
            y_PH=torch.empty(num_pairs, x_TH.shape[1], device=x_TH.device, dtype=torch.float32),
        )

    def _choose(self, call: LayerCall) -> tuple[list[Lane], int]:
        """Lanes, and the index of an expert to copy beside them or -1."""
        tier = self._tier
        if tier.cache is None:
            return [Lane.HOST_CPU] * len(call.experts), -1
        resident = tier.cache.resident(call.experts)
        if tier.forced is not None:
            on_cpu = tier.forced is Lane.HOST_CPU
            zipped = zip(resident, call.addresses, strict=True)
            return [
                Lane.HOST_CPU if on_cpu and at else Lane.DEVICE_HIT if here else Lane.DEVICE_COPY for here, at in zipped
            ], -1
        work = []
        reuse = tier.reuse(self._layer, call.grouping.active)
        for i, (expert, here) in enumerate(zip(call.experts, resident, strict=True)):
            tokens = call.starts[i + 1] - call.starts[i]
            work.append(Work(expert, tokens, self._num_bytes, _open_lanes(here, call.addresses[i] != 0), reuse[i]))
        assignment = choose(work, tier.rates)
        return list(assignment.lanes), assignment.warm

    def loads(self, module: Any, shards: Ints, dtype: torch.dtype) -> dict[int, Load]:
        """What ``calibrate`` runs: kernels in place, computing on the device and copies, over leased ``shards`` [E].

        ``dtype``: of hidden states. Without a cache only the CPU has work to do here.
        """
        hidden, turns = self._parts.down_kernel.spec.rows, cycle(shards.tolist())

        def call_of(tokens: int) -> LayerCall:
            x = torch.randn(tokens, hidden).to(self._tier.device, dtype)
            pairs = np.arange(tokens)
            one = Grouping(np.zeros(1, dtype=np.int64), np.array([0, tokens]), pairs, pairs[:, None])
            return self._call(module, x, one, FixedLease(np.array([next(turns)])))

        def on_cpu(tokens: int) -> int:
            call = call_of(tokens)
            x = call.x_TH.float().cpu().numpy()
            self._compute_on_cpu(call, x, call.grouping, np.array(call.addresses))
            return self._num_bytes

        cache = self._tier.cache
        if cache is None:
            return {Resource.CPU: on_cpu}
        copied = torch.zeros(2, self._num_bytes, dtype=torch.uint8, device=self._tier.device)
        cache.trial(next(turns), copied[0])

        @torch.inference_mode()
        def on_device(tokens: int) -> int:
            call = call_of(tokens)
            self._on_device.compute(call, [0], copied[0], [0])
            call.y_PH[-1, -1].item()  # waits for it
            return self._num_bytes

        def on_link(tokens: int) -> int:
            cache.trial(next(turns), copied[1])
            return self._num_bytes

        return {Resource.CPU: on_cpu, Resource.DEVICE: on_device, Resource.LINK: on_link}

    # ----------------------------------------------------------------------------------- computing

    def _run(self, call: LayerCall, lanes: list[Lane]) -> None:
        """Fill ``call.y_PH``."""
        assert len(lanes) == len(call.experts)
        on_cpu = [i for i, lane in enumerate(lanes) if lane is Lane.HOST_CPU]
        on_device = [i for i, lane in enumerate(lanes) if lane is not Lane.HOST_CPU]
        helper: Future[tuple[Floats, float]] | None = None
        if on_cpu:
            part, pairs = _part_of(call.grouping, on_cpu)
            # Before the device is given its work, or this would wait for it.
            x = call.x_TH.float().cpu().contiguous().numpy()
            shards = np.array([call.addresses[i] for i in on_cpu], dtype=np.int64)
            helper = self._tier.helper.submit(self._compute_on_cpu, call, x, part, shards)
        try:
            if on_device:
                self._compute_on_device(call, on_device, concurrent=bool(on_cpu))
        finally:
            if helper is not None:
                helper.exception()  # wait: it reads the lease's memory
        if helper is not None:
            y, seconds = helper.result()
            is_concurrent = Lane.DEVICE_COPY in lanes
            num_bytes = len(on_cpu) * self._num_bytes
            self._tier.rates.observe(Resource.CPU, num_bytes, len(y), seconds, is_concurrent)
            y_device = torch.from_numpy(y).to(call.y_PH.device)
            if call.module.has_post_expert_norm:
                y_device = call.module.post_expert_norm(y_device.to(call.x_TH.dtype)).float()
            call.y_PH[torch.from_numpy(pairs).to(call.y_PH.device)] = y_device

    def _compute_on_device(self, call: LayerCall, indices: list[int], concurrent: bool) -> None:
        """Hits first, while copies are under way; then each copy when it is there. Waits for the ends of copies."""
        cache = self._tier.cache
        assert cache is not None, "a lane on the device needs --device-memory"
        resident = cache.resident([call.experts[i] for i in indices])
        hits = [i for i, here in zip(indices, resident, strict=True) if here]
        absent = deque(i for i, here in zip(indices, resident, strict=True) if not here)
        under_way: deque[tuple[int, Entry]] = deque()
        done: list[Entry] = []
        with cache.holding([call.experts[i] for i in hits]):
            self._start_copies(cache, call, absent, under_way, concurrent)
            if hits:
                self._compute_experts(cache, call, hits, is_timed=True)
        while under_way or absent:
            if not under_way:  # every slot has a shard of this call, or a copy that nobody waits for
                cache.collect()
                done.clear()
                self._start_copies(cache, call, absent, under_way, concurrent)
                assert under_way, "the policy gives no slot up"
            i, entry = under_way.popleft()
            assert entry.transfer is not None
            entry.transfer.join()
            self._compute_experts(cache, call, [i], is_timed=not hits and not done)
            done.append(entry)
        for entry in done:
            cache.settle(entry)

    def _start_copies(
        self,
        cache: DeviceCache,
        call: LayerCall,
        absent: deque[int],
        under_way: deque[tuple[int, Entry]],
        concurrent: bool,
    ) -> None:
        while absent:
            entry = self._copy(cache, call, absent[0], concurrent)
            if entry is None:
                return
            under_way.append((absent.popleft(), entry))

    def _copy(self, cache: DeviceCache, call: LayerCall, i: int, concurrent: bool) -> Entry | None:
        assert call.addresses[i], f"expert {call.experts[i]} is neither leased nor on the device"
        return cache.copy(call.experts[i], call.addresses[i], self._num_bytes, call.is_valid, concurrent)

    def _compute_experts(self, cache: DeviceCache, call: LayerCall, indices: list[int], is_timed: bool) -> None:
        # What is dequantized first costs more a byte, and decoding would be expected to cost that much.
        is_timed = is_timed and self._on_device.is_uniform(call, indices)
        if is_timed:
            self._tier.clock.start()
        self._on_device.compute(call, indices, cache.memory, [cache.offset(call.experts[i]) for i in indices])
        if is_timed:
            tokens = sum(call.starts[i + 1] - call.starts[i] for i in indices)
            self._tier.clock.stop(len(indices) * self._num_bytes, tokens)
        cache.used([call.experts[i] for i in indices])

    def _compute_on_cpu(self, call: LayerCall, x: Floats, part: Grouping, shards: Ints) -> tuple[Floats, float]:
        """In the helper's thread. float32 [pairs of ``part``, H], before a norm, and the seconds it took."""
        started = perf_counter()
        parts = self._parts
        up_at, down_at = shards + parts.up.offset, shards + parts.down.offset
        up_bias, down_bias = (
            NO_BIASES if bias is None else shards + bias.offset for bias in (parts.up_bias, parts.down_bias)
        )
        num_pairs = len(part.token_of_pair)
        if parts.fused is not None:
            y = np.empty((num_pairs, parts.down_kernel.spec.rows), dtype=np.float32)
            weights = np.ones((num_pairs, 1), dtype=np.float32)
            at = (x.ctypes.data, weights.ctypes.data, y.ctypes.data)
            ops.moe_layer_at(*at, part, parts.fused, up_at, down_at, up_bias, down_bias)
            return y, perf_counter() - started
        with torch.inference_mode():
            expert_of_pair = np.repeat(np.arange(len(shards)), np.diff(part.starts))
            up = torch.from_numpy(parts.up_kernel.matmul(x, up_at, part.starts, part.token_of_pair))
            if parts.up_bias is not None:
                up += _vectors_at(up_bias, parts.up_bias)[expert_of_pair]
            # The gate may have parameters of its own, and they are on the device.
            h = activate(call.module, up.to(call.x_TH.device)).cpu().contiguous()
            y = parts.down_kernel.matmul(h.numpy(), down_at, part.starts)
            if parts.down_bias is not None:
                y += _vectors_at(down_bias, parts.down_bias)[expert_of_pair].numpy()
        return y, perf_counter() - started


def _open_lanes(is_resident: bool, is_leased: bool) -> tuple[Lane, ...]:
    if not is_resident:
        return (Lane.DEVICE_COPY, Lane.HOST_CPU)
    return (Lane.DEVICE_HIT, Lane.HOST_CPU) if is_leased else (Lane.DEVICE_HIT,)


def _part_of(grouping: Grouping, indices: list[int]) -> tuple[Grouping, Ints]:
    """The pairs of some of the active experts as a grouping whose outputs are not summed, and their numbers."""
    ranges = [np.arange(grouping.starts[i], grouping.starts[i + 1]) for i in indices]
    pairs = np.concatenate(ranges)
    starts = np.concatenate([[0], np.cumsum([len(each) for each in ranges])]).astype(np.int64)
    positions = np.arange(len(pairs))[:, None]
    return Grouping(grouping.active[indices], starts, grouping.token_of_pair[pairs], positions), pairs


def _combine(y_PH: torch.Tensor, grouping: Grouping, weights_TK: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]: each token's pairs one after the other, as the router lists them."""
    positions = torch.from_numpy(grouping.positions).to(y_PH.device)
    weights = weights_TK.float() * (positions >= 0)
    y_TKH = y_PH[positions.clamp(min=0)]
    out = torch.zeros(y_TKH.shape[0], y_TKH.shape[2], device=y_PH.device)
    for k in range(weights.shape[1]):
        out.addcmul_(y_TKH[:, k], weights[:, k, None])
    return out


def _vectors_at(addresses: Ints, tensor: ShardTensor) -> torch.Tensor:
    """float32 [E, R] that lie where a lease says."""
    return torch.stack([bytes_at(at, tensor.num_bytes).view(torch.float32) for at in addresses.tolist()])
