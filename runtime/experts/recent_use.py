"""How much each expert was used of late, for those who watch: from the meter's counts, whoever asks how often."""

from __future__ import annotations

import threading
from math import exp

import numpy as np

from moray.runtime.arrays import Bytes, Ints

_MEMORY_S = 3.0  # what is longer ago counts less than 1/e
_LEAST_SCALE = 8.0  # tokens that the brightest expert stands for, at least: a few do not look like many


class RecentUse:
    """A moving sum of each expert's tokens, exponentially weighted. May be asked from any thread."""

    def __init__(self, tokens: list[Ints], now: float) -> None:
        """``tokens``: int64 [E] of each layer, the meter's own counts. ``now``: seconds, as of ``levels``."""
        self._tokens = tokens
        self._seen = [counts.copy() for counts in tokens]
        self._heat = [np.zeros(len(counts), dtype=np.float64) for counts in tokens]
        self._at = now
        self._lock = threading.Lock()

    def levels(self, now: float) -> list[Bytes]:
        """uint8 [E] of each layer: 0 not used of late, 255 the most used expert of all; logarithmic.

        What came since the last call is taken to have come evenly, so the answer does not depend on who else asks.
        """
        with self._lock:
            passed = max(now - self._at, 1e-6) / _MEMORY_S
            kept = exp(-passed)
            self._at = now
            for counts, seen, heat in zip(self._tokens, self._seen, self._heat, strict=True):
                current = counts.copy()
                heat *= kept
                heat += (current - seen) * ((1 - kept) / passed)
                seen[:] = current
            most = max([_LEAST_SCALE, *(float(heat.max(initial=0)) for heat in self._heat)])
            scale = 255 / np.log1p(most)
            return [np.rint(scale * np.log1p(heat)).astype(np.uint8) for heat in self._heat]
