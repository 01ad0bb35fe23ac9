"""How many bytes may be loaded ahead of need: what the disk can read in the time it would otherwise idle.

Pure: times are given, in seconds of one clock that never goes back; nothing here reads a clock, a file or a socket.
"""

from __future__ import annotations

_KEPT_OF_RATE = 0.95  # what is left of a read's weight after the next one
_KEPT_OF_SPARE = 0.9
_LONGEST_WINDOW_S = 1.0  # longer pauses are between requests, not between layers


class RateMeter:
    """Moving averages of the disk's bandwidth and of the spare time between two layers' demands.

    Bandwidth is a ratio of sums, so that a small read counts for little.
    """

    def __init__(self) -> None:
        self._bytes = self._busy_s = 0.0
        self._spare_s: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second; 0 before the first read."""
        return self._bytes / self._busy_s if self._busy_s else 0.0

    @property
    def spare_s(self) -> float:
        """Seconds from the end of one layer's demand loads to the next demand; 0 before the first."""
        return self._spare_s or 0.0

    @property
    def window_bytes(self) -> float:
        """What the disk can read in the spare time of one layer."""
        return self.bandwidth * self.spare_s

    def record_read(self, num_bytes: int, busy_s: float) -> None:
        """A read is complete. ``busy_s``: the wall time it took; of reads in flight together, its share of theirs."""
        assert num_bytes >= 0 and busy_s >= 0
        self._bytes = _KEPT_OF_RATE * self._bytes + num_bytes
        self._busy_s = _KEPT_OF_RATE * self._busy_s + busy_s

    def record_spare(self, spare_s: float) -> None:
        """One layer's spare time; pauses between requests are left out."""
        assert spare_s >= 0
        if spare_s <= _LONGEST_WINDOW_S:
            kept = _KEPT_OF_SPARE if self._spare_s is not None else 0.0
            self._spare_s = kept * self.spare_s + (1 - kept) * spare_s


class PrefetchBudget:
    """Admits loads ahead of need: per window at most ``share`` of bandwidth x spare time (the overlap budget of
    MoE-Infinity), a window being the time between two layers' demands.

    What a window leaves is carried, up to ``num_carried`` windows' worth. A load is admitted while anything is left,
    even if it is bigger than that: it is read in pieces and waits while there is demand, and the windows to come pay
    for the rest before another is admitted. So all that was ever admitted is less than what all windows gave and one
    load more.

    Events, in the order of time: ``need_arrived`` and ``demand_ended`` around a layer's demand loads, ``layer_passed``
    for a layer that is heard of (by its uses or hints) and had to load nothing.
    """

    def __init__(self, meter: RateMeter, share: float = 0.8, num_carried: int = 4) -> None:
        assert 0 < share <= 1 and num_carried >= 1
        self._meter, self._share, self._num_carried = meter, share, num_carried
        self._credit = 0.0
        self._opened_s: float | None = None

    @property
    def credit_bytes(self) -> float:
        """What may still be admitted; negative while the windows pay for a load bigger than what was left."""
        return self._credit

    def need_arrived(self, now_s: float) -> None:
        """A layer asks for experts that are not in memory: the disk is the demand's until ``demand_ended``."""
        self._meter.record_spare(self._close(now_s))

    def demand_ended(self, now_s: float) -> None:
        """The last load that a layer waits for is complete."""
        self._open(now_s)

    def layer_passed(self, now_s: float) -> None:
        """A layer had all it needed. To be called only while no demand load is under way."""
        if self._opened_s is not None:
            self._meter.record_spare(self._close(now_s))
        self._open(now_s)

    def admit(self, num_bytes: int) -> bool:
        """Whether a load of so many bytes may begin now; if so they are spent."""
        assert num_bytes > 0
        if self._credit <= 0 or self._window_bytes <= 0:
            return False
        self._credit -= num_bytes
        return True

    def refund(self, num_bytes: int) -> None:
        """Bytes of an admitted load that were not read: it was cancelled, or demand took it over."""
        assert num_bytes >= 0
        self._credit = min(self._credit + num_bytes, max(self._credit, self._most))

    @property
    def _window_bytes(self) -> float:
        return self._share * self._meter.window_bytes

    @property
    def _most(self) -> float:
        return self._num_carried * self._window_bytes

    def _open(self, now_s: float) -> None:
        self._opened_s = now_s
        self._credit = min(self._credit + self._window_bytes, self._most)

    def _close(self, now_s: float) -> float:
        """Seconds since the window was opened; 0 if none is: the next demand came before the last one ended."""
        opened_s, self._opened_s = self._opened_s, None
        return 0.0 if opened_s is None else now_s - opened_s
