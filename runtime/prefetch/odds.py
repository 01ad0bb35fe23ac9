"""How often predictions come true, and so which of them are worth a load.

What is often needed is mostly in memory. So of what is predicted and absent, much comes from a router that is right in
general and wrong here; what was not used for long, and what is ranked low, seldom comes true, unless it is for a
prompt, which needs most of what is predicted. Predictions are counted by these three, acted on or not.

Pure. Experts are numbers, as in ``residency/policy.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moray.runtime.prefetch.payoff import PAYS_FROM

_KEPT = 0.98  # what is left of a prediction's weight after the next one of its kind
_NEVER = 16  # the age of what has not been used yet, and of what is older than 2^15 calls
_LOWEST_RANK = 3  # and all below

Kind = tuple[int, int, int]  # age, rank, and how many were predicted at once, as a power of two


@dataclass(slots=True)
class _Counts:
    """Of one kind: moving sums, which begin with two predictions, one of them right."""

    true: float = 1.0
    total: float = 2.0

    def add(self, came_true: bool) -> None:
        self.true = _KEPT * self.true + came_true
        self.total = _KEPT * self.total + 1


class PredictionOdds:
    """``layer_of`` [N]: each expert's layer. Calls of a layer are told in their order, with what they used."""

    def __init__(self, layer_of: Sequence[int]) -> None:
        self._layer_of = layer_of
        self._calls = [0] * (max(layer_of, default=-1) + 1)  # by layer
        self._last_use: dict[int, int] = {}  # expert -> call of its layer
        self._open: dict[int, dict[int, Kind]] = {}  # layer -> predicted for its next call, absent
        self._counts: dict[Kind, _Counts] = {}

    def predicted(self, experts: Sequence[int]) -> None:
        """For one layer's next call, the likeliest first; those that are not in memory."""
        if experts:
            found, breadth = self._open.setdefault(self._layer_of[experts[0]], {}), len(experts).bit_length()
            for rank, expert in enumerate(experts):
                found[expert] = self._age(expert), min(rank, _LOWEST_RANK), breadth

    def used(self, experts: Sequence[int]) -> None:
        """A call of a layer used these. Not empty."""
        layer = self._layer_of[experts[0]]
        for expert, kind in self._open.pop(layer, {}).items():
            self._counts.setdefault(kind, _Counts()).add(expert in experts)
        self._calls[layer] += 1
        self._last_use.update(dict.fromkeys(experts, self._calls[layer]))

    def are_good(self, expert: int) -> bool:
        """Whether a prediction of this kind comes true often enough to pay. What was not predicted is asked for."""
        kind = self._open.get(self._layer_of[expert], {}).get(expert)
        if kind is None or kind not in self._counts:
            return True
        return self._counts[kind].true >= PAYS_FROM * self._counts[kind].total

    def _age(self, expert: int) -> int:
        """Calls of its layer since the last that used it, as a power of two."""
        last = self._last_use.get(expert)
        return _NEVER if last is None else min((self._calls[self._layer_of[expert]] - last).bit_length(), _NEVER)
