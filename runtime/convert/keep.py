"""Recipe ``keep``: the codes, scales and zeros of a pre-quantized checkpoint, unchanged in the packed layout.

What a family's conversion does to a weight (stack, concatenate, transpose, interleave) is done to its codes, to its
scales and to its zeros. Every matrix is then compared with the dequantized weight, bit for bit, before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.sources import ModelShapes, Source, realize
from moray.runtime.convert.unpack import Grid
from moray.runtime.errors import CheckpointError
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import SCALE_FACTOR, Bytes, PackedSpec, Quantized, pack_fp4, pack_quantized

_ADVICE = "convert with another recipe: `none` dequantizes to 16 bits, hqq4 quantizes anew"


def plan_kept(keys: Sequence[str], shape: tuple[int, int], checkpoint: Checkpoint) -> tuple[PackedSpec | None, str]:
    """How the codes of these tensors are packed as they are; None if they are not, with the reason if there is one.

    Raises CheckpointError if their groups are not runs of columns.
    """
    weights = [checkpoint.published.get(key) for key in keys]
    found = [weight for weight in weights if weight is not None]
    if not found:
        return None, ""
    reordered = next((w for w in found if w.is_reordered), None)
    if reordered:
        raise _reordered(reordered.parts["codes"])
    if found[0].kind == "fp8":
        return None, "no packed form of FP8 yet, dequantized"
    codings = {weight.coding(shape[1]) if weight else None for weight in weights}
    coding = next(iter(codings))
    if len(codings) > 1 or coding is None:
        why = (
            "its parts are quantized in different ways" if len(codings) > 1 else f"no packed groups of {found[0].group}"
        )
        return None, f"{why}, dequantized"
    return PackedSpec(*shape, coding[0], coding[1], coding[2]), ""


def keep(source: Source, spec: PackedSpec, transpose: bool, checkpoint: Checkpoint, shapes: ModelShapes) -> Bytes:
    """The packed matrix. Raises CheckpointError if the layout cannot hold it exactly."""
    grids = {key: checkpoint.read_grid(key, source.expert) for key in source.keys}

    def part(pick: Callable[[Grid], torch.Tensor]) -> torch.Tensor:
        tensor = realize(source, lambda key, expert: pick(grids[key]), shapes)
        matrix = tensor.reshape(tensor.shape[-2:])
        return (matrix.T if transpose else matrix).contiguous()

    where = source.keys[0]
    codes_RC = part(lambda grid: grid.codes).numpy()
    scales_RG = _one_a_group(part(lambda grid: grid.scales), spec, where)
    values = part(lambda grid: grid.dequantize(torch.float32))
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{where} holds NaN or infinite values; the checkpoint is damaged, download it again")
    try:
        if spec.encoding == "fp4":
            exponents = scales_RG.numpy()
            packed = pack_fp4(codes_RC, exponents, spec)
            kept = np.array(fp4.DOUBLES, dtype=np.float32)[codes_RC].reshape(spec.rows, spec.num_groups, -1)
            kept = kept * fp4.decode(exponents)[:, :, None]
        else:
            scales = (scales_RG.float() / SCALE_FACTOR).half().float() * SCALE_FACTOR
            zeros = _one_a_group(part(lambda grid: _zeros(grid)), spec, where).float()
            quantized = Quantized(codes_RC, scales.numpy(), zeros.numpy())
            packed = pack_quantized(quantized, spec)
            codes = codes_RC.reshape(spec.rows, spec.num_groups, -1).astype(np.float32)
            kept = (codes - quantized.zeros[:, :, None]) * quantized.scales[:, :, None]
    except OverflowError as error:
        raise CheckpointError(f"{where} cannot be kept: {error}; {_ADVICE}") from error
    if not np.array_equal(kept.reshape(spec.rows, spec.columns).view(np.uint32), values.numpy().view(np.uint32)):
        raise CheckpointError(f"{where} cannot be kept exactly: a scale has more digits than float16; {_ADVICE}")
    return packed


def _zeros(grid: Grid) -> torch.Tensor:
    assert grid.zeros is not None
    return grid.zeros


def _one_a_group(values_RC: torch.Tensor, spec: PackedSpec, where: str) -> torch.Tensor:
    groups = values_RC.reshape(spec.rows, spec.num_groups, spec.group)
    first = groups[:, :, 0].contiguous()
    if not torch.equal(groups, first[:, :, None].expand_as(groups)):
        raise _reordered(where)
    return first


def _reordered(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has groups that are not runs of columns (act-order: desc_act, g_idx); expected columns in order "
        f"to keep its codes; {_ADVICE}"
    )
