"""How many reads a disk is given at once: tried while it is busy anyway, and then kept."""

from __future__ import annotations

DEPTHS = (1, 2, 4, 8)
_WINDOW_BYTES = 64 << 20
_WINDOWS = 2  # each depth is tried so often: the best of them counts
_ENOUGH = 0.95  # of the best rate
_BUSY = 0.75  # of the depth: fewer reads than that were wanted, so the window says nothing


class DepthTuner:
    """Tries each depth, then chooses the smallest whose rate is near the best. Pure: it is told what was read."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}  # depth -> best bytes a second seen
        self._trials = [depth for _ in range(_WINDOWS) for depth in DEPTHS]
        self.depth = self._trials[0]
        self._reset()

    @property
    def is_done(self) -> bool:
        return not self._trials

    def note(self, seconds: float, reading: int) -> None:
        """So long, so many reads were under way."""
        self._busy_s += seconds if reading else 0.0
        self._read_s += seconds * reading

    def note_bytes(self, num_bytes: int) -> None:
        """A read ended."""
        if self.is_done:
            return
        self._bytes += num_bytes
        if self._bytes < _WINDOW_BYTES:
            return
        if self._read_s >= _BUSY * self.depth * self._busy_s > 0:
            self._trials.pop(0)
            self.rates[self.depth] = max(self.rates.get(self.depth, 0.0), self._bytes / self._busy_s)
            self.depth = self._trials[0] if self._trials else self._choose()
        self._reset()

    def _choose(self) -> int:
        best = max(self.rates.values())
        return min(depth for depth, rate in self.rates.items() if rate >= _ENOUGH * best)

    def _reset(self) -> None:
        self._bytes, self._busy_s, self._read_s = 0, 0.0, 0.0
