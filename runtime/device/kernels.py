"""Products with matrices in the packed layout on a device: Triton kernels where they run, else plain torch.

Few tokens (decoding) are bound by the bytes of the weights: a kernel reads them once, as they are packed, for all
experts of a layer. Many (prompts) are bound by arithmetic: a matrix is dequantized once and multiplied by torch.

Triton comes with torch's CUDA builds. Before a device's first use its kernels are tried on a small matrix; if they
cannot be compiled there, or compute something else than torch does, torch computes, and the log says why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moray.runtime.kernels import dequantize as plain
from moray.runtime.layout.packed import PLANES, ROWS, VECTOR_BYTES, Meta, PackedSpec

#: Tokens of one matrix that are computed from the packed weights.
FEW = 16

DEQUANTIZE_TILE = 32  # vectors of codes in a program

_AT_ONCE = 8  # tokens of a program; more take several, and read the weights again
_BLOCKS_AT_ONCE = 64  # that torch dequantizes, which takes a multiple of the result in between
_METAS: dict[Meta, int] = {"f16": 0, "u8": 1, "e8m0": 2}
_PROBE = PackedSpec(48, 128, "q4", 64)
_TOLERANCE = 1e-2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which tokens meet which matrices: of matrix m the ``counts[m]`` pairs from ``starts[m]`` on. On the device.

    ``offsets``: of what holds the matrices, in bytes. int64 [M]; pairs are split so that counts are at most 8.
    """

    offsets: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    is_single: bool  # one pair for each

    @classmethod
    def of(
        cls, offsets: list[int], counts: list[int], device: torch.device, *rows: list[int]
    ) -> tuple[Pairs, list[torch.Tensor]]:
        """And ``rows``, lists of one number a pair, on the device: all in one copy."""
        parts = []
        for offset, count, start in zip(offsets, counts, accumulate(counts, initial=0), strict=False):
            parts += [(offset, start + i, min(_AT_ONCE, count - i)) for i in range(0, count, _AT_ONCE)]
        columns = [*map(list, zip(*parts, strict=True)), *rows]
        # Each begins at a multiple of 16 bytes, else Triton compiles once more for those that do not.
        padded = [column + len(column) % 2 * [0] for column in columns]
        flat = torch.tensor([number for column in padded for number in column], dtype=torch.int64).to(device)
        split = flat.split([len(column) for column in padded])
        found = [part[: len(column)] for part, column in zip(split, columns, strict=True)]
        return cls(found[0], found[1], found[2], max(columns[2]) == 1), found[3:]


class TritonKernels:
    """Launches them. ``kernels``: the module triton_kernels."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def matmul(
        self, memory: torch.Tensor, spec: PackedSpec, at: tuple[int, int | None], pairs: Pairs,
        x: torch.Tensor, x_rows: torch.Tensor, y: torch.Tensor, y_rows: torch.Tensor,
    ) -> None:  # fmt: skip
        """y[y_rows[p]] = W x[x_rows[p]] + b for all pairs p, W and b those of its matrix.

        ``at``: of W and b (None: no bias) behind the offset of each matrix in ``memory``. x contiguous [., C], bfloat16
        or float16; y contiguous [., R] of any float type.
        """
        assert x.is_contiguous() and y.is_contiguous() and x.element_size() == 2
        self._kernels.matmul_few[(spec.num_blocks, len(pairs.offsets))](
            memory, pairs.offsets, pairs.starts, pairs.counts, x, x_rows, y, y_rows,
            at[0], at[1] or 0, *_sizes(spec), **constants(spec),
            HAS_BIAS=at[1] is not None, IS_SINGLE=pairs.is_single,
        )  # fmt: skip

    def dequantize(self, packed: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
        """[R, C]."""
        out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=packed.device)
        vectors = spec.columns * PLANES[spec.encoding][0] // 32
        grid = (spec.num_blocks, -(-vectors // DEQUANTIZE_TILE))
        self._kernels.dequantize[grid](packed, out, *_sizes(spec), **constants(spec), TILE=DEQUANTIZE_TILE)
        return out


def kernels_for(device: torch.device) -> TritonKernels | None:
    """What computes with packed matrices there; None: torch dequantizes them."""
    return _find_kernels(device) if device.type == "cuda" else None


def dequantize(packed: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [num_bytes] -> [R, C] of ``dtype`` on the same device, with little memory besides."""
    kernels = kernels_for(packed.device) if spec.is_quantized else None
    if kernels is not None:
        return kernels.dequantize(packed, spec, dtype)
    out = torch.empty(spec.rows, spec.columns, dtype=dtype, device=packed.device)
    blocks = packed.view(spec.num_blocks, spec.block_bytes).split(_BLOCKS_AT_ONCE)
    for part, rows in zip(blocks, out.split(_BLOCKS_AT_ONCE * ROWS), strict=True):
        rows.copy_(plain.dequantize(part.reshape(-1), replace(spec, rows=len(rows)), dtype))
    return out


