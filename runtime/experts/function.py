"""The experts function: what transformers calls in place of its own experts, once per MoE layer.

Registered with transformers' experts interface under the name "moray". Each experts module carries an
``ExpertsBinding`` that knows its layer, its kernels and where its shards come from.

    group the (token, k) pairs by expert -> lease the active experts' shards -> one kernel launch ->
    check the lease (retry if a slot changed under it) -> weighted sum, in the router's order
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from moray.runtime.device.experts import DeviceExperts, LayerParts
from moray.runtime.device.tier import DeviceTier
from moray.runtime.device.transfer import bytes_at
from moray.runtime.experts.meter import ExpertsMeter
from moray.runtime.experts.source import ExpertSource, Ints, Lease
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import NO_BIASES, Grouping, LayerKernel, MatrixKernel
from moray.runtime.kernels.ops_fused import RoutedKernel, routed_at
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ShardLayout, ShardTensor
from moray.runtime.model.expert_gates import fused_gate
from moray.runtime.model.router_modules import FusedRouter

IMPLEMENTATION = "moray"


class ExpertsBinding:
    """One MoE layer's experts: computes them on the device of the hidden states.

    Called by the step loop's thread only.
    """

    def __init__(
        self, module: nn.Module, layer: int, layout: ShardLayout, source: ExpertSource, numerics: Numerics
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
        self._fused = None if gate is None else LayerKernel(self._up_kernel, self._down_kernel, gate)

    def forward(self, module: Any, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        started = perf_counter()
        grouping = ops.group_by_expert(ids_TK.cpu().numpy(), self.num_experts)
        while True:
            grouped = perf_counter()
            lease = self.source.lease(self.layer, grouping.active)
            leased = perf_counter()
            try:
                out = self._compute(module, x_TH, weights_TK, grouping, lease)
                valid = lease.is_valid()
            finally:
                lease.release()
            if valid:
                break
        if self.meter is not None:
            self.meter.record(self.layer, grouping, grouped - started, leased - grouped, perf_counter() - leased)
        return out

    def routed_kernel(self, router: FusedRouter) -> RoutedKernel | None:
        """For ``compute_routed``; None if the gate is not fused, or a device has a part in it."""
        if self._fused is None or self.device is not None:
            return None
        biases = [-1 if bias is None else bias.offset for bias in (self._up_bias, self._down_bias)]
        routing = [router.weight_at, router.bias_at, router.kind, router.num_experts, router.top_k]
        fields = [*routing, self._up.offset, self._down.offset, *biases, self._layout.num_bytes]
        return RoutedKernel(np.array(fields, dtype=np.int64), router.kernel, self._fused)

    def compute_routed(self, kernel: RoutedKernel, x: torch.Tensor, out: torch.Tensor) -> bool:
        """out = experts(x, router(x)) for float32 on the CPU, or False if some expert must be leased first."""
        table = self.source.table(self.layer)
        if table is None or self.meter is None:
            return False
        count = x.numel() // kernel.router.spec.columns
        leases = (table.addresses, table.counters, table.generations)
        at = (x.data_ptr(), count, out.data_ptr())
        return self.meter.time_routed(self.layer, lambda counts, times: routed_at(kernel, leases, counts, *at, times))

    def _compute(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, lease: Lease
    ) -> torch.Tensor:
        if self.device is not None:
            return self.device.compute(module, x_TH, weights_TK, grouping, lease)
        shards_E = lease.addresses
        x_TH, weights_TK = x_TH.contiguous(), weights_TK.float().contiguous()
        up_at, down_at = shards_E + self._up.offset, shards_E + self._down.offset
        if self._fused is not None:
            out_TH = torch.empty_like(x_TH)
            at = (x_TH.data_ptr(), weights_TK.data_ptr(), out_TH.data_ptr())
            biases = (
                NO_BIASES if bias is None else shards_E + bias.offset for bias in (self._up_bias, self._down_bias)
            )
            ops.moe_layer_at(*at, grouping, self._fused, up_at, down_at, *biases)
            return out_TH
        x, weights = x_TH.numpy(), weights_TK.numpy()
        experts_of_pair = np.repeat(np.arange(len(grouping.active)), np.diff(grouping.starts))
        up = torch.from_numpy(self._up_kernel.matmul(x, up_at, grouping.starts, grouping.token_of_pair))
        h = self._activate(module, up + self._biases(self._up_bias, shards_E)[experts_of_pair])
        y = self._down_kernel.matmul(h.contiguous().numpy(), down_at, grouping.starts)
        y_PH = torch.from_numpy(y) + self._biases(self._down_bias, shards_E)[experts_of_pair]
        if module.has_post_expert_norm:
            y_PH = module.post_expert_norm(y_PH)
        return torch.from_numpy(ops.combine(y_PH.contiguous().numpy(), grouping, weights))

    def use_device(self, tier: DeviceTier) -> None:
        """From now on some experts are computed on a device, or all of them."""
        parts = LayerParts(
            self._layout, self._up, self._down, self._up_bias, self._down_bias, self._up_kernel, self._down_kernel,
            self._fused,
        )  # fmt: skip
        self.device = DeviceExperts(tier, self.layer, parts)

    def _activate(self, module: Any, up: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return h

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
