"""The packed layout in plain torch operations, on any device: rows of embeddings, and devices without Triton kernels.

Class ``gpu-*``: compared with the reference within tolerances, not bit for bit.
"""

from __future__ import annotations

import torch

from moray.runtime.layout import fp4, second_level
from moray.runtime.layout.packed import PLANES, ROWS, SCALE_FACTOR, VECTOR_BYTES, PackedSpec

_PLAIN_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def dequantize(packed: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [num_bytes] -> [R, C] of ``dtype`` on the same device."""
    blocks = packed.view(spec.num_blocks, spec.block_bytes)
    codes = blocks[:, : spec.code_bytes].unflatten(1, (-1, ROWS, 4))
    values = _values(codes, *_meta(blocks[:, spec.code_bytes :], spec), spec)
    return values.flatten(0, 1)[: spec.rows].to(dtype)


def dequantize_rows(packed: torch.Tensor, spec: PackedSpec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a packed matrix (an embedding): rows int64 [N] -> [N, C]."""
    blocks = packed.view(spec.num_blocks, spec.block_bytes)[rows // ROWS]
    each, lane = torch.arange(len(rows), device=rows.device), rows % ROWS
    codes = blocks[:, : spec.code_bytes].unflatten(1, (-1, ROWS, 4))[each, :, lane].unsqueeze(2)
    scales, zeros = (part[each, lane].unsqueeze(1) for part in _meta(blocks[:, spec.code_bytes :], spec))
    return _values(codes, scales, zeros, spec).squeeze(1).to(dtype)


def _values(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    """Vectors [N, V, L, 4] of L lanes and their scales and zeros [N, L, G] -> [N, L, C]."""
    count, lanes = len(codes), codes.shape[2]
    if not spec.is_quantized:
        return codes.transpose(1, 2).reshape(count, lanes, -1).view(_PLAIN_TYPES[spec.encoding])[..., : spec.columns]
    quads = _codes(codes.unflatten(1, (spec.num_groups, -1)), spec)
    columns = quads.permute(0, 3, 1, 2, 4).reshape(count, lanes, spec.num_groups, spec.group)
    if spec.encoding == "fp4":
        doubles = torch.tensor(fp4.DOUBLES, device=columns.device)
        return (doubles[columns.long()] * scales[..., None]).flatten(2)
    columns = columns.float()
    return ((columns - zeros[..., None]) * scales[..., None]).flatten(2)


def _meta(data: torch.Tensor, spec: PackedSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, meta_bytes] -> float32 scales and zeros [N, 16, G]."""
    count, groups = len(data), spec.num_groups
    if groups == 0:
        nothing = torch.empty(count, ROWS, 0, device=data.device)
        return nothing, nothing
    if spec.meta == "f16":
        halves = data.reshape(count, groups, VECTOR_BYTES).view(torch.float16).view(count, groups, 2, ROWS)
        scales, zeros = halves.permute(2, 0, 3, 1).float()
        return scales * SCALE_FACTOR, zeros
    if spec.meta == "e8m0":
        exponents = data[:, : ROWS * groups].reshape(count, groups, ROWS).transpose(1, 2)
        powers = (exponents.int() << 23).view(torch.float32) * 0.5  # as fp4.decode
        return powers, torch.full_like(powers, fp4.ZERO)
    supers = second_level.num_supers(groups)
    end = 2 * ROWS * groups
    codes = data[:, :end].reshape(count, groups, 2, ROWS).permute(2, 0, 3, 1).float()
    shared = data[:, end : end + 2 * ROWS * supers].reshape(count, supers, 2 * ROWS).view(torch.float16)
    shared = shared.transpose(1, 2).float().repeat_interleave(second_level.GROUPS, dim=2)[..., :groups]
    scales = codes[0] * shared * second_level.SUPER_FACTOR
    return scales, codes[1] * second_level.zero_step(spec.bits) + second_level.lowest_zero(spec.bits)


def _codes(packed: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    """[N, G, vectors, L, 4] packed -> [N, G, quads, L, 4] codes (layout/packed.py: planes)."""
    codes, first, shift = None, 0, 0
    for bits in PLANES[spec.encoding]:
        vectors = spec.group * bits // 32
        plane = packed[:, :, first : first + vectors]
        fields = [(plane >> (bits * f)) & ((1 << bits) - 1) for f in range(8 // bits)]
        part = torch.cat(fields, dim=2) << shift
        codes = part if codes is None else codes | part
        first, shift = first + vectors, shift + bits
    assert codes is not None
    return codes
