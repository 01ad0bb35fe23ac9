"""How fast experts are copied in the background: within a share of what the disk or the link was measured to give.

Pure: times are given, in seconds of one clock that never goes back.
"""

from __future__ import annotations

DEFAULT_SHARE = 0.25


class ReplicationBudget:
    """Spaces reads so that over any time they take at most ``share`` of the measured bandwidth, and one read more.

    ``most_bytes_per_s``: never faster than that. What is not used is not saved up.
    """

    def __init__(self, share: float = DEFAULT_SHARE, most_bytes_per_s: float | None = None) -> None:
        assert 0 < share <= 1 and (most_bytes_per_s is None or most_bytes_per_s > 0)
        self._share, self._most = share, most_bytes_per_s
        self._free_at_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next read may begin; 0: it may now."""
        return max(0.0, self._free_at_s - now_s)

    def spend(self, now_s: float, num_bytes: int, bandwidth: float) -> None:
        """A read begins. ``bandwidth``: bytes a second measured where it reads; 0: not known, so this read tells."""
        assert self.wait_s(now_s) == 0 and num_bytes > 0
        rates = [rate for rate in (self._share * bandwidth, self._most) if rate]
        self._free_at_s = now_s + num_bytes / min(rates) if rates else now_s
