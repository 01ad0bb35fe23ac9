"""Which checkpoint tensors make which parameter: transformers' own conversion mapping, read for us.

Checkpoints on the hub do not hold the fused expert tensors that transformers' modules have, and their
names differ. transformers renames keys and applies *operations* (stack, concatenate, transpose,
interleave) on load. The same renames and operations are applied here, to the tensors of one expert or of
one other parameter at a time, so that no table of families is needed and memory stays bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from moray.runtime.errors import CheckpointError
from moray.runtime.model.families import added_conversions, expert_modules, expert_params

Reader = Callable[[str, int | None], torch.Tensor]  # (checkpoint key, expert to slice or None) -> tensor


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is done to the tensors of one parameter: a WeightConverter without its regular expressions."""

    operations: tuple[ConversionOps, ...]
    source_patterns: tuple[str, ...]
    target_patterns: tuple[str, ...]


class Merge(Protocol):
    """A change of a parameter by an adapter. Picklable."""

    def __call__(self, value: torch.Tensor, shapes: ModelShapes) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Source:
    """How one parameter, or one expert of one, is made from a checkpoint.

    ``anchor`` is the parameter that transformers files the tensors under: ``target`` itself, unless one
    tensor is split into several parameters. ``expert`` is the row to slice from a tensor of all experts.
    ``merges``: what adapters do to the value.
    """

    target: str
    anchor: str
    parts: tuple[tuple[str, tuple[str, ...]], ...]  # (source pattern, keys)
    conversion: Conversion | None = None
    expert: int | None = None
    merges: tuple[Merge, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [key for _, keys in self.parts for key in keys]


@dataclass(frozen=True)
class ModelShapes:
    """Stands in for the model where an operation asks for a parameter's shape. Experts have one row."""

    shapes: dict[str, tuple[int, ...]]
    config: PreTrainedConfig

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")


@dataclass(frozen=True, slots=True)
class SourceIndex:
    """Sources of everything in a model.

    ``experts[layer][expert][name]`` for each parameter ``name`` of the layer's experts module, and
    ``others[name]`` for every other name of the state dict that the checkpoint has. ``dtypes`` holds both,
    experts as ``<path>.<name>``. ``unexpected`` are the checkpoint's keys that belong to neither, with the names that
    they would have in the model.
    """

    experts: list[list[dict[str, Source]]]
    others: dict[str, Source]
    dtypes: dict[str, torch.dtype]
    unexpected: dict[str, str]
    shapes: ModelShapes


@dataclass(slots=True)
class Collected:
    """The keys of one parameter."""

    conversion: Conversion | None
    keys: dict[str, list[tuple[int | None, str]]]  # source pattern -> expert number if it has one, key


def realize(source: Source, read: Reader, shapes: ModelShapes) -> torch.Tensor:
    """The value of a parameter (for one expert: with a leading dimension of 1)."""
    value = apply(source, read, shapes)[source.target]
    for merge in source.merges:
        value = merge(value, shapes)
    return value


def apply(source: Source, read: Reader, shapes: ModelShapes) -> dict[str, torch.Tensor]:
    """Everything that converting a source yields, by parameter name."""
    assert source.parts
    values: dict[str, Any] = {pattern: [read(key, source.expert) for key in keys] for pattern, keys in source.parts}
    if source.conversion is None:
        return {source.anchor: values[source.parts[0][0]][0]}
    for operation in source.conversion.operations:
        values = operation.convert(
            values,
            source_patterns=list(source.conversion.source_patterns),
            target_patterns=list(source.conversion.target_patterns),
            full_layer_name=source.anchor,
            model=shapes,
            config=shapes.config,
            missing_keys=None,
        )
    tensors = {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
    matched = next((name for name in tensors if name in source.anchor), None)
    if matched is None:
        return {source.anchor: next(iter(tensors.values()))} if len(tensors) == 1 else tensors
    prefix, _, suffix = source.anchor.partition(matched)
    return {prefix + name + suffix: tensor for name, tensor in tensors.items()}


def index_sources(model: PreTrainedModel, keys: Iterable[str], describe: Reader) -> SourceIndex:
    """Find the sources of every parameter and saved buffer of a model built without expert parameters.

    ``describe`` returns meta tensors. Raises CheckpointError if an expert lacks a tensor, or if anything
    has a shape that the model does not expect.
    """
    layers = expert_modules(model)
    params = [{name: shape for name, (shape, _) in expert_params(module).items()} for _, module in layers]
    fused = {f"{path}.{name}": s for (path, _), p in zip(layers, params, strict=True) for name, s in p.items()}
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = ModelShapes(state | {name: (1, *shape[1:]) for name, shape in fused.items()}, model.config)
    collected, unexpected = KeyMap(model, shapes.shapes).collect(keys)
    experts = [
        _split_layer(layer, {f"{path}.{name}": shape[0] for name, shape in params[layer].items()}, collected)
        for layer, (path, _) in enumerate(layers)
    ]
    check = ShapeCheck(describe, shapes)
    for source in (source for layer in experts for expert in layer for source in expert.values()):
        check(source)
    rest = {name: entry for name, entry in collected.items() if name not in fused}
    others = {name: source for target, entry in rest.items() for name, source in check(whole(target, entry)).items()}
    return SourceIndex(experts, others, check.dtypes, unexpected, shapes)


# ------------------------------------------------------------------------------- keys to parameters


class KeyMap:
    """Which parameter a checkpoint's key belongs to, as transformers' loader has it."""

    def __init__(self, model: PreTrainedModel, targets: dict[str, tuple[int, ...]]) -> None:
        mapping = [*get_model_conversion_mapping(model), *added_conversions(model)]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._targets = targets

    def find(self, key: str) -> tuple[str, str | None] | None:
        """The parameter, and the pattern of the conversion if there is one; None if no parameter wants the key."""
        name, pattern = self._rename(key)
        return (name, pattern) if name in self._targets else None

    def _rename(self, key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._targets)
        if name not in self._targets and key in self._targets:
            name, pattern = rename_source_key(key, [], [], self._prefix, self._targets)
        return name, pattern

    def collect(self, keys: Iterable[str]) -> tuple[dict[str, Collected], dict[str, str]]:
        """File every key under its parameter. Also returns the keys left over, renamed."""
        collected: dict[str, Collected] = {}
        unexpected = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._rename(key)
            if name not in self._targets:
                unexpected[key] = name
                continue
            if name not in collected:
                collected[name] = Collected(_conversion(self._by_pattern[pattern]) if pattern else None, {})
            number = _number(pattern, apply_renamings(key, self._renamings)) if pattern else None
            collected[name].keys.setdefault(pattern or key, []).append((number, key))
        return collected, unexpected


def _conversion(converter: WeightConverter) -> Conversion:
    patterns = tuple(converter.source_patterns), tuple(converter.target_patterns)
    return Conversion(tuple(converter.operations), *patterns)


def _number(pattern: str, key: str) -> int | None:
    """What stands in a key for the ``*`` of the mapping's pattern: the expert's number."""
    found = re.search(pattern.replace("*.", r"(?P<number>\d+)\."), key) if "*." in pattern else None
    return int(found["number"]) if found else None


def whole(target: str, entry: Collected) -> Source:
    """A source of all keys together."""
    parts = tuple((pattern, tuple(key for _, key in keys)) for pattern, keys in entry.keys.items())
    return Source(target, target, parts, entry.conversion)


def _split_layer(layer: int, targets: dict[str, int], collected: dict[str, Collected]) -> list[dict[str, Source]]:
    """Sources of each expert of a layer. ``targets``: parameter -> number of experts."""
    experts: list[dict[str, Source]] = [{} for _ in range(max(targets.values()))]
    for target, num_experts in targets.items():
        if target not in collected:
            raise CheckpointError(
                f"the checkpoint has no tensors for {target} (MoE layer {layer}); it is incomplete, download it again"
            )
        name = target.rpartition(".")[2]
        for expert in range(num_experts):
            experts[expert][name] = _one_expert(layer, expert, num_experts, target, collected[target])
    return experts


def _one_expert(layer: int, expert: int, num_experts: int, target: str, entry: Collected) -> Source:
    if all(number is None for keys in entry.keys.values() for number, _ in keys):
        return replace(whole(target, entry), expert=expert)
    # A list of all experts that makes several parameters is split in as many equal parts.
    num_parts = len(entry.conversion.target_patterns) if entry.conversion else 1
    numbers = range(expert, num_parts * num_experts, num_experts)
    parts = []
    for pattern, keys in entry.keys.items():
        own = tuple(key for number, key in keys if number in numbers)
        if len(own) != len(numbers):
            example = keys[0][1]
            raise CheckpointError(
                f"expert {expert} of MoE layer {layer} has {len(own)} tensors for {target} like {example}, "
                f"expected {len(numbers)}; the checkpoint is incomplete, download it again"
            )
        parts.append((pattern, own))
    return Source(target, target, tuple(parts), entry.conversion)


class ShapeCheck:
    """Runs conversions on meta tensors: finds wrong shapes, dtypes, and what a split yields."""

    def __init__(self, describe: Reader, shapes: ModelShapes) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self._describe = describe
        self._shapes = shapes
        self._seen: set[object] = set()

    def __call__(self, source: Source) -> dict[str, Source]:
        """The sources of all parameters made from the same tensors. Raises CheckpointError."""
        metas = {(key, source.expert): self._describe(key, source.expert) for key in source.keys}
        signature = (source.anchor, *((tuple(meta.shape), meta.dtype) for meta in metas.values()))
        if signature in self._seen:  # another expert of the layer, with tensors of the same shapes
            return {source.target: source}
        self._seen.add(signature)
        try:
            made = apply(source, lambda key, expert: metas[key, expert], self._shapes)
        except Exception as error:
            raise CheckpointError(
                f"{source.anchor} cannot be made from {', '.join(source.keys[:4])} ({error}); "
                "the checkpoint does not fit its config.json"
            ) from error
        wanted = [name for name in made if name in self._shapes.shapes]  # others are of parts that were left out
        for name in wanted:
            self._compare(name, made[name], source)
        return {name: replace(source, target=name) for name in wanted}

    def _compare(self, name: str, tensor: torch.Tensor, source: Source) -> None:
        expected = self._shapes.shapes[name]
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, expected {list(expected)}, made from "
                f"{', '.join(source.keys[:4])}; the checkpoint does not fit its config.json"
            )
        self.dtypes[name] = torch.promote_types(self.dtypes.get(name, tensor.dtype), tensor.dtype)
