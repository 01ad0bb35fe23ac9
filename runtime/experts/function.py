"""The experts function: what transformers calls in place of its own experts, once per MoE layer.

Registered with transformers' experts interface under the name "moray". Each experts module carries an
``ExpertsBinding`` that knows its layer, its kernels and where its shards come from.

    group the (token, k) pairs by expert -> fetch the active experts' shards -> one kernel launch ->
    check the lease (again, if a slot changed under it) -> weighted sum, in the router's order

If some shards must come from elsewhere, those that are here are computed meanwhile, and the others as they arrive;
outputs of single experts wait in a buffer until all are there, and are then summed in the same order.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from moray.runtime.experts.meter import ExpertsMeter
from moray.runtime.experts.source import Fetch, Ints, ShardSource
from moray.runtime.experts.watch import LayerCall, LayerWatch
from moray.runtime.kernels import ops
from moray.runtime.kernels.dequantize import dequantize
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
        self, module: nn.Module, layer: int, layout: ShardLayout, source: ShardSource, numerics: Numerics
    ) -> None:
        self.layer = layer
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.source = source
        self.meter: ExpertsMeter | None = None
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
        self.watch: LayerWatch | None = None
        self._is_announced = False  # ``watch`` has seen the present input
        self._used: Ints = np.zeros(1 + 2 * self.num_experts, dtype=np.int64)

    def forward(self, module: Any, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        started = perf_counter()
        grouping = ops.group_by_expert(ids_TK.cpu().numpy(), self.num_experts)
        grouped = perf_counter()
        fetch = self.source.fetch(self.layer, grouping.active)
        self._announce(x_TH)
        out, waited_s = self._compute_as_they_come(module, x_TH, weights_TK, grouping, fetch)
        if self.meter is not None:
            self.meter.record(self.layer, grouping, grouped - started, waited_s, perf_counter() - grouped - waited_s)
        if self.watch is not None:
            active, tokens = grouping.active.tolist(), np.diff(grouping.starts).tolist()
            times = waited_s, perf_counter() - grouped - waited_s
            missed, num_bytes = fetch.missed.tolist(), len(fetch.missed) * self._layout.num_bytes
            self.watch.after(LayerCall(self.layer, len(x_TH), active, tokens, missed, num_bytes, *times))
        return out

    def _compute_as_they_come(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, fetch: Fetch
    ) -> tuple[torch.Tensor, float]:
        """The layer's output, and the seconds spent waiting for shards."""
        pairs, waited_s = _Pairs(grouping, x_TH), 0.0
        while not fetch.is_over:
            asked = perf_counter()
            here, lease = fetch.take()
            waited_s += perf_counter() - asked
            if len(here) == len(grouping.active):
                out = self._compute(module, x_TH, weights_TK, grouping, lease.addresses)
                if lease.is_valid():
                    fetch.finish(here)
                    return out, waited_s
                continue
            part, ones = pairs.part(here)
            y_PH = self._compute(module, x_TH, ones, part, lease.addresses)
            if lease.is_valid():
                pairs.keep(y_PH)
                fetch.finish(here)
        return pairs.combine(weights_TK), waited_s

    def routed_kernel(self, router: FusedRouter) -> RoutedKernel | None:
        """For ``compute_routed``; None if the gate is not fused."""
        if self._fused is None:
            return None
        biases = [-1 if bias is None else bias.offset for bias in (self._up_bias, self._down_bias)]
        routing = [router.weight_at, router.bias_at, router.kind, router.num_experts, router.top_k]
        fields = [*routing, self._up.offset, self._down.offset, *biases, self._layout.num_bytes]
        return RoutedKernel(np.array(fields, dtype=np.int64), router.kernel, self._fused)

    def compute_routed(self, kernel: RoutedKernel, x: torch.Tensor, out: torch.Tensor) -> bool:
        """out = experts(x, router(x)) for float32 on the CPU, or False if some expert must be fetched first."""
        table = self.source.table(self.layer)
        if table is None or self.meter is None:
            return False
        self._announce(x)
        count = x.numel() // kernel.router.spec.columns
        leases = (table.addresses, table.counters, table.generations)
        at, used = (x.data_ptr(), count, out.data_ptr()), self._used
        started = perf_counter()
        done = self.meter.time_routed(
            self.layer, used, lambda counts, times: routed_at(kernel, leases, counts, *at, times, used)
        )
        self._is_announced = not done
        if done and self.watch is not None:
            number, first = int(used[0]), 1 + self.num_experts
            active, tokens = used[1 : 1 + number].tolist(), used[first : first + number].tolist()
            self.watch.after(LayerCall(self.layer, count, active, tokens, (), 0, 0.0, perf_counter() - started))
        return done

    def _announce(self, x: torch.Tensor) -> None:
        """Let the next layers' experts be predicted from this layer's input, once."""
        if self.watch is not None and not self._is_announced:
            self.watch.before(self.layer, x.reshape(-1, x.shape[-1]))
        self._is_announced = False

    def _compute(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, shards_E: Ints
    ) -> torch.Tensor:
        if x_TH.device.type != "cpu":
            return self._on_device(module, x_TH, weights_TK, grouping, shards_E)
        x_TH, weights_TK = x_TH.contiguous(), weights_TK.float().contiguous()
        up_at, down_at = shards_E + self._up.offset, shards_E + self._down.offset
        if self._fused is not None:
            out_TH = x_TH.new_empty(len(weights_TK), x_TH.shape[1])
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

    def _on_device(
        self, module: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, grouping: Grouping, shards_E: Ints
    ) -> torch.Tensor:
        """Copy each active shard to the device, dequantize it there and use torch's matrix products."""
        device, dtype = x_TH.device, x_TH.dtype
        up_biases, down_biases = (
            self._biases(self._up_bias, shards_E),
            self._biases(self._down_bias, shards_E),
        )
        token_of_pair = torch.from_numpy(grouping.token_of_pair).to(device)
        y_PH = torch.empty(len(token_of_pair), x_TH.shape[1], device=device, dtype=torch.float32)
        for i, address in enumerate(shards_E.tolist()):
            shard = _bytes_at(address, self._layout.num_bytes).to(device)
            pairs = slice(int(grouping.starts[i]), int(grouping.starts[i + 1]))
            up = x_TH[token_of_pair[pairs]] @ _matrix(shard, self._up, dtype).T
            h = self._activate(module, up + up_biases[i].to(device, dtype))
            y = h @ _matrix(shard, self._down, dtype).T + down_biases[i].to(device, dtype)
            y_PH[pairs] = (module.post_expert_norm(y) if module.has_post_expert_norm else y).float()
        positions = torch.from_numpy(grouping.positions).to(device)
        used = (positions >= 0)[..., None]
        y_TKH = y_PH[positions.clamp(min=0)] * weights_TK.float()[..., None]
        return (y_TKH * used).sum(dim=1).to(dtype)

    def _activate(self, module: Any, up: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return h

    def _biases(self, bias: ShardTensor | None, shards_E: Ints) -> torch.Tensor:
        """float32 [E, R], or zeros [E, 1] that broadcast."""
        if bias is None:
            return torch.zeros(len(shards_E), 1)
        rows = [_bytes_at(a + bias.offset, bias.num_bytes).view(torch.float32) for a in shards_E.tolist()]
        return torch.stack(rows)


class _Pairs:
    """Outputs of a layer's (token, expert) pairs, unweighted, collected until all are there."""

    def __init__(self, grouping: Grouping, x_TH: torch.Tensor) -> None:
        self._grouping, self._like = grouping, x_TH
        self._rows: Ints = np.empty(0, dtype=np.int64)

    @cached_property
    def _counts(self) -> Ints:
        return np.diff(self._grouping.starts)

    @cached_property
    def _expert_of_pair(self) -> Ints:
        return np.repeat(np.arange(len(self._grouping.active)), self._counts)

    @cached_property
    def _y_PH(self) -> npt.NDArray[np.float32]:
        return np.empty((len(self._grouping.token_of_pair), self._like.shape[1]), dtype=np.float32)

    def part(self, experts: Ints) -> tuple[Grouping, torch.Tensor]:
        """A grouping of some experts' pairs alone, whose output is one row a pair, and its weights: ones.

        ``experts``: sorted positions in the list of active ones.
        """
        whole = self._grouping
        is_mine = np.zeros(len(whole.active), dtype=np.bool_)
        is_mine[experts] = True
        self._rows = np.flatnonzero(is_mine[self._expert_of_pair])
        starts = np.zeros(len(experts) + 1, dtype=np.int64)
        np.cumsum(self._counts[experts], out=starts[1:])
        positions = np.arange(len(self._rows), dtype=np.int64)[:, None]
        ones = torch.ones(len(self._rows), 1, dtype=torch.float32, device=self._like.device)
        return Grouping(whole.active[experts], starts, whole.token_of_pair[self._rows], positions), ones

    def keep(self, y_PH: torch.Tensor) -> None:
        """What was computed of the last ``part``."""
        self._y_PH[self._rows] = y_PH.to("cpu", torch.float32).numpy()

    def combine(self, weights_TK: torch.Tensor) -> torch.Tensor:
        weights = weights_TK.cpu().float().contiguous().numpy()
        return torch.from_numpy(ops.combine(self._y_PH, self._grouping, weights)).to(self._like)


def _bytes_at(address: int, count: int) -> torch.Tensor:
    """uint8 [count] over memory that a lease keeps alive."""
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address)))


def _matrix(shard: torch.Tensor, tensor: ShardTensor, dtype: torch.dtype) -> torch.Tensor:
    assert tensor.spec is not None
    return dequantize(shard[tensor.offset : tensor.offset + tensor.num_bytes], tensor.spec, dtype)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Called by transformers: hidden [T, H], ids int64 [T, K], weights [T, K] -> [T, H]."""
    out: torch.Tensor = module.moray.forward(module, hidden_states, top_k_index, top_k_weights)
    return out


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
