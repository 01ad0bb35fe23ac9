"""The plan of a conversion: every byte range of the store and what goes there, before anything is written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moray.runtime.convert.adapter import Adapter
from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece, TensorPlan, choose_spec
from moray.runtime.convert.merge import merge_adapters
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.sources import ModelShapes, Source, SourceIndex, index_sources
from moray.runtime.convert.trunk import PARTIAL_TRUNK_NAME, TrunkPlan, plan_trunk
from moray.runtime.errors import CheckpointError, UnsupportedModelError
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.layout.shard import ExpertKey, ShardLayout, plan_layout
from moray.runtime.model.expert_gates import is_swiglu
from moray.runtime.model.families import (
    EXPERT_PARAMETERS,
    build_model,
    expert_modules,
    expert_params,
)
from moray.runtime.store.manifest import ExpertsLayer

_SHARD_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
assert set(_SHARD_ORDER) == set(EXPERT_PARAMETERS)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole store, as it will be. ``files``: name -> size in bytes of what pieces are written to."""

    layers: tuple[ExpertsLayer, ...]
    shards: dict[ExpertKey, Piece]
    trunk: TrunkPlan
    shapes: ModelShapes
    files: dict[str, int]
    num_parameters: int
    num_expert_parameters: int
    notes: list[str]

    @property
    def pieces(self) -> list[Piece]:
        return [*self.trunk.pieces, *self.shards.values()]


def make_plan(
    config: PreTrainedConfig, checkpoint: Checkpoint, recipe: Recipe, adapters: Sequence[Adapter] = ()
) -> Plan:
    """Plan a conversion, with ``adapters`` merged in their order. Reads no weights.

    Raises CheckpointError (a tensor is missing or does not fit the config) and UnsupportedModelError.
    """
    _check_layers(config, checkpoint)
    model = build_model(config, torch.bfloat16, "meta")

    def describe(key: str, expert: int | None) -> torch.Tensor:
        shape, dtype = checkpoint.describe(key)
        return torch.empty(shape if expert is None else (1, *shape[1:]), dtype=dtype, device="meta")

    index = merge_adapters(model, index_sources(model, checkpoint.keys, describe), adapters)
    layers: list[ExpertsLayer] = []
    shards: dict[ExpertKey, Piece] = {}
    notes: dict[str, None] = dict.fromkeys(checkpoint.notes)
    for layer, (path, module) in enumerate(expert_modules(model)):
        layout, tensors = _plan_layer(path, module, index, recipe, checkpoint, index.experts[layer], notes)
        activation = "swiglu" if is_swiglu(module) else "module"
        layers.append(ExpertsLayer(path, len(index.experts[layer]), layout, activation))
        for expert, sources in enumerate(index.experts[layer]):
            key = ExpertKey(layer, expert)
            shards[key] = _plan_shard(key, layout, tensors, sources)
    trunk = plan_trunk(model, index, recipe, checkpoint)
    files = {PARTIAL_TRUNK_NAME: trunk.num_bytes}
    for piece in shards.values():
        files[piece.file] = max(files.get(piece.file, 0), piece.offset + piece.num_bytes)
    in_trunk, in_experts = _count_parameters(model)
    is_multimodal = config.get_text_config() is not config
    notes |= dict.fromkeys(trunk.notes) | dict.fromkeys(_describe_unexpected(model, index.unexpected, is_multimodal))
    return Plan(tuple(layers), shards, trunk, index.shapes, files, in_trunk + in_experts, in_experts, list(notes))


def _check_layers(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Before modules are made for layers that are not there."""
    layers, tensors = getattr(config.get_text_config(), "num_hidden_layers", 0), len(checkpoint.tensors)
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"config.json says {layers} layers, the checkpoint has {tensors} tensors; "
            "the checkpoint does not fit its config.json"
        )


def experts_file(layer: int) -> str:
    return f"experts-{layer:05d}.bin"


def _plan_layer(
    path: str,
    module: nn.Module,
    index: SourceIndex,
    recipe: Recipe,
    checkpoint: Checkpoint,
    experts: list[dict[str, Source]],
    notes: dict[str, None],
) -> tuple[ShardLayout, list[TensorPlan]]:
    """Layout of a layer's shards, and the plan of each tensor of its first expert."""
    tensors: list[TensorPlan] = []
    placed: list[tuple[str, PackedSpec | int]] = []
    sources = experts[0]
    for name in sorted(sources, key=_SHARD_ORDER.index):
        shape = index.shapes.shapes[f"{path}.{name}"][1:]
        transpose = bool(module.is_transposed) and len(shape) == 2
        if len(shape) == 1:
            tensors.append(TensorPlan(name, sources[name], None, torch.float32))
            placed.append((name, shape[0]))
            continue
        if len(shape) != 2:
            raise UnsupportedModelError(f"{path}.{name} has shape {list(shape)} for one expert, expected 2 dimensions")
        rows, columns = shape[::-1] if transpose else shape
        dtype = index.dtypes[f"{path}.{name}"]
        same = [expert[name] for expert in experts]
        spec, kept, note = choose_spec(recipe["experts"], (rows, columns), dtype, same, checkpoint)
        notes |= {note: None} if note else {}
        tensors.append(TensorPlan(name, sources[name], spec, dtype, transpose, kept))
        placed.append((name, spec))
    return plan_layout(placed), tensors


def _plan_shard(key: ExpertKey, layout: ShardLayout, tensors: list[TensorPlan], sources: dict[str, Source]) -> Piece:
    own = tuple(replace(plan, source=sources[plan.name]) for plan in tensors)
    label = f"expert {key.expert} of MoE layer {key.layer}"
    offset = key.expert * layout.num_bytes
    return Piece(experts_file(key.layer), offset, layout.num_bytes, label, own, (key, layout))


def _count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    shapes = (shape for _, module in expert_modules(model) for shape, _ in expert_params(module).values())
    return sum(p.numel() for p in model.parameters()), sum(math.prod(shape) for shape in shapes)


def _describe_unexpected(model: PreTrainedModel, keys: dict[str, str], is_multimodal: bool) -> list[str]:
    """Notes on keys of the checkpoint that no part of the model wants. ``keys``: key -> its name in the model.

    Of a multimodal checkpoint the parts that are left out; else names with layers and experts folded.
    """
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    num_layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1 << 30))
    paths = {name for name, _ in model.named_modules()}
    parts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for key, name in keys.items():
        part = _missing_module(name, paths)
        layer = re.match(r"(?:\w+\.)*layers\.([0-9]+)\.", key)
        if layer and int(layer[1]) >= num_layers:
            others[f"layer {layer[1]}, after the last of the model's {num_layers} (multi-token prediction)"] += 1
        elif is_multimodal and part != name:
            parts[part] += 1
        elif not any(re.search(pattern, key) for pattern in ignored):
            others[re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", key)] += 1
    return [
        *(f"left out, not for text: {part} ({count} tensors)" for part, count in parts.items()),
        *(f"not used by the model: {name} ({count} tensors)" for name, count in others.items()),
    ]


def _missing_module(name: str, paths: set[str]) -> str:
    """The outermost module on the way to a tensor that a model does not have; ``name`` itself if it has all."""
    ends = [at for at, character in enumerate(name) if character == "."]
    return next((name[:end] for end in ends if name[:end] not in paths), name)
