"""A layer's experts on a device, from shards that lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moray.runtime.device.kernels import FEW, Pairs, TritonKernels, dequantize, kernels_for
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.layout.shard import ShardLayout, ShardTensor

# Shapes: T tokens, P pairs, H hidden, R rows.


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer's shards hold, and the CPU's kernels for it. ``fused``: None if the gate has no kernel."""

    layout: ShardLayout
    up: ShardTensor
    down: ShardTensor
    up_bias: ShardTensor | None
    down_bias: ShardTensor | None
    up_kernel: MatrixKernel
    down_kernel: MatrixKernel
    fused: LayerKernel | None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call: its inputs, and where the outputs of the pairs go."""

    module: Any
    x_TH: torch.Tensor
    grouping: Grouping
    starts: list[int]
    experts: list[int]  # numbers over all layers
    addresses: list[int]  # 0 where nothing is leased
    is_valid: Callable[[], bool]
    y_PH: torch.Tensor  # float32

    def num_tokens(self, i: int) -> int:
        """Of the active expert i."""
        return self.starts[i + 1] - self.starts[i]


class DeviceCompute:
    """One layer's. An expert's own number of tokens decides how it is computed, so a pair has the same bits in company
    and alone.
    """

    def __init__(self, parts: LayerParts, device: torch.device) -> None:
        assert parts.up.spec is not None and parts.down.spec is not None
        self._parts, self._up, self._down = parts, parts.up.spec, parts.down.spec
        is_quantized = self._up.is_quantized and self._down.is_quantized
        self._kernels: TritonKernels | None = kernels_for(device) if is_quantized else None

    def is_uniform(self, call: LayerCall, indices: list[int]) -> bool:
        """Whether these experts are all computed as those of a decoded token are."""
        return self._kernels is None or all(call.num_tokens(i) <= FEW for i in indices)

    def compute(self, call: LayerCall, indices: list[int], memory: torch.Tensor, offsets: list[int]) -> None:
        """Fill ``call.y_PH`` for some active experts, whose shards lie at ``offsets`` of ``memory``, uint8."""
        few = []
        for i, offset in zip(indices, offsets, strict=True):
            if self._kernels is not None and call.num_tokens(i) <= FEW:
                few.append((i, offset))
            else:
                self._compute_dequantized(call, i, memory[offset : offset + self._parts.layout.num_bytes])
        if self._kernels is not None and few:
            self._compute_packed(self._kernels, call, few, memory)

    @torch.inference_mode()
    def warm_up(self, module: Any, memory: torch.Tensor, dtype: torch.dtype) -> None:
        """Compile what the layer needs, which rates must not learn from. ``memory``: uint8, at least a shard of it."""
        for tokens in (1, 2, FEW + 1):
            x_TH = torch.zeros(tokens, self._down.rows, dtype=dtype, device=memory.device)
            pairs = np.arange(tokens)
            grouping = Grouping(np.zeros(1, dtype=np.int64), np.array([0, tokens]), pairs, pairs[:, None])
            call = LayerCall(module, x_TH, grouping, [0, tokens], [0], [0], lambda: True, x_TH.float())
            self.compute(call, [0], memory, [0])

    def _compute_packed(
        self, kernels: TritonKernels, call: LayerCall, experts: list[tuple[int, int]], memory: torch.Tensor
    ) -> None:
        """Experts with few tokens each, all at once. ``experts``: (index, offset)."""
        parts, module, x_TH = self._parts, call.module, call.x_TH.contiguous()
        ranges = [range(call.starts[i], call.starts[i + 1]) for i, _ in experts]
        places = [pair for each in ranges for pair in each]
        pairs, (tokens, order, places_P) = Pairs.of(
            [offset for _, offset in experts], [len(each) for each in ranges], x_TH.device,
            call.grouping.token_of_pair[places].tolist(), list(range(len(places))), places,
        )  # fmt: skip
        up = x_TH.new_empty(len(places), self._up.rows)
        kernels.matmul(memory, self._up, _place(parts.up, parts.up_bias), pairs, x_TH, tokens, up, order)
        h = activate(module, up).to(x_TH.dtype).contiguous()
        at = _place(parts.down, parts.down_bias)
        if module.has_post_expert_norm:
            y = x_TH.new_empty(len(places), self._down.rows)
            kernels.matmul(memory, self._down, at, pairs, h, order, y, order)
            call.y_PH[places_P] = module.post_expert_norm(y).float()
        else:
            kernels.matmul(memory, self._down, at, pairs, h, order, call.y_PH, places_P)

    def _compute_dequantized(self, call: LayerCall, i: int, shard: torch.Tensor) -> None:
        """Dequantize one expert and use torch's matrix products."""
        parts, module, dtype = self._parts, call.module, call.x_TH.dtype
        pairs = slice(call.starts[i], call.starts[i + 1])
        tokens = torch.from_numpy(call.grouping.token_of_pair[pairs]).to(call.x_TH.device)
        up = call.x_TH[tokens] @ _matrix(shard, parts.up, dtype).T
        if parts.up_bias is not None:
            up = up + _vector(shard, parts.up_bias, dtype)
        y = activate(module, up) @ _matrix(shard, parts.down, dtype).T
        if parts.down_bias is not None:
            y = y + _vector(shard, parts.down_bias, dtype)
        call.y_PH[pairs] = (module.post_expert_norm(y) if module.has_post_expert_norm else y).float()


def activate(module: Any, up: torch.Tensor) -> torch.Tensor:
    """The module's own gate or activation, [P, R] -> [P, I]."""
    h: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return h


def _place(matrix: ShardTensor, bias: ShardTensor | None) -> tuple[int, int | None]:
    return matrix.offset, None if bias is None else bias.offset


def _matrix(shard: torch.Tensor, tensor: ShardTensor, dtype: torch.dtype) -> torch.Tensor:
    assert tensor.spec is not None
    return dequantize(shard[tensor.offset : tensor.offset + tensor.num_bytes], tensor.spec, dtype)


def _vector(shard: torch.Tensor, tensor: ShardTensor, dtype: torch.dtype) -> torch.Tensor:
    return shard[tensor.offset : tensor.offset + tensor.num_bytes].view(torch.float32).to(dtype)
