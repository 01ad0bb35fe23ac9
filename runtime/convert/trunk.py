"""The trunk's file: a safetensors file that is laid out before any of its tensors is read.

Packed weights come first: their sizes are multiples of 64 bytes, and so is the start of the data, so every
one of them is aligned for the kernels when the file is mapped. Other tensors follow, widest types first.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece, TensorPlan, choose_spec
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.sources import Source, SourceIndex, realize
from moray.runtime.errors import CheckpointError
from moray.runtime.layout.packed import VECTOR_BYTES, PackedSpec
from moray.runtime.layout.shard import round_up
from moray.runtime.model.components import classify
from moray.runtime.store.manifest import TRUNK_NAME

PARTIAL_TRUNK_NAME = f"{TRUNK_NAME}.partial"
PACKED_SUFFIX = ".packed"
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TrunkPlan:
    """``header``: the first bytes of the file. ``packed``: module path -> its packed weight."""

    header: bytes
    num_bytes: int
    pieces: tuple[Piece, ...]
    packed: dict[str, PackedSpec]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Tensor:
    plan: TensorPlan
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_trunk(model: PreTrainedModel, index: SourceIndex, recipe: Recipe, checkpoint: Checkpoint) -> TrunkPlan:
    """Lay out everything that is not an expert. Raises CheckpointError if a tensor is missing."""
    sources = _untied_sources(model, index, checkpoint)
    tensors: list[_Tensor] = []
    packed: dict[str, PackedSpec] = {}
    notes: dict[str, None] = {}
    for path, component in classify(model).items():
        source = sources.pop(f"{path}.weight")
        rows, columns = index.shapes.shapes[source.target]
        dtype = index.dtypes[source.target]
        packed[path], kept, note = choose_spec(recipe[component], (rows, columns), dtype, [source], checkpoint)
        notes |= {note: None} if note else {}
        plan = TensorPlan(path + PACKED_SUFFIX, source, packed[path], torch.uint8, kept=kept)
        tensors.append(_Tensor(plan, torch.uint8, (packed[path].num_bytes,)))
    raw = [_raw_tensor(name, source, index) for name, source in sources.items()]
    tensors += sorted(raw, key=lambda tensor: -tensor.dtype.itemsize)
    header, starts = _lay_out(tensors)
    pieces = tuple(
        Piece(PARTIAL_TRUNK_NAME, len(header) + start, tensor.num_bytes, tensor.plan.name, (tensor.plan,))
        for tensor, start in zip(tensors, starts, strict=True)
    )
    num_bytes = len(header) + sum(tensor.num_bytes for tensor in tensors)
    return TrunkPlan(header, num_bytes, pieces, packed, list(notes))


def _raw_tensor(name: str, source: Source, index: SourceIndex) -> _Tensor:
    dtype = index.dtypes[source.target]
    return _Tensor(TensorPlan(name, source, None, dtype), dtype, index.shapes.shapes[source.target])


def _lay_out(tensors: list[_Tensor]) -> tuple[bytes, list[int]]:
    """The file's header, and where each tensor starts after it."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = []
    end = 0
    for tensor in tensors:
        starts.append(end)
        end += tensor.num_bytes
        document[tensor.plan.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    text = text.ljust(round_up(8 + len(text), VECTOR_BYTES) - 8)
    return len(text).to_bytes(8, "little") + text, starts


def _untied_sources(model: PreTrainedModel, index: SourceIndex, checkpoint: Checkpoint) -> dict[str, Source]:
    """State dict name -> source, without the names that are tied to another one."""
    sources = dict(index.others)
    for tied, kept in model.all_tied_weights_keys.items():
        own = sources.pop(tied, None)
        if own is not None and kept in sources:
            _require_equal(own, sources[kept], index, checkpoint)
        elif own is not None:
            sources[kept] = own  # the checkpoint has it under the other name
    names = [name for name in model.state_dict() if name not in model.all_tied_weights_keys]
    missing = [name for name in names if name not in sources and not _is_optional(name, model)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that the model needs: {', '.join(missing[:4])}; "
            "it is incomplete or does not fit its config.json, download it again"
        )
    return {name: sources[name] for name in names if name in sources}


def _require_equal(one: Source, other: Source, index: SourceIndex, checkpoint: Checkpoint) -> None:
    values = [realize(source, checkpoint.read, index.shapes) for source in (one, other)]
    if not torch.equal(*values):
        raise CheckpointError(
            f"config.json ties {one.target} to {other.target}, but the checkpoint has different values for them; "
            'set "tie_word_embeddings": false in config.json'
        )


def _is_optional(name: str, model: PreTrainedModel) -> bool:
    """A buffer that transformers does not expect in checkpoints; parameters are never optional."""
    if name in dict(model.named_parameters()):
        return False
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())
