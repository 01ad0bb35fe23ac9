"""Expert choices of recorded traces, mapped to models of any size: what benchmarks replay so that locality is real.

A trace has, for each token of a text, the experts that each MoE layer chose, and those that the routers of the next
layers would have chosen from an earlier layer's state (predictions), both in ascending order. Three small maps make the
choices of a larger model of it.

*Layers.* Layer l of the target takes trace layer l % L0. From l = L0 on it takes it at other tokens, shifted by
101 * (l // L0) within the same text, and with the experts renamed by a permutation of their own (seeded), so that no
two layers of the target move together.

*Same number of experts and choices*: as they are. *More of both* (128 experts top-8 out of 8 top-2): the K choices are
S = K / K0 slots of K0, the E experts S * G groups of E0. Slot s chooses one of its own G groups by the first of the
choices of trace layer (l + s + 1) % L0, modulo G, and in it the K0 choices of trace layer (l + s) % L0, renamed for
that slot: K different experts that come again as those of the trace do.

*Predictions* go through the same maps. Where a layer of the trace has none, its first ones, it gets as many right
choices as another layer's prediction has at that token, drawn anew at each token, and the others from the rest. The
target's own first layers have none.

Tokens beyond the traces, and all tokens of ``random``, choose uniformly (seeded): one more text, "uniform".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Choices = npt.NDArray[np.int16]
Kind = Literal["trace", "random"]

# Shapes: T tokens, L layers, K choices of a token; L0, K0, E0: of a trace.

UNIFORM = "uniform"  # the text of uniform choices
_SHIFT = 101


@dataclass(frozen=True)
class Trace:
    """One text. ``predicted``: layers ahead -> [T, L, K], what was predicted for layer l, -1 where nothing was."""

    name: str
    experts: int
    chosen_TLK: Choices
    predicted: dict[int, Choices] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for choices in (self.chosen_TLK, *self.predicted.values()):
            if choices.shape != self.chosen_TLK.shape or choices.max() >= self.experts:
                raise SystemExit(
                    f"trace {self.name}: choices {choices.shape} of experts up to {choices.max()}, "
                    f"expected {self.chosen_TLK.shape} below {self.experts}"
                )


@dataclass(frozen=True)
class Replay:
    """What each token id of a model chooses: token id t is position t of the traces, one text after the other.

    ``starts``: the first id of each text, and the id after the last. ``predicted``: layers ahead -> [T, L, K], made for
    layer l; -1 where none.
    """

    experts: int
    chosen_TLK: Choices
    starts: tuple[int, ...]
    names: tuple[str, ...]
    predicted: dict[int, Choices] = field(default_factory=dict)

    def texts(self, kind: Kind) -> list[range]:
        """The ids of each recorded text, or of the uniform choices."""
        spans = zip(self.names, pairwise(self.starts), strict=True)
        found = [range(*span) for name, span in spans if (name == UNIFORM) == (kind == "random")]
        if not found:
            raise SystemExit(f"the model replays {', '.join(self.names)}: nothing for --routing {kind}")
        return found

    def distinct(self, first: int, count: int) -> list[set[int]]:
        """The different experts of so many tokens from ``first`` on, by layer."""
        rows = self.chosen_TLK[first : first + count]
        return [set(rows[:, layer].ravel().tolist()) for layer in range(rows.shape[1])]

    def save(self, store: Path) -> None:
        """Beside the store: STORE.replay.npz, and STORE.predictions.npz if there are any."""
        np.savez_compressed(
            replay_file(store), experts=self.experts, chosen=self.chosen_TLK, starts=self.starts, names=self.names
        )
        if self.predicted:
            arrays: dict[str, Any] = {f"ahead{distance}": choices for distance, choices in self.predicted.items()}
            np.savez_compressed(predictions_file(store), **arrays)


def replay_file(store: Path) -> Path:
    return store.with_name(store.name + ".replay.npz")


def predictions_file(store: Path) -> Path:
    """Arrays ``ahead1``, ``ahead2``, ...: int16 [token id, layer, K]: what was predicted for a layer so many earlier.

    -1: no prediction.
    """
    return store.with_name(store.name + ".predictions.npz")


def load_replay(store: Path) -> Replay:
    path = replay_file(store)
    if not path.exists():
        raise SystemExit(f"{store} has no {path.name}; write it with benchmarks/make_store.py --routing")
    with np.load(path) as data:
        replay = Replay(
            int(data["experts"]),
            data["chosen"],
            tuple(data["starts"].tolist()),
            tuple(str(name) for name in data["names"]),
            load_predictions(store),
        )
    return replay


def load_predictions(store: Path) -> dict[int, Choices]:
    path = predictions_file(store)
    if not path.exists():
        return {}
    with np.load(path) as data:
        return {int(name.removeprefix("ahead")): data[name] for name in data.files}


# ------------------------------------------------------------------------------------------ mapping


def replay_traces(
    traces: Sequence[Trace], *, tokens: int, layers: int, experts: int, active: int, seed: int = 0
) -> Replay:
    """The traces one after the other, and uniform choices up to ``tokens`` ids."""
    lengths = [len(trace.chosen_TLK) for trace in traces]
    starts = (0, *np.cumsum(lengths).tolist())
    if starts[-1] > tokens:
        raise SystemExit(f"the traces have {starts[-1]} tokens, the vocabulary {tokens}; raise --vocab")
    chosen = uniform_choices(tokens, layers, experts, active, seed)
    distances = sorted(set.intersection(*(set(trace.predicted) for trace in traces)))
    predicted = {distance: np.full_like(chosen, -1) for distance in distances}
    for start, trace in zip(starts, traces, strict=False):
        rows = slice(start, start + len(trace.chosen_TLK))
        chosen[rows] = map_choices(trace.chosen_TLK, trace.experts, layers, experts, active, seed)
        for distance in distances:
            predicted[distance][rows] = predictions_of(trace, distance, layers, experts, active, seed)
    names = [trace.name for trace in traces]
    if starts[-1] < tokens:
        starts, names = (*starts, tokens), [*names, UNIFORM]
    return Replay(experts, chosen, starts, tuple(names), predicted)


def replay_random(*, tokens: int, layers: int, experts: int, active: int, seed: int = 0) -> Replay:
    """Every token chooses uniformly, whatever came before. Nothing can be predicted."""
    return Replay(experts, uniform_choices(tokens, layers, experts, active, seed), (0, tokens), (UNIFORM,))


def uniform_choices(tokens: int, layers: int, experts: int, active: int, seed: int) -> Choices:
    random = np.random.default_rng([seed, 1])
    chosen = np.empty((tokens, layers, active), dtype=np.int16)
    for layer in range(layers):
        keys = random.random((tokens, experts), dtype=np.float32)
        chosen[:, layer] = np.argpartition(keys, active - 1, axis=1)[:, :active]
    return chosen


def predictions_of(trace: Trace, distance: int, layers: int, experts: int, active: int, seed: int = 0) -> Choices:
    """[T, layers, active]: a trace's predictions of so many layers ahead, mapped as its choices are."""
    predicted = map_choices(_complete(trace, distance, seed), trace.experts, layers, experts, active, seed)
    predicted[:, :distance] = -1
    return predicted


