"""What a decoded token takes at least if a layer's reads begin when its router has spoken: for offload.py.

The limit of offload.py, the larger of disk and computing, hides all of the one behind the other. A layer's router needs
the layers before it, so without predictions a read can hide only behind the experts of its own layer.

*floor*, of a step in L layers of K experts each that a token chooses:
    rest + sum over layers of ( max(missed * read, compute * (K - 1) / K) + compute / K )
- *missed*: experts that a layer misses at that token, of a cache of the arena's size whose policy is replayed over the
  same requests (``moray trace replay``'s simulator; memory is empty at first);
- *read*: seconds that one expert's bytes take at the raw bandwidth of the run;
- *compute*: seconds that a layer's experts take with everything resident; *rest*: what such a step takes beyond them.
The last of the experts is computed after its read has ended; everything else costs nothing: no messages, no checksums,
no core is taken by reading.

*foreseen floor*: the same without the misses that the layer before predicted, as if they were in memory by then and
nothing were read that turns out not to be needed: no use of these predictions can be faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
import numpy.typing as npt
from offload_runs import DECODE, Ask
from replay import Replay

from moray.runtime.residency.policies import make_policy
from moray.runtime.trace.recall import Foresight
from moray.runtime.trace.simulate import replay as replay_cache

_POLICY = "lfu"  # what ``auto`` takes on such traffic


@dataclass(frozen=True)
class Times:
    """Seconds: of reading one expert, of one layer's experts in memory, and of all else of a step."""

    read_s: float
    compute_s: float
    rest_s: float

    def step_s(self, missed_L: npt.NDArray[np.int64], active: int) -> float:
        last = self.compute_s / active
        return self.rest_s + float((np.maximum(missed_L * self.read_s, self.compute_s - last) + last).sum())


@dataclass(frozen=True)
class Misses:
    """Of the tokens of the last decode: [T, L], all, and those that the layer before predicted."""

    missed_TL: npt.NDArray[np.int64]
    foreseen_TL: npt.NDArray[np.int64]

    def floors(self, times: Times, active: int) -> tuple[float, float]:
        """Seconds of a token, means: the floor and the foreseen floor."""
        left_TL = self.missed_TL - self.foreseen_TL
        floor, foreseen = (mean(times.step_s(row, active) for row in rows) for rows in (self.missed_TL, left_TL))
        return floor, foreseen


@dataclass(slots=True)
class _Foreseen(Foresight):
    """Keeps the count of each call."""

    foreseen_C: list[int] = field(default_factory=list, init=False)

    def note(self, call: int, active: Sequence[int], resident: set[int]) -> None:
        before = self.num_foreseen
        Foresight.note(self, call, active, resident)
        self.foreseen_C.append(self.num_foreseen - before)


def replay_misses(asks: Sequence[Ask], replay: Replay, num_slots: int) -> Misses:
    """The requests in turn, from an empty cache of so many experts; the last must be a decode."""
    assert asks[-1].phase == DECODE
    ahead_TLK = replay.predicted.get(1)
    calls: list[list[int]] = []
    guesses: list[list[int]] = []
    num_layers = replay.chosen_TLK.shape[1]
    for ask in asks:
        first = ask.prompt[-1] + 1
        decoded = [range(token, token + 1) for token in range(first, first + ask.count - 1)]
        for tokens in [range(ask.prompt[0], first), *decoded]:
            for layer in range(num_layers):
                calls.append(_experts(replay.chosen_TLK, tokens, layer, replay.experts))
                guesses.append([] if ahead_TLK is None else _experts(ahead_TLK, tokens, layer, replay.experts))
    foresight = _Foreseen(guesses)
    policy = make_policy(_POLICY, [replay.experts] * num_layers, num_slots)
    missed_C = replay_cache(calls, policy, num_slots, foresight)
    num_calls = (asks[-1].count - 1) * num_layers
    last = (np.asarray(found, dtype=np.int64)[-num_calls:] for found in (missed_C, foresight.foreseen_C))
    return Misses(*(found.reshape(-1, num_layers) for found in last))


def _experts(choices_TLK: npt.NDArray[np.int16], tokens: range, layer: int, num_experts: int) -> list[int]:
    """The different experts of one layer call, numbered over all layers as policies number them; -1 is none."""
    chosen = np.unique(choices_TLK[tokens.start : tokens.stop, layer])
    return (chosen[chosen >= 0].astype(int) + layer * num_experts).tolist()
