"""The experts function: what transformers calls in place of its own experts, once per MoE layer.

Registered with transformers' experts interface under the name "moray". Each experts module carries an
``ExpertsBinding`` that knows its layer, its kernels and where its shards come from.

    group the (token, k) pairs by expert -> fetch the active experts' shards -> one kernel launch ->
    check the lease (again, if a slot changed under it) -> weighted sum, in the router's order

If some shards must come from elsewhere, those that are here are computed meanwhile, and the others as they arrive;
outputs of single experts wait in a buffer until all are there, and are then summed in the same order. What other
machines compute is sent to them first, and waits in the same buffer.
"""

from __future__ import annotations

import logging
from contextlib import closing
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from moray.runtime.arrays import Ints
from moray.runtime.device.compute import LayerParts, activate
from moray.runtime.device.experts import DeviceExperts
from moray.runtime.device.fetch import DeviceFetch
from moray.runtime.device.tier import DeviceTier
from moray.runtime.device.transfer import bytes_at
from moray.runtime.experts.fused import FusedExperts
from moray.runtime.experts.meter import ExpertsMeter
from moray.runtime.experts.pairs import Pairs
from moray.runtime.experts.source import Fetch, Lease, RemoteCall, ShardSource
from moray.runtime.experts.watch import LayerCall, LayerWatch
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import Grouping, MatrixKernel
from moray.runtime.kernels.ops_fused import RoutedKernel, routed_at
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ShardLayout, ShardTensor
from moray.runtime.model.expert_gates import fused_gate
from moray.runtime.model.router_modules import FusedRouter

IMPLEMENTATION = "moray"
_log = logging.getLogger(__name__)


