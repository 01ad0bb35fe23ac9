"""Recipe ``keep``: the codes, scales and zeros of a pre-quantized checkpoint, unchanged in the packed layout.

What a family's conversion does to a weight (stack, concatenate, transpose, interleave) is done to its codes, to its
scales and to its zeros, one after the other so that memory stays bounded. Every matrix is compared with what the
conversion makes of the dequantized weight, bit for bit, before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from moray.runtime.arrays import Bytes, Floats
from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.published.weight import Grid, OnGrid, row_chunks
from moray.runtime.convert.sources import ModelShapes, Source, realize
from moray.runtime.errors import CheckpointError
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import (
    ROWS,
    SCALE_FACTOR,
    PackedSpec,
    Quantized,
    pack_fp4,
    pack_quantized,
    unpack_fp4,
    unpack_quantized,
)

_ADVICE = "convert with another recipe: `none` dequantizes to 16 bits, hqq4 quantizes anew"


def plan_kept(keys: Sequence[str], shape: tuple[int, int], checkpoint: Checkpoint) -> tuple[PackedSpec | None, str]:
    """How the codes of these tensors are packed as they are; None if there are none, with the reason if it is FP8.

    Raises CheckpointError if the packed layout cannot hold the codes: act-order, groups, parts that differ.
    """
    weights = [checkpoint.published.get(key) for key in keys]
    first = next((weight for weight in weights if weight is not None), None)
    if first is None:
        return None, ""
    kept = [weight for weight in weights if isinstance(weight, OnGrid)]
    if not kept:
        return None, "FP8 has no packed form, dequantized"
    codes = kept[0].parts["codes"]
    reordered = next((weight for weight in kept if weight.is_reordered), None)
    if reordered:
        raise _reordered(reordered.parts["codes"])
    codings = {weight.coding(shape[1]) if isinstance(weight, OnGrid) else None for weight in weights}
    coding = next(iter(codings))
    if len(codings) > 1:
        raise CheckpointError(
            f"{codes} cannot be kept: what becomes one matrix with it is quantized in another way; {_ADVICE}"
        )
    if coding is None:
        raise CheckpointError(
            f"{codes} cannot be kept: the packed layout has no groups of {kept[0].group} columns in rows of "
            f"{shape[1]}; {_ADVICE}"
        )
    return PackedSpec(*shape, coding[0], coding[1], coding[2]), ""


def keep(source: Source, spec: PackedSpec, transpose: bool, checkpoint: Checkpoint, shapes: ModelShapes) -> Bytes:
    """The packed matrix. Raises CheckpointError if the layout cannot hold it exactly."""
    grids = {key: _read_grid(checkpoint, key, source.expert) for key in source.keys}

    def part(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        tensor = realize(source, lambda key, expert: parts[key], shapes)
        matrix = tensor.reshape(tensor.shape[-2:])
        return (matrix.T if transpose else matrix).contiguous()

    def one_a_group(values: dict[str, torch.Tensor]) -> torch.Tensor:
        spread = {key: grids[key].spread(tensor) for key, tensor in values.items()}
        return _one_a_group(part(spread), spec, source.keys[0])

    codes_RC = part({key: grid.oriented_codes() for key, grid in grids.items()}).numpy()
    scales_RG = one_a_group({key: grid.scales for key, grid in grids.items()})
    zeros = {key: grid.zeros for key, grid in grids.items() if grid.zeros is not None}
    zeros_RG = one_a_group(zeros) if zeros else None
    packed = _pack(codes_RC, scales_RG, zeros_RG, spec, source.keys[0])
    del codes_RC
    values_RC = part({key: grid.dequantize(checkpoint.published[key].dtype) for key, grid in grids.items()})
    _compare(packed, values_RC, spec, source.keys[0])
    return packed


def _read_grid(checkpoint: Checkpoint, key: str, expert: int | None) -> Grid:
    weight = checkpoint.published[key]
    assert isinstance(weight, OnGrid)
    return weight.read_grid(checkpoint.part_reader(key, expert))


def _one_a_group(values_RC: torch.Tensor, spec: PackedSpec, where: str) -> torch.Tensor:
    groups = values_RC.reshape(spec.rows, spec.num_groups, spec.group)
    first = groups[:, :, 0].contiguous()
    if not torch.equal(groups, first[:, :, None].expand_as(groups)):
        raise _reordered(where)
    return first


def _pack(
    codes_RC: Bytes, scales_RG: torch.Tensor, zeros_RG: torch.Tensor | None, spec: PackedSpec, where: str
) -> Bytes:
    try:
        if zeros_RG is None:
            return pack_fp4(codes_RC, scales_RG.numpy(), spec)
        packed = pack_quantized(Quantized(codes_RC, scales_RG.float().numpy(), zeros_RG.float().numpy()), spec)
    except OverflowError as error:
        raise CheckpointError(f"{where} cannot be kept: {error}; {_ADVICE}") from error
    if not torch.equal((scales_RG.float() / SCALE_FACTOR).half().float() * SCALE_FACTOR, scales_RG.float()):
        raise CheckpointError(f"{where} cannot be kept exactly: a scale has more digits than float16; {_ADVICE}")
    return packed


def _compare(packed: Bytes, values_RC: torch.Tensor, spec: PackedSpec, where: str) -> None:
    """What is packed, rounded as the dequantized weights are, is what they are."""
    blocks = packed.reshape(spec.num_blocks, -1)
    for part in row_chunks(spec.rows, spec.columns, ROWS):
        rows = replace(spec, rows=part.stop - part.start)
        own = _dequantize(blocks[part.start // ROWS : -(-part.stop // ROWS)].reshape(-1), rows)
        rounded = torch.from_numpy(own).to(values_RC.dtype)
        if not np.array_equal(rounded.view(torch.uint8).numpy(), values_RC[part].view(torch.uint8).numpy()):
            raise CheckpointError(f"{where} cannot be kept: its codes become other weights in this family; {_ADVICE}")


def _dequantize(packed: Bytes, spec: PackedSpec) -> Floats:
    if spec.encoding == "fp4":
        codes, exponents = unpack_fp4(packed, spec)
        doubles: Floats = np.array(fp4.DOUBLES, dtype=np.float32)[codes]
        return doubles * np.repeat(fp4.decode(exponents), spec.group, axis=1)
    quantized = unpack_quantized(packed, spec)
    steps: Floats = quantized.codes.astype(np.float32) - np.repeat(quantized.zeros, spec.group, axis=1)
    return steps * np.repeat(quantized.scales, spec.group, axis=1)


def _reordered(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has groups that are not runs of columns (act-order: desc_act, g_idx); expected columns in order "
        f"to keep its codes; {_ADVICE}"
    )
