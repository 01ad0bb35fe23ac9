"""Whether prefetch makes steps shorter: tried, with and without, on the running system.

What a prefetch saves and costs cannot all be counted where shards are loaded: reading ahead takes cores and memory
bandwidth from what is computed beside it, and places in the cache. So steps are compared. Pure: seconds are given.
"""

from __future__ import annotations

from statistics import median

MOST_TOKENS = 16  # of a step that counts: larger ones are prompts
_SETTLING = 4  # steps after a change that do not count
_WINDOW = 12  # steps of a turn that count
_TURNS = 4  # on, off, on, off
_GAIN = 0.98  # prefetch stays if its steps take at most this share of the others
_FIRST_HOLD, _LONGEST_HOLD = 256, 4096  # steps until it is tried again; doubles while the answer stays the same


class PrefetchTrial:
    """Told of every step's time, says whether to prefetch in the next one."""

    def __init__(self) -> None:
        self.is_on = True
        self.reason = "on, and being tried"
        self._times: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}  # by tokens in a step
        self._turn, self._in_turn = 0, 0
        self._hold, self._next_hold, self._verdict = 0, _FIRST_HOLD, True

    def note_step(self, seconds: float, num_tokens: int) -> None:
        """A step over so many tokens has ended, computed with or without prefetch as ``is_on`` says."""
        if num_tokens > MOST_TOKENS:
            return
        if self._hold:
            self._hold -= 1
            if not self._hold:
                self._try_anew()
        else:
            self._measure(seconds, num_tokens)

    def _try_anew(self) -> None:
        self._times = {True: {}, False: {}}
        self._turn, self._in_turn, self.is_on = 0, 0, True

    def _measure(self, seconds: float, num_tokens: int) -> None:
        self._in_turn += 1
        if self._in_turn > _SETTLING:
            self._times[self.is_on].setdefault(num_tokens, []).append(seconds)
        if self._in_turn < _SETTLING + _WINDOW:
            return
        self._turn, self._in_turn, self.is_on = self._turn + 1, 0, not self.is_on
        if self._turn == _TURNS:
            self._decide()

    def _decide(self) -> None:
        pairs = [(self._times[True][n], self._times[False][n]) for n in self._times[True] if n in self._times[False]]
        if not pairs:
            return self._try_anew()
        took, took_without = (sum(min(map(len, pair)) * median(pair[i]) for pair in pairs) for i in (0, 1))
        self.is_on = took <= _GAIN * took_without
        self._next_hold = min(2 * self._next_hold, _LONGEST_HOLD) if self.is_on == self._verdict else _FIRST_HOLD
        self._hold, self._verdict = self._next_hold, self.is_on
        self.reason = (
            f"{'on' if self.is_on else 'off'}: steps took {took / took_without:.2f} times as long with it as without; "
            f"tried again after {self._hold} steps"
        )
