"""The packed layout in plain torch operations, on any device: the lane of devices that have no tuned kernel yet.

Class ``gpu-*``: compared with the reference within tolerances, not bit for bit.
"""

from __future__ import annotations

import torch

from moray.runtime.layout.packed import PLANES, ROWS, SCALE_FACTOR, VECTOR_BYTES, PackedSpec

_PLAIN_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def dequantize(packed: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [num_bytes] -> [R, C] of ``dtype`` on the same device."""
    return _rows(packed.view(spec.num_blocks, spec.block_bytes), spec, dtype)[: spec.rows]


def dequantize_rows(packed: torch.Tensor, spec: PackedSpec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a packed matrix (an embedding): rows int64 [N] -> [N, C]."""
    blocks = packed.view(spec.num_blocks, spec.block_bytes)[rows // ROWS]
    lane = torch.arange(len(rows), device=rows.device) * ROWS + rows % ROWS
    return _rows(blocks, spec, dtype)[lane]


def _rows(blocks: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
    """[N, block_bytes] row blocks -> [N * 16, C]."""
    count = len(blocks)
    codes = blocks[:, : spec.code_bytes].reshape(count, -1, ROWS, 4)
    if not spec.is_quantized:
        values = codes.transpose(1, 2).reshape(count * ROWS, -1).view(_PLAIN_TYPES[spec.encoding])
        return values[:, : spec.columns].to(dtype)
    meta = blocks[:, spec.code_bytes :].reshape(count, spec.num_groups, VECTOR_BYTES).view(torch.float16)
    meta = meta.view(count, spec.num_groups, 2, ROWS).permute(2, 0, 3, 1).float()
    columns = _codes(codes.view(count, spec.num_groups, -1, ROWS, 4), spec)
    columns = columns.permute(0, 3, 1, 2, 4).reshape(count, ROWS, spec.num_groups, spec.group).float()
    weights = (columns - meta[1][..., None]) * (meta[0][..., None] * SCALE_FACTOR)
    return weights.view(count * ROWS, spec.columns).to(dtype)


def _codes(packed: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    """[N, G, vectors, 16, 4] packed -> [N, G, quads, 16, 4] codes (layout/packed.py: planes)."""
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
