"""Which experts of other nodes the compute node should have in memory too, by what its layers use. Pure.

A remote expert is used at the price of a round trip for its layer; one that is here as well leaves each layer call the
choice. So what is used much there takes the place of what is used little here: of a copy that another node has too, or
of what nobody uses. Uses count less the longer ago they were; a difference that chance explains does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from moray.runtime.arrays import Bools, Doubles, Ints
from moray.runtime.layout.shard import ExpertKey

_HALF_LIFE_S = 60.0  # of a use
_LEAST_USES = 8.0  # of what is copied
_UNUSED = 0.5  # uses, below: what may go though no other node has it
_DEVIATIONS = 3.0  # of the difference of two counts (Poisson)


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """A moment of the compute process. Of each layer [E]."""

    uses: tuple[Ints, ...]  # tokens of each expert since the process began
    is_here: tuple[Bools, ...]  # in memory on the compute node
    is_elsewhere: tuple[Bools, ...]  # in memory on a live host of another node


class RemoteHeat:
    """Follows a compute process. Not thread-safe."""

    def __init__(self, owned: Mapping[str, Collection[ExpertKey]], slots: Mapping[str, int]) -> None:
        """``owned``: the experts that each host of the compute node may hold; ``slots``: of its arena."""
        self._owned, self._slots = {host: sorted(keys) for host, keys in owned.items()}, slots
        self._before: Ints | None = None
        self._heat: Doubles | None = None

    def step(self, now: ExpertUse, passed_s: float) -> dict[str, list[ExpertKey]]:
        """What each host should copy now, the hottest first. ``passed_s``: since the last step."""
        totals = np.concatenate(now.uses)
        if self._before is None or self._heat is None or (totals < self._before).any():  # or it was restarted
            self._before, self._heat = totals, np.zeros(len(totals))
        self._heat = self._heat * 0.5 ** (passed_s / _HALF_LIFE_S) + (totals - self._before)
        self._before = totals
        first = np.cumsum([0, *map(len, now.uses)])
        is_here, is_elsewhere = np.concatenate(now.is_here), np.concatenate(now.is_elsewhere)
        found = {}
        for host, keys in self._owned.items():
            mine = np.array([first[key.layer] + key.expert for key in keys])
            chosen = worth_copying(self._heat[mine], is_here[mine], is_elsewhere[mine], self._slots[host])
            if len(chosen):
                found[host] = [keys[i] for i in chosen.tolist()]
        return found


def worth_copying(heat: Doubles, is_here: Bools, is_elsewhere: Bools, num_slots: int) -> Ints:
    """Positions of a host's experts that should be copied to it, the hottest first, each in place of a colder one."""
    wanted = np.flatnonzero(is_elsewhere & ~is_here & (heat >= _LEAST_USES))
    wanted = wanted[np.argsort(-heat[wanted], kind="stable")]
    may_go = np.flatnonzero(is_here & (is_elsewhere | (heat < _UNUSED)))
    free = np.zeros(max(0, num_slots - int(is_here.sum())))
    lost = np.concatenate([free, np.sort(heat[may_go])])[: len(wanted)]
    gained = heat[wanted[: len(lost)]]
    # The first are the clearest: what is hot falls from one to the next, and what it replaces rises.
    pays = gained - lost > _DEVIATIONS * np.sqrt(gained + lost)
    return wanted[: int(pays.sum())]
