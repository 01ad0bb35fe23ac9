"""compressed-tensors, as llm-compressor writes it: packed integers, int8, FP8 and MXFP4."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moray.runtime.convert.published import fp8, mxfp4
from moray.runtime.convert.published.headers import FLOATS, Headers
from moray.runtime.convert.published.weight import Grid, OnGrid, Published, Read, fields, groups_of_columns

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "mixed-precision"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedWeight(OnGrid):
    """codes int32 [R, C * bits / 32]; zeros int32 [R * bits / 32, G]; scales [R, G]; codes and zeros are biased."""

    def unpack(self, read: Read) -> Grid:
        columns = self.shape[1]
        codes_RC, scales_RG = fields(read("codes"), self.bits, dim=1), read("scales")
        middle = torch.full_like(scales_RG, 1 << (self.bits - 1), dtype=torch.uint8)
        zeros_RG = fields(read("zeros"), self.bits, dim=0)[: len(codes_RC)] if "zeros" in self.parts else middle
        order = read("order") if "order" in self.parts else None
        where = self.parts.get("order", self.parts["codes"])
        return Grid(
            codes_RC, scales_RG, zeros_RG, groups_of_columns(columns, self.group, scales_RG.shape[1], order, where)
        )


@dataclass(frozen=True, slots=True)
class Int8Weight(OnGrid):
    """codes int8 [R, C]; scales and zeros (int8) [R, G], or one of each for all rows."""

    def unpack(self, read: Read) -> Grid:
        signed_RC, scales, zeros = read("codes"), read("scales"), read("zeros") if "zeros" in self.parts else None
        rows, columns = signed_RC.shape
        groups = columns // self.group
        scales_RG = scales.reshape(-1, groups).expand(rows, -1)
        zeros_RG = torch.zeros_like(scales_RG) if zeros is None else zeros.reshape(-1, groups).expand(rows, -1)
        group_C = groups_of_columns(columns, self.group, groups, None, self.parts["codes"])
        return Grid(_biased(signed_RC), scales_RG, _biased(zeros_RG.to(torch.int8)), group_C)


def find(headers: Headers) -> Iterator[tuple[str, Published]]:
    """Name -> weight. Raises CheckpointError."""
    form = str(headers.settings.get("format") or "pack-quantized").lower()
    if form not in _FORMATS:
        raise headers.refusal("format", form, ", ".join(_FORMATS))
    schemes = _schemes(headers)
    for base in headers.bases(".weight_packed"):
        parts = headers.parts(base, codes="weight_packed", scales="weight_scale")
        if headers.tensors[parts["codes"]].dtype == "U8":
            if f"{base}.weight_global_scale" in headers.tensors:
                raise headers.refusal("format", form, "mxfp4-pack-quantized for 4-bit floats")
            yield f"{base}.weight", mxfp4.of_matrix(headers, parts, "U8")
        else:
            yield f"{base}.weight", _packed(headers, base, parts, schemes)
    block = next((scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")), None)
    for key, entry in headers.tensors.items():
        scales = f"{key}_scale"
        if entry.dtype in fp8.TYPES:
            headers.parts(key, "", codes="", scales="_scale")
            yield key, fp8.make_weight(headers, key, scales, block)
        elif entry.dtype == "I8" and scales in headers.tensors:
            yield key, _int8(headers, key, scales)


def _schemes(headers: Headers) -> list[Mapping[str, Any]]:
    """How weights are quantized, for each group of layers."""
    groups = headers.settings.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def _packed(headers: Headers, base: str, parts: dict[str, str], schemes: list[Mapping[str, Any]]) -> PackedWeight:
    integers = [scheme for scheme in schemes if scheme.get("type", "int") == "int"]
    sizes = {repr(scheme.get("num_bits")) for scheme in integers}
    if sizes not in ({"4"}, {"8"}):
        raise headers.refusal("num_bits", ", ".join(sorted(sizes)), "4 or 8, the same for all packed layers")
    bits = int(sizes.pop())
    if all(scheme.get("symmetric") is False for scheme in integers):
        parts |= headers.parts(base, codes="weight_packed", zeros="weight_zero_point")
    parts |= headers.optional(base, zeros="weight_zero_point", order="weight_g_idx", shape="weight_shape")
    rows, words = headers.matrix(parts["codes"], "I32")
    columns = words * 32 // bits
    scale_rows, groups = headers.matrix(parts["scales"], *FLOATS)
    if scale_rows != rows or columns % groups:
        raise headers.wrong(parts["scales"], [rows, f"a divisor of {columns}"])
    if "zeros" in parts:
        headers.expect(parts["zeros"], ("I32",), -(-rows * bits // 32), groups)
    if "order" in parts:
        headers.expect(parts["order"], ("I32", "I64"), columns)
    dtype = headers.scale_dtype(parts["scales"])
    is_reordered = "order" in parts and groups > 1
    return PackedWeight(parts, (rows, columns), dtype, bits, columns // groups, is_reordered)


def _int8(headers: Headers, key: str, scales: str) -> Int8Weight:
    parts = {"codes": key, "scales": scales}
    if f"{key}_zero_point" in headers.tensors:
        parts["zeros"] = f"{key}_zero_point"
    rows, columns = headers.matrix(key, "I8")
    shape = headers.shape(scales, *FLOATS)
    groups = shape[-1] if len(shape) > 1 else 1
    if math.prod(shape) not in (groups, rows * groups) or not groups or columns % groups:
        raise headers.wrong(scales, [rows, f"a divisor of {columns}"])
    if "zeros" in parts:
        headers.expect(parts["zeros"], ("I8",), *shape)
    return Int8Weight(parts, (rows, columns), headers.scale_dtype(scales), 8, columns // groups)


def _biased(signed: torch.Tensor) -> torch.Tensor:
    return signed.view(torch.uint8) ^ 128
