"""A layer's attention with random weights: moray's kernels, and the same in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from moray.runtime.arrays import Ints
from moray.runtime.kernels import attention, ops_fused
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.ops_fused import AttentionKernel, attention_at, batch_attention_at, prompt_attention_at
from moray.runtime.layout.packed import PackedSpec, pack_plain

Tensor = torch.Tensor


def plain(matrix: Tensor) -> tuple[Tensor, PackedSpec]:
    spec = PackedSpec(*matrix.shape, "f32")
    return torch.from_numpy(pack_plain(matrix.numpy(), spec)), spec


class Attention:
    """A random layer's attention over keys and values [V, N, D], whose last tokens are written; x float32 [T, C]."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        columns: int,
        *,
        rotary: int | None = None,
        has_norms: bool = True,
        has_biases: bool = True,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.dim, self.rotary = heads, kv_heads, dim, rotary or dim
        sizes = (heads, kv_heads, kv_heads)
        self.weights = [torch.randn(n * dim, columns) / columns**0.5 for n in sizes]
        self.biases = [torch.randn(n * dim) * has_biases for n in sizes]
        self.norms = [torch.randn(dim) for _ in range(2)] if has_norms else []
        self.output = torch.randn(columns, heads * dim) / (heads * dim) ** 0.5
        self.output_bias = torch.randn(columns) * has_biases
        self.around = [torch.randn(columns) for _ in range(2)]
        self._packed = [plain(w)[0] for w in self.weights]
        self._packed_output, output_spec = plain(self.output)
        fields = np.zeros(attention.NUM_FIELDS, dtype=np.int64)
        fields[:5] = heads, kv_heads, dim, bits(dim**-0.5), bits(1e-6)
        if has_norms:
            fields[5:7] = [norm.data_ptr() for norm in self.norms]
        if has_biases:
            fields[7:11] = [bias.data_ptr() for bias in (*self.biases, self.output_bias)]
        part = PackedSpec(kv_heads * dim, columns, "f32")
        queries = [self._packed[0].data_ptr() + part.num_bytes * i for i in range(heads // kv_heads)]
        parts = np.array([*queries, *(packed.data_ptr() for packed in self._packed[1:])], dtype=np.int64)
        made = [MatrixKernel.of(spec, "float") for spec in (plain(self.weights[0])[1], part, output_spec)]
        self.kernel = AttentionKernel(fields, made[0], made[1], parts, made[2], self._packed_output.data_ptr())
        self.rotations = torch.rand(2, 1000, self.rotary)  # cosines and sines of each position

    def fused(self, x: Tensor, keys: Tensor, values: Tensor, is_layer: bool = False) -> list[Tensor]:
        """attended [T, H * D], y and, of a layer, z."""
        tokens, length = len(x), keys.shape[1]
        out = [torch.empty(tokens, self.heads * self.dim), torch.empty_like(x), torch.empty_like(x)]
        cosines, sines = self.rotations[:, length - tokens : length]
        at = (
            x.data_ptr(),
            (cosines.data_ptr(), sines.data_ptr(), self.rotary),
            (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(0)),
            length,
            (out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr()),
            self._around() if is_layer else ops_fused.NO_NORMS,
        )
        if tokens == 1:
            attention_at(self.kernel, *at)
        else:
            prompt_attention_at(self.kernel, *at, tokens)
        return out if is_layer else out[:2]

    def batched(self, x: Tensor, caches: list[tuple[Tensor, int]], is_layer: bool = False) -> list[Tensor]:
        """``fused`` of rows: each has keys and values [2, V, ., D] and how many tokens of them it sees, itself last."""
        out = [torch.empty(len(x), self.heads * self.dim), torch.empty_like(x), torch.empty_like(x)]
        cosines, sines = self.rotations[:, [length - 1 for _, length in caches]]
        rows = [(*(part.data_ptr() for part in cache), 4 * cache.stride(1), length) for cache, length in caches]
        batch_attention_at(
            self.kernel,
            x.data_ptr(),
            (cosines.data_ptr(), sines.data_ptr(), self.rotary),
            np.array(rows, dtype=np.int64),
            (out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr()),
            self._around() if is_layer else ops_fused.NO_NORMS,
        )
        return out if is_layer else out[:2]

    def _around(self) -> Ints:
        return np.array([*(n.data_ptr() for n in self.around), bits(1e-5), bits(1e-6)])

    def stock(self, x: Tensor, keys: Tensor, values: Tensor, is_layer: bool = False) -> list[Tensor]:
        """The same with torch in float64, scores and softmax written out."""
        tokens, length = len(x), keys.shape[1]
        residual = x = x.double()
        if is_layer:
            x = F.rms_norm(x, x.shape[-1:], self.around[0].double(), 1e-5)
        q, k, v = (
            (x @ w.T.double() + b).view(tokens, -1, self.dim) for w, b in zip(self.weights, self.biases, strict=True)
        )
        if self.norms:
            q, k = (F.rms_norm(h, (self.dim,), n.double(), 1e-6) for h, n in zip((q, k), self.norms, strict=True))
        q, k = (self._turned(h, length) for h in (q, k))
        keys[:, -tokens:], values[:, -tokens:] = k.transpose(0, 1), v.transpose(0, 1)
        attended = attend(q, keys.double(), values.double()).flatten(1)
        y = attended @ self.output.T.double() + self.output_bias + (residual if is_layer else 0)
        out = [attended, y, F.rms_norm(y, y.shape[-1:], self.around[1].double(), 1e-6)]
        return [part.float() for part in (out if is_layer else out[:2])]

    def _turned(self, heads: Tensor, length: int) -> Tensor:
        cosines, sines = self.rotations[:, length - len(heads) : length, None].double()
        turning, rest = heads[..., : self.rotary], heads[..., self.rotary :]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat([turning * cosines + torch.cat([-second, first], dim=-1) * sines, rest], dim=-1)


def attend(queries_THD: Tensor, keys_VND: Tensor, values_VND: Tensor) -> Tensor:
    """[T, H, D]: each of the last T tokens sees itself and all before it."""
    (tokens, heads, dim), (kv_heads, length, _) = queries_THD.shape, keys_VND.shape
    keys, values = (cached.repeat_interleave(heads // kv_heads, dim=0) for cached in (keys_VND, values_VND))
    scores = queries_THD.transpose(0, 1) @ keys.transpose(1, 2) * dim**-0.5
    hidden = torch.ones(tokens, length, dtype=torch.bool).triu(length - tokens + 1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