class ExpertsBinding:
    """One MoE layer's experts: computes them on the device of the hidden states.

    Called by the step loop's thread only.
    """

    def __init__(
        self, module: nn.Module, layer: int, layout: ShardLayout, source: ShardSource, numerics: Numerics
    ) -> None:
        self.layer = layer
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.source = source
        self.meter: ExpertsMeter | None = None
        self.device: DeviceExperts | None = None
        self._layout = layout
        self._up = layout["gate_up_proj" if module.has_gate else "up_proj"]
        self._down = layout["down_proj"]
        self._up_bias = layout.get(self._up.name + "_bias")
        self._down_bias = layout.get("down_proj_bias")
        assert self._up.spec is not None and self._down.spec is not None
        self._up_kernel = MatrixKernel.of(self._up.spec, numerics)
        self._down_kernel = MatrixKernel.of(self._down.spec, numerics)
        gate = fused_gate(module)
        self._fused = None if gate is None else FusedExperts.of(layout, numerics, gate)
        if gate is None and source.remote is not None:
            _log.info("MoE layer %d has a gate that is not fused: computed on this node alone", layer)
        self.watch: LayerWatch | None = None
        self._is_announced = False  # ``watch`` has seen the present input
        self._used: Ints = np.zeros(1 + 2 * self.num_experts, dtype=np.int64)

    def forward(self, module: Any, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        started = perf_counter()
        grouping = ops.group_by_expert(ids_TK.cpu().numpy(), self.num_experts)
        grouped = perf_counter()
        call, elsewhere = self._begin_remote(x_TH, grouping), None
        if call is None:
            fetch = self._fetch(grouping.active)
            self._announce(x_TH)
            out, waited_s = self._compute_as_they_come(module, x_TH, weights_TK, grouping, fetch)
            missed = [] if self.watch is None else fetch.missed.tolist()
        else:
            with closing(call):
                self._announce(x_TH)
                out, waited_s, missed = self._compute_beside(module, x_TH, weights_TK, grouping, call)
                elsewhere = grouping.active[call.elsewhere]
        times = waited_s, perf_counter() - grouped - waited_s
        if self.meter is not None:
            self.meter.record(self.layer, grouping, grouped - started, *times, elsewhere)
        if self.watch is not None:
            active, tokens = grouping.active.tolist(), np.diff(grouping.starts).tolist()
            num_bytes = len(missed) * self._layout.num_bytes
            self.watch.after(LayerCall(self.layer, len(x_TH), active, tokens, missed, num_bytes, *times))
        return out

    def _begin_remote(self, x_TH: torch.Tensor, grouping: Grouping) -> RemoteCall | None:
        """Let other machines begin with what they are to compute."""
        remote = self.source.remote
        if remote is None or self._fused is None or self.device is not None:
            return None
        return remote.begin(self.layer, grouping, x_TH.contiguous().numpy(), self._fused.kernel.gate)

    def _fetch(self, active: Ints) -> Fetch:
        if self.device is None:
            return self.source.fetch(self.layer, active)
        return DeviceFetch(self.source, self.layer, active, self.device.missing)

    def _compute_as_they_come(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, fetch: Fetch
    ) -> tuple[torch.Tensor, float]:
        """The layer's output, and the seconds spent waiting for shards."""
        pairs, waited_s = Pairs(grouping, x_TH), 0.0
        while not fetch.is_over:
            asked = perf_counter()
            here, lease = fetch.take()
            waited_s += perf_counter() - asked
            if len(here) == len(grouping.active):
                out = self._compute(module, x_TH, weights_TK, grouping, lease)
                if lease.is_valid():
                    fetch.finish(here)
                    return out, waited_s
            elif self._compute_part(module, x_TH, pairs, here, lease):
                fetch.finish(here)
        return pairs.combine(weights_TK), waited_s

    def _compute_beside(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, call: RemoteCall
    ) -> tuple[torch.Tensor, float, list[int]]:
        """The layer's output with what other machines compute, the seconds spent waiting, and what was missed here."""
        pairs, waited_s, here = Pairs(grouping, x_TH), 0.0, call.here
        missed: list[int] = []
        while True:
            if len(here):
                waited_s += self._compute_here(module, x_TH, pairs, grouping, here, call, missed)
            if call.is_over:
                return pairs.combine(weights_TK), waited_s, missed
            asked = perf_counter()
            arrived, here = call.take()
            waited_s += perf_counter() - asked
            for rows, y_PH in arrived:
                pairs.put(rows, y_PH)

    def _compute_here(
        self, module: Any, x_TH: torch.Tensor, pairs: Pairs, grouping: Grouping, positions: Ints, call: RemoteCall,
        missed: list[int],
    ) -> float:  # fmt: skip
        """Some of the layer's experts, by their positions in the list of active ones. Returns the seconds waited."""
        fetch, waited_s = self._fetch(grouping.active[positions]), 0.0
        missed += fetch.missed.tolist()
        started = perf_counter()
        while not fetch.is_over:
            asked = perf_counter()
            here, lease = fetch.take()
            waited_s += perf_counter() - asked
            if self._compute_part(module, x_TH, pairs, positions[here], lease):
                fetch.finish(here)
        counts = np.diff(grouping.starts)[positions]
        call.note_computed(len(positions), int(counts.sum()), perf_counter() - started - waited_s)
        if len(fetch.missed):
            call.note_loaded(len(fetch.missed), waited_s)
        return waited_s

    def _compute_part(self, module: Any, x_TH: torch.Tensor, pairs: Pairs, positions: Ints, lease: Lease) -> bool:
        """Keep the outputs of some of the active experts, or False if their lease did not hold."""
        part, ones = pairs.part(positions)
        if self._fused is not None and self.device is None:  # straight to where it belongs
            x_TH = x_TH.contiguous()
            at = (x_TH.data_ptr(), ones.data_ptr(), pairs.y_PH.ctypes.data)
            self._fused.compute_at(*at, part, lease.addresses, pairs.rows)
            return lease.is_valid()
        y_PH = self._compute(module, x_TH, ones, part, lease)
        if not lease.is_valid():
            return False
        pairs.keep(y_PH)
        return True

    def routed_kernel(self, router: FusedRouter) -> RoutedKernel | None:
        """For ``compute_routed``; None if the gate is not fused, or a device has a part in it."""
        if self._fused is None or self.device is not None:
            return None
        biases = [-1 if bias is None else bias.offset for bias in (self._up_bias, self._down_bias)]
        routing = [router.weight_at, router.bias_at, router.kind, router.num_experts, router.top_k]
        fields = [*routing, self._up.offset, self._down.offset, *biases, self._layout.num_bytes]
        return RoutedKernel(np.array(fields, dtype=np.int64), router.kernel, self._fused.kernel)

    def compute_routed(self, kernel: RoutedKernel, module: Any, x_TH: torch.Tensor) -> torch.Tensor | None:
        """experts(x, router(x)) for float32 on the CPU, or None if the experts are not to be computed in one call."""
        table = self.source.table(self.layer)
        if table is None or self.meter is None:
            return None
        self._announce(x_TH)
        count, used, out_TH = len(x_TH), self._used, torch.empty_like(x_TH)
        ids_TK, weights_TK = torch.empty(count, kernel.top_k, dtype=torch.int64), torch.empty(count, kernel.top_k)
        at = (x_TH.data_ptr(), count, (ids_TK.data_ptr(), weights_TK.data_ptr()), out_TH.data_ptr())
        started = perf_counter()
        done = self.meter.time_routed(
            self.layer, used, lambda counts, times: routed_at(kernel, table.columns, counts, *at, times, used)
        )
        if not done:
            self._is_announced = True
            return self.forward(module, x_TH, ids_TK, weights_TK)
        if self.watch is not None:
            number, first = int(used[0]), 1 + self.num_experts
            active, tokens = used[1 : 1 + number].tolist(), used[first : first + number].tolist()
            self.watch.after(LayerCall(self.layer, count, active, tokens, (), 0, 0.0, perf_counter() - started))
        return out_TH

    def _announce(self, x: torch.Tensor) -> None:
        """Let the next layers' experts be predicted from this layer's input, once."""
        if self.watch is not None and not self._is_announced:
            self.watch.before(self.layer, x.reshape(-1, x.shape[-1]))
        self._is_announced = False

    def _compute(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, lease: Lease
    ) -> torch.Tensor:
        if self.device is not None:
            return self.device.compute(module, x_TH, weights_TK, grouping, lease)
        shards_E = lease.addresses
        x_TH, weights_TK = x_TH.contiguous(), weights_TK.float().contiguous()
        if self._fused is not None:
            out_TH = x_TH.new_empty(len(weights_TK), x_TH.shape[1])
            at = (x_TH.data_ptr(), weights_TK.data_ptr(), out_TH.data_ptr())
            self._fused.compute_at(*at, grouping, shards_E)
            return out_TH
        up_at, down_at = shards_E + self._up.offset, shards_E + self._down.offset
        x, weights = x_TH.numpy(), weights_TK.numpy()
        experts_of_pair = np.repeat(np.arange(len(grouping.active)), np.diff(grouping.starts))
        up = torch.from_numpy(self._up_kernel.matmul(x, up_at, grouping.starts, grouping.token_of_pair))
        h = activate(module, up + self._biases(self._up_bias, shards_E)[experts_of_pair])
        y = self._down_kernel.matmul(h.contiguous().numpy(), down_at, grouping.starts)
        y_PH = torch.from_numpy(y) + self._biases(self._down_bias, shards_E)[experts_of_pair]
        if module.has_post_expert_norm:
            y_PH = module.post_expert_norm(y_PH)
        return torch.from_numpy(ops.combine(y_PH.contiguous().numpy(), grouping, weights))

    def use_device(self, tier: DeviceTier) -> DeviceExperts:
        """From now on some experts are computed on a device, or all of them."""
        parts = LayerParts(
            self._layout, self._up, self._down, self._up_bias, self._down_bias, self._up_kernel, self._down_kernel,
            None if self._fused is None else self._fused.kernel,
        )  # fmt: skip
        self.device = DeviceExperts(tier, self.layer, parts)
        return self.device

    def _biases(self, bias: ShardTensor | None, shards_E: Ints) -> torch.Tensor:
        """float32 [E, R], or zeros [E, 1] that broadcast."""
        if bias is None:
            return torch.zeros(len(shards_E), 1)
        rows = [bytes_at(a + bias.offset, bias.num_bytes).view(torch.float32) for a in shards_E.tolist()]
        return torch.stack(rows)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Called by transformers: hidden [T, H], ids int64 [T, K], weights [T, K] -> [T, H]."""
    out: torch.Tensor = module.moray.forward(module, hidden_states, top_k_index, top_k_weights)
    return out


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
