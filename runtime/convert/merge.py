"""Merging adapters: which parameter of the model each of an adapter's tensors changes, and how.

An adapter's names go through the same conversion as a checkpoint's keys (sources.py). What that does to weights
(stack, concatenate, transpose, split) is linear, so done to B @ A it gives what is added to the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from moray.runtime.convert.adapter import Adapter, Change, Factors, Zeros
from moray.runtime.convert.sources import (
    Collected,
    KeyMap,
    ModelShapes,
    ShapeCheck,
    Source,
    SourceIndex,
    apply,
    whole,
)
from moray.runtime.errors import CheckpointError
from moray.runtime.model.families import EXPERT_PARAMETERS, expert_modules, expert_params


@dataclass(frozen=True, slots=True)
class Merge:
    """A change of one parameter, or of one expert's: added to its value, or (``is_whole``) put in its place."""

    source: Source
    changes: dict[str, Change]
    is_whole: bool

    def __call__(self, value: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        """In float32."""
        made = apply(self.source, lambda key, expert: self.changes[key].read(expert), shapes)[self.source.target]
        return made if self.is_whole else value.float() + made


def merge_adapters(model: PreTrainedModel, index: SourceIndex, adapters: Iterable[Adapter]) -> SourceIndex:
    """The same index, with every source that an adapter changes knowing it; later adapters come after earlier ones.

    Raises CheckpointError: a name that is not the model's, a wrong shape, a weight that is tied to another.
    """
    for adapter in adapters:
        found = _Merger(model, index, adapter).run()
        experts = [
            [
                {name: _with_merges(source, found.get((source.target, e), [])) for name, source in sources.items()}
                for e, sources in enumerate(layer)
            ]
            for layer in index.experts
        ]
        others = {name: _with_merges(source, found.get((name, None), [])) for name, source in index.others.items()}
        index = replace(index, experts=experts, others=others)
    return index


def _with_merges(source: Source, merges: Sequence[Merge]) -> Source:
    return replace(source, merges=(*source.merges, *merges)) if merges else source


class _Merger:
    """One adapter's changes, by parameter and expert."""

    def __init__(self, model: PreTrainedModel, index: SourceIndex, adapter: Adapter) -> None:
        self.model = model
        self.index = index
        self.adapter = adapter
        self.layers = dict(expert_modules(model))
        self.keys = KeyMap(model, index.shapes.shapes)
        self.found: dict[tuple[str, int | None], list[Merge]] = {}

    def run(self) -> dict[tuple[str, int | None], list[Merge]]:
        replaced: dict[str, Change] = {name: self.adapter.tensor(key) for name, key in self.adapter.replaced.items()}
        self._place(replaced, is_whole=True)
        self._place(self._added(), is_whole=False)
        return self.found

    # ------------------------------------------------------------------------- tensors by name

    def _added(self) -> dict[str, Change]:
        """What is added to which tensor, by the name that the model, or its checkpoint on the hub, has for it."""
        added: dict[str, Change] = {}
        nested: dict[str, list[Factors]] = {}
        for factors in self.adapter.factors:
            nested.setdefault(factors.module, []).append(factors)
        unknown = []
        for module, chain in nested.items():
            names = self._parameters(module, len(chain))
            if len(names) != len(chain):
                unknown += [key for factors in chain for key in factors.roles.values()]
                continue
            # The parameter that comes first in its module is wrapped first: it is the innermost.
            for factors, name in zip(sorted(chain, key=lambda f: -f.depth), names, strict=True):
                added[name] = self._product(factors, name)
                if "bias" in factors.roles:
                    added[f"{module}.bias"] = self.adapter.bias(factors, module)
        self._refuse_unknown(unknown)
        return added

    def _parameters(self, module: str, count: int) -> list[str]:
        """The parameters of a module that its factors are for, in the module's order."""
        if count == 1 and self.keys.find(f"{module}.weight"):
            return [f"{module}.weight"]
        for name in EXPERT_PARAMETERS:
            found = self.keys.find(f"{module}.{name}")
            path = found[0].rpartition(".")[0] if found else ""
            if path in self.layers:
                params = expert_params(self.layers[path])
                matrices = [f"{module}.{name}" for name, (shape, _) in params.items() if len(shape) == 3]
                return [name for name in matrices if self.adapter.targets(name)]
        return []

    def _product(self, factors: Factors, name: str) -> Change:
        found = self.keys.find(name)
        assert found is not None
        target, pattern = found
        experts = self.layers.get(target.rpartition(".")[0])
        if experts is None or "*" in (pattern or ""):
            by_name = name if self.adapter.targets(name) else factors.module
            return self.adapter.product(factors, by_name)
        num_experts = self._shape(target)[0]
        transposed = bool(experts.is_transposed) and name == target
        return self.adapter.product(factors, name, transposed=transposed, experts=num_experts)

    def _shape(self, target: str) -> tuple[int, ...]:
        """Of a parameter of an experts module, all experts together."""
        path, _, name = target.rpartition(".")
        return expert_params(self.layers[path])[name][0]

    # --------------------------------------------------------------------- names to parameters

    def _place(self, changes: dict[str, Change], *, is_whole: bool) -> None:
        """File changes under the parameters that they become."""
        collected, unexpected = self.keys.collect(changes)
        self._refuse_unknown(list(unexpected))
        check = ShapeCheck(lambda key, expert: _meta(changes[key], expert), self.index.shapes)
        for target, entry in collected.items():
            self._refuse_tied(target)
            if target.rpartition(".")[0] in self.layers and target not in self.index.others:
                for expert, source in self._split(target, entry):
                    whole_source = self._complete(source, changes, is_whole)
                    self._add(expert, self._checked(check, whole_source)[target], changes, is_whole)
                continue
            for name, source in self._checked(check, self._complete(whole(target, entry), changes, is_whole)).items():
                self._refuse_missing(name)
                self._add(None, source, changes, is_whole)

    def _split(self, target: str, entry: Collected) -> Iterator[tuple[int, Source]]:
        """The sources of every expert that is changed."""
        num_experts = self._shape(target)[0]
        numbers = sorted({number for keys in entry.keys.values() for number, _ in keys if number is not None})
        if not numbers:
            for expert in range(num_experts):
                yield expert, replace(whole(target, entry), expert=expert)
        for expert in numbers:
            parts = {p: tuple(key for number, key in keys if number == expert) for p, keys in entry.keys.items()}
            if expert >= num_experts:
                self._refuse_unknown([key for keys in parts.values() for key in keys])
            own = tuple((pattern, keys) for pattern, keys in parts.items() if keys)
            yield expert, Source(target, target, own, entry.conversion)

    def _complete(self, source: Source, changes: dict[str, Change], is_whole: bool) -> Source:
        """With zeros for the parts of a parameter that the adapter leaves as they are."""
        if source.conversion is None or len(source.parts) == len(source.conversion.source_patterns):
            return source
        if is_whole:
            raise self._error(
                f"replaces only a part of {source.target} ({', '.join(source.keys[:4])}), expected all of it"
            )
        present = dict(source.parts)
        keys = source.parts[0][1]
        zeros = tuple(f"zeros like {key}" for key in keys)
        changes |= {name: Zeros(changes[key]) for name, key in zip(zeros, keys, strict=True)}
        return replace(source, parts=tuple((p, present.get(p, zeros)) for p in source.conversion.source_patterns))

    def _checked(self, check: ShapeCheck, source: Source) -> dict[str, Source]:
        try:
            return check(source)
        except CheckpointError as error:
            raise self._error(f"does not fit the model: {error}") from error

    def _add(self, expert: int | None, source: Source, changes: dict[str, Change], is_whole: bool) -> None:
        own = {key: changes[key] for key in source.keys}
        self.found.setdefault((source.target, expert), []).append(Merge(source, own, is_whole))

    # ------------------------------------------------------------------------------- refusals

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        if names:
            raise self._error(f"has {len(names)} tensors that the model has no place for: {', '.join(names[:4])}")

    def _refuse_missing(self, name: str) -> None:
        if name not in self.index.others:
            raise self._error(f"changes {name}, which the checkpoint does not have")

    def _refuse_tied(self, target: str) -> None:
        ties = self.model.all_tied_weights_keys
        other = ties.get(target) or next((tied for tied, kept in ties.items() if kept == target), None)
        if other:
            raise self._error(f"changes {target}, which the model ties to {other}")

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter {self.adapter.path} {found}; expected one that was trained on this model, "
            "else merge it with PEFT and convert the merged checkpoint"
        )


def _meta(change: Change, expert: int | None) -> torch.Tensor:
    return torch.empty(change.shape if expert is None else (1, *change.shape[1:]), device="meta")
