"""How well prefetch n layers ahead would have known what was needed, and what was missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from moray.runtime.trace.format import Trace


@dataclass(slots=True)
class Foresight:
    """What the layer before each call predicted, beside what a cache missed.

    A prefetch can hide no more of the disk's time than that of ``num_foreseen`` of ``num_missed`` experts, and reads
    ``num_needless`` in vain for it.
    """

    guesses_C: Sequence[Sequence[int]]  # of each call, numbered as policies number experts
    num_missed: int = field(default=0, init=False)
    num_foreseen: int = field(default=0, init=False)  # of these
    num_needless: int = field(default=0, init=False)  # predicted, not in memory and not used

    @classmethod
    def of(cls, trace: Trace) -> Foresight:
        guess_starts_C, guesses = trace.predicted.get(1, (None, None))
        steps, layers = trace.steps_C.tolist(), trace.layers_C.tolist()
        found: list[list[int]] = [[] for _ in steps]
        if guess_starts_C is not None and guesses is not None:
            bounds, values = guess_starts_C.tolist(), guesses.tolist()
            first = [0, *accumulate(trace.header.num_experts)]
            call_at = {at: call for call, at in enumerate(zip(steps, layers, strict=True))}
            for call, (step, layer) in enumerate(zip(steps, layers, strict=True)):
                target = call_at.get((step, layer + 1))
                if target is not None:
                    found[target] = [first[layer + 1] + e for e in values[bounds[call] : bounds[call + 1]]]
        return cls(found)

    def note(self, call: int, active: Sequence[int], resident: set[int]) -> None:
        """A call is about to look for its experts in the cache."""
        missing = {e for e in active if e not in resident}
        guesses = {e for e in self.guesses_C[call] if e not in resident}
        self.num_missed += len(missing)
        self.num_foreseen += len(missing & guesses)
        self.num_needless += len(guesses - missing)


def recall_by_distance(trace: Trace) -> dict[int, float]:
    """Distance in layers -> share of the used experts that were predicted, over decode calls.

    Only calls that something was predicted for count. A prediction is cut to as many experts, the most likely first,
    as the call used: predicting all experts is no merit.
    """
    steps, layers, starts = trace.steps_C.tolist(), trace.layers_C.tolist(), trace.starts.tolist()
    call_at = {at: call for call, at in enumerate(zip(steps, layers, strict=True))}
    experts, is_prefill = trace.experts_U.tolist(), trace.is_prefill_C.tolist()
    recalls = {}
    for distance, (guess_starts_C, guesses) in trace.predicted.items():
        bounds, values = guess_starts_C.tolist(), guesses.tolist()
        num_found = num_used = 0
        for call, (step, layer) in enumerate(zip(steps, layers, strict=True)):
            target = call_at.get((step, layer + distance))
            guess = values[bounds[call] : bounds[call + 1]]
            if target is None or not guess or is_prefill[target]:
                continue
            used = experts[starts[target] : starts[target + 1]]
            num_found += len(set(used) & set(guess[: len(used)]))
            num_used += len(used)
        if num_used:
            recalls[distance] = num_found / num_used
    return recalls