def linear(x: torch.Tensor, packed: torch.Tensor, spec: PackedSpec, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ W^T + b: [..., C] -> [..., R]."""
    num_rows = x.numel() // spec.columns
    kernels = kernels_for(x.device) if spec.is_quantized and x.element_size() == 2 else None
    if kernels is None or not 1 <= num_rows <= FEW:
        return torch.nn.functional.linear(x, dequantize(packed, spec, x.dtype), bias)
    pairs, rows = _single_matrix(num_rows, x.device)
    y = x.new_empty(*x.shape[:-1], spec.rows)
    kernels.matmul(packed, spec, (0, None), pairs, x.contiguous(), rows, y, rows)
    return y if bias is None else y.add_(bias)


def _sizes(spec: PackedSpec) -> tuple[int, ...]:
    return spec.rows, spec.columns, spec.num_groups, spec.code_bytes, spec.block_bytes


def constants(spec: PackedSpec) -> dict[str, Any]:
    """What the kernels are compiled for."""
    bits, *high = PLANES[spec.encoding]
    is_fp4 = spec.encoding == "fp4"
    return {"GROUP": spec.group, "BITS": bits, "HIGH": len(high), "IS_FP4": is_fp4, "META": _METAS[spec.meta]}


@lru_cache(maxsize=2 * FEW)
def _single_matrix(num_rows: int, device: torch.device) -> tuple[Pairs, torch.Tensor]:
    pairs, (rows,) = Pairs.of([0], [num_rows], device, list(range(num_rows)))
    return pairs, rows


def why_not(device: torch.device) -> str | None:
    """Why a device has no Triton kernels; None if it has."""
    found = _try_kernels(device)
    return found if isinstance(found, str) else None


@lru_cache
def _find_kernels(device: torch.device) -> TritonKernels | None:
    found = _try_kernels(device)
    if isinstance(found, TritonKernels):
        return found
    _log.warning("no Triton kernels on %s, torch dequantizes experts there, which is slow: %.500s", device, found)
    return None


def _try_kernels(device: torch.device) -> TritonKernels | str:
    try:
        from moray.runtime.device import triton_kernels

        found = TritonKernels(triton_kernels)
        error = probe(found, device)
    except Exception as failure:  # whatever a compiler for some device may raise
        return f"{type(failure).__name__}: {failure}"
    return found if error <= _TOLERANCE else f"a product with a small matrix was off by {error:.2g}"


@torch.inference_mode()
def probe(kernels: TritonKernels, device: torch.device) -> float:
    """Relative error of both kernels, by a small matrix that torch dequantizes."""
    random = np.random.default_rng(0)
    bytes_ = random.integers(0, 256, (_PROBE.num_blocks, _PROBE.block_bytes), dtype=np.uint8)
    halves = random.uniform(0.5, 2, (_PROBE.num_blocks, _PROBE.num_groups * VECTOR_BYTES // 2)).astype(np.float16)
    bytes_[:, _PROBE.code_bytes :] = halves.view(np.uint8)
    packed = torch.from_numpy(bytes_.reshape(-1)).to(device)
    expected = plain.dequantize(packed, _PROBE, torch.float32)
    x = torch.from_numpy(random.standard_normal((3, _PROBE.columns), dtype=np.float32)).to(device, torch.float16)
    y = torch.empty(3, _PROBE.rows, device=device)
    pairs, (rows,) = Pairs.of([0], [3], device, [0, 1, 2])
    kernels.matmul(packed, _PROBE, (0, None), pairs, x, rows, y, rows)
    found = kernels.dequantize(packed, _PROBE, torch.float32)
    return max(_error(found, expected), _error(y, x.float() @ expected.T))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