def map_choices(
    chosen_TLK: Choices, trace_experts: int, layers: int, experts: int, active: int, seed: int = 0
) -> Choices:
    """Choices of a trace, or its predictions -> [T, layers, active] of the target."""
    tokens, trace_layers, trace_active = chosen_TLK.shape
    slots, groups = _slots(trace_experts, trace_active, experts, active)
    out = np.empty((tokens, layers, active), dtype=np.int16)
    for layer in range(layers):
        moved = np.roll(chosen_TLK, -_SHIFT * (layer // trace_layers), axis=0)
        for slot in range(slots):
            named = moved[:, (layer + slot) % trace_layers]
            if layer >= trace_layers or slot:
                names = np.random.default_rng([seed, layer, slot]).permutation(trace_experts)
                named = names.astype(np.int16)[named]
            group = groups * slot + moved[:, (layer + slot + 1) % trace_layers, 0] % groups
            out[:, layer, slot * trace_active : (slot + 1) * trace_active] = group[:, None] * trace_experts + named
    return out


def _slots(trace_experts: int, trace_active: int, experts: int, active: int) -> tuple[int, int]:
    """Slots of a token, and groups that each slot chooses from."""
    slots = active // trace_active
    if active % trace_active or not slots or experts % (slots * trace_experts):
        raise SystemExit(
            f"a trace of {trace_experts} experts, top {trace_active}, does not map to {experts} experts, top {active}: "
            "expected a multiple of the choices, and of slots times experts"
        )
    return slots, experts // (slots * trace_experts)


def _complete(trace: Trace, distance: int, seed: int) -> Choices:
    """The trace's predictions; where it has none, ones as good as another layer's."""
    predicted = trace.predicted[distance]
    out = predicted.copy()
    random = np.random.default_rng([seed, 2, distance])
    right_TL = (predicted[..., None] == trace.chosen_TLK[:, :, None]).any(axis=2).sum(axis=2)
    for token, layer in np.argwhere((predicted < 0).any(axis=2)):
        given = np.flatnonzero((predicted[token] >= 0).all(axis=1))
        right = right_TL[token, random.choice(given)] if len(given) else 0
        chosen = random.permutation(trace.chosen_TLK[token, layer])
        others = random.permutation(np.setdiff1d(np.arange(trace.experts), chosen))
        out[token, layer] = np.sort(np.concatenate([chosen[:right], others[: len(chosen) - right]]))
    return out
