"""One piece of a store: which tensors it holds, how they are encoded, and its bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from moray.runtime.arrays import Bytes
from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.keep import keep, plan_kept
from moray.runtime.convert.quantize import block_rows, quantize_rows
from moray.runtime.convert.recipe import Scheme
from moray.runtime.convert.sources import ModelShapes, Source, realize
from moray.runtime.errors import CheckpointError
from moray.runtime.layout.packed import (
    ROWS,
    Encoding,
    PackedSpec,
    choose_group,
    pack_plain,
    pack_quantized,
)
from moray.runtime.layout.shard import ExpertKey, ShardLayout, build_shard

_ROWS_AT_ONCE = 2048  # of a matrix, about: what is packed in one go
_CHECKED = 16 << 20  # values that are looked through for NaN at once
_PLAIN: dict[torch.dtype, Encoding] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of a piece: packed as ``spec`` says, or (``spec`` None) its plain values in ``dtype``."""

    name: str
    source: Source
    spec: PackedSpec | None
    dtype: torch.dtype
    transpose: bool = False
    kept: bool = False  # the checkpoint's codes


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a store's file that is made and written at once: a shard, or one tensor of the trunk."""

    file: str
    offset: int
    num_bytes: int
    label: str  # for people
    tensors: tuple[TensorPlan, ...]
    shard: tuple[ExpertKey, ShardLayout] | None = None

    @property
    def name(self) -> str:
        return f"{self.file}:{self.offset}"


def choose_spec(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, sources: Sequence[Source], checkpoint: Checkpoint
) -> tuple[PackedSpec, bool, str | None]:
    """How a matrix is packed under a scheme, whether the codes are the checkpoint's, and a note if that is not what
    the scheme says. ``sources``: of all matrices that must be packed alike."""
    rows, columns = shape
    source = sources[0]
    if dtype not in _PLAIN:
        raise CheckpointError(
            f"{source.target}, made from {source.keys[0]}, has dtype {dtype}, expected float32, bfloat16 or float16"
        )
    where = f"{re.sub(r'[0-9]+', '*', source.target)} ({rows} x {columns})"
    if scheme.bits is None:
        keys = [key for other in sources for key in other.keys] if scheme.keep else []
        spec, why = plan_kept(keys, shape, checkpoint)
        if spec and any(other.merges for other in sources):
            spec, why = None, "an adapter is merged into it, dequantized"
        if spec:
            return spec, True, None
        return (
            PackedSpec(rows, columns, _PLAIN[dtype]),
            False,
            f"{where}: {why}, kept as {_PLAIN[dtype]}" if why else None,
        )
    group = choose_group(scheme.group, columns, scheme.bits)
    if group == 0:
        encoding: Encoding = "f16" if dtype == torch.float16 else "bf16"
        return PackedSpec(rows, columns, encoding), False, f"{where}: no group divides its rows, kept as {encoding}"
    note = None if group == scheme.group else f"{where}: group {group} instead of {scheme.group}"
    return PackedSpec(rows, columns, scheme.encoding, group, scheme.meta), False, note


def encode_piece(piece: Piece, checkpoint: Checkpoint, shapes: ModelShapes) -> Bytes:
    """Read, convert and pack one piece. Raises CheckpointError (NaN, Inf or out of float16's range)."""
    data: dict[str, Bytes] = {}
    for plan in piece.tensors:
        if plan.kept:
            assert plan.spec is not None
            data[plan.name] = keep(plan.source, plan.spec, plan.transpose, checkpoint, shapes)
        else:
            data[plan.name] = _encode(realize(plan.source, checkpoint.read, shapes), plan)
    if piece.shard is not None:
        return build_shard(*piece.shard, data)
    (only,) = data.values()
    return only


def _encode(tensor: torch.Tensor, plan: TensorPlan) -> Bytes:
    if tensor.is_floating_point() and not all(
        torch.isfinite(part).all() for part in tensor.reshape(-1).split(_CHECKED)
    ):
        raise CheckpointError(
            f"{_origin(plan)} holds NaN or infinite values; the checkpoint is damaged, download it again"
        )
    if plan.spec is None:
        return _raw_bytes(tensor.to(plan.dtype))
    matrix = tensor.reshape(tensor.shape[-2:])
    packed, at = np.empty(plan.spec.num_bytes, dtype=np.uint8), 0
    for part in (matrix.T if plan.transpose else matrix).split(rows_at_once(plan.spec.columns)):
        data = _pack(part.contiguous(), plan, replace(plan.spec, rows=len(part)))
        packed[at : at + len(data)] = data
        at += len(data)
    assert at == len(packed)
    return packed


def rows_at_once(columns: int) -> int:
    """Rows of a matrix that are packed in one go: it bounds the copies. Whole blocks of the layout and of HQQ."""
    least = math.lcm(ROWS, block_rows(columns))
    return least * max(1, _ROWS_AT_ONCE // least)


def _pack(matrix: torch.Tensor, plan: TensorPlan, spec: PackedSpec) -> Bytes:
    if not spec.is_quantized:
        return pack_plain(_plain_array(matrix, spec.encoding), spec)
    try:
        return pack_quantized(quantize_rows(matrix, spec.bits, spec.group, spec.meta), spec)
    except OverflowError as error:
        raise CheckpointError(
            f"{_origin(plan)} has weights too large for {spec.encoding} ({error}); keep this component with `none`"
        ) from error


def _plain_array(matrix: torch.Tensor, encoding: Encoding) -> npt.NDArray[np.generic]:
    if encoding == "bf16":
        words: npt.NDArray[np.generic] = matrix.to(torch.bfloat16).view(torch.uint16).numpy()
        return words
    wanted = torch.float16 if encoding == "f16" else torch.float32
    values: npt.NDArray[np.generic] = matrix.to(wanted).numpy()
    return values


def _raw_bytes(tensor: torch.Tensor) -> Bytes:
    flat = tensor.contiguous().reshape(-1)
    data: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)
    return data


def _origin(plan: TensorPlan) -> str:
    keys = plan.source.keys
    more = f" (or {', '.join(keys[1:4])})" if len(keys) > 1 else ""
    expert = "" if plan.source.expert is None else f", expert {plan.source.expert}"
    return f"tensor {keys[0]}{more}{expert}"
