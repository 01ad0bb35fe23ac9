"""Whether a remote host is given work: deadlines from what was measured, and what follows when one passes.

Pure: no sockets, no clock; ``now`` is the caller's, in seconds.

    DOWN -> UP          it said Welcome, and was measured
    UP -> SUSPECTED     it missed a deadline; its work is done elsewhere, and it is pinged
    SUSPECTED -> UP     it was heard again, and its penalty is over
    any -> DOWN         the connection is gone, it does not know us, or it was not heard for long
"""

from __future__ import annotations

from enum import Enum
from math import inf

FLOOR_S = 0.05  # of a deadline: what an ordinary scheduler or network may take at times
CAP_S = 0.9  # so that a lost host costs less than a second
LONGEST_S = 0.25  # of one request, expected; more work goes in several requests, each with a deadline
_PATIENCE = 4.0  # deviations from what was expected, as in TCP's retransmission timer (RFC 6298)
_MARGIN = 2.0  # times what was expected
_GAIN = 0.25
_FIRST_PENALTY_S, _LAST_PENALTY_S = 0.1, 10.0
_TIMES_WAITED = 2.0  # so long a host is left out at least: at most a third of the time is lost to it
_FIRST_PROBE_S, _LAST_PROBE_S = 0.05, 2.0
_SILENCE_S = 10.0  # a suspected host that was not heard for so long must introduce itself again
_IDLE_PING_S = 1.0


class HostState(Enum):
    UP = "up"
    SUSPECTED = "suspected"
    DOWN = "down"


class Probe(Enum):
    HELLO = "hello"
    PING = "ping"


class HostHealth:
    """One host's."""

    def __init__(self, now: float) -> None:
        self.state = HostState.DOWN
        self._deviation_s = 0.0
        self._is_measured = False
        self._penalty_s = 0.0
        self._trusted_at = now
        self._probe_at, self._probe_s = now, _FIRST_PROBE_S
        self._heard_at = now

    def deadline_s(self, expected_s: float) -> float:
        """From sending, or from the host's last reply, to the next one, which is expected after so long."""
        if not self._is_measured:
            return CAP_S
        return min(max(_MARGIN * expected_s + _PATIENCE * self._deviation_s, FLOOR_S), CAP_S)

    def joined(self, now: float) -> None:
        """It is ready for work."""
        self.state, self._heard_at = HostState.UP, now
        self._probe_at, self._probe_s = now + _IDLE_PING_S, _FIRST_PROBE_S

    def answered(self, now: float, expected_s: float, took_s: float) -> None:
        """It replied in time."""
        error = abs(took_s - expected_s)
        self._deviation_s = error if not self._is_measured else self._deviation_s + _GAIN * (error - self._deviation_s)
        self._is_measured = True
        self._penalty_s *= 1 - _GAIN
        self.heard(now)

    def missed(self, now: float, waited_s: float = 0.0) -> None:
        """A deadline passed after so long. Each one in a row keeps it out for longer.

        What had to be waited for long comes too late again if it is asked at once, for every layer of a token.
        """
        if self.state is HostState.UP:
            self.state = HostState.SUSPECTED
            self._trusted_at = now + max(self._penalty_s, _TIMES_WAITED * (waited_s - FLOOR_S))
            self._penalty_s = min(max(2 * self._penalty_s, _FIRST_PENALTY_S), _LAST_PENALTY_S)
            self._probe_at, self._probe_s = now, _FIRST_PROBE_S

    def heard(self, now: float) -> None:
        """Anything came from it, also a reply that is too late."""
        self._heard_at = now
        if self.state is HostState.UP:
            self._probe_at = now + _IDLE_PING_S
        elif self.state is HostState.SUSPECTED and now >= self._trusted_at:
            self.state = HostState.UP

    def lost(self, now: float) -> None:
        """It must introduce itself again."""
        if self.state is not HostState.DOWN:
            self.state = HostState.DOWN
            self._probe_at, self._probe_s = now, _FIRST_PROBE_S

    def probe(self, now: float) -> Probe | None:
        """What to send now. More and more seldom while nothing comes back."""
        if self.state is HostState.SUSPECTED and now - self._heard_at > _SILENCE_S:
            self.lost(now)
        if now < self._probe_at:
            return None
        if self.state is HostState.UP:
            self._probe_at = now + _IDLE_PING_S
            return Probe.PING
        self._probe_at = now + self._probe_s
        self._probe_s = min(2 * self._probe_s, _LAST_PROBE_S)
        return Probe.HELLO if self.state is HostState.DOWN else Probe.PING


class LinkRate:
    """Seconds of a round trip and of a byte on the way to a host and back: moving averages."""

    _SMALL = 32 << 10  # bytes: below, a message's time is the round trip's
    _GAIN = 0.1
    _SOONER = 0.8  # of what was expected: what is believed of a reply that was there before anybody waited for it

    def __init__(self) -> None:
        self.round_trip_s, self.byte_s = 5e-4, 1 / 100e6  # an ordinary network, before anything was measured
        self._counts = [0, 0]
        self._least_s = inf  # of the round trips that were measured

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A request and its reply were so long under way, the host's own work not included."""
        if num_bytes < self._SMALL:
            seconds = max(seconds, 1e-6)
            self._least_s = min(self._least_s, seconds)
            self.round_trip_s = self._mean(0, self.round_trip_s, seconds)
            self._bound(num_bytes, seconds)
        else:
            self.byte_s = self._mean(1, self.byte_s, max(seconds - self.round_trip_s, 1e-9) / num_bytes)

    def settle(self) -> None:
        """The trials are over: of their round trips the shortest is the network's, the others met with something."""
        self.round_trip_s = min(self.round_trip_s, self._least_s)

    def observe_early(self, num_bytes: int, most_s: float) -> None:
        """A reply was there when it was looked for, so it took no longer than this, and nobody knows how much less.
        Were only late ones counted, the host would get ever less work, and ever more of the rest be early. (A large
        one says nothing of the round trip.)
        """
        self._bound(num_bytes, most_s)
        if num_bytes >= self._SMALL:
            return
        likely_s = max(self._SOONER * min(self.round_trip_s, max(most_s, 0.0)), self._least_s)
        if likely_s < self.round_trip_s:
            self.round_trip_s = self._mean(0, self.round_trip_s, likely_s)

    def seconds(self, num_bytes: int) -> float:
        return self.round_trip_s + num_bytes * self.byte_s

    def _bound(self, num_bytes: int, most_s: float) -> None:
        """So many bytes took no longer than this: they cost at most so much each. A link that was measured while it, or
        the host, stood still would else stay slow for ever, if messages are small."""
        if num_bytes > 0 and most_s > 0:
            self.byte_s = min(self.byte_s, most_s / num_bytes)

    def _mean(self, kind: int, mean: float, value: float) -> float:
        self._counts[kind] += 1
        return mean + max(self._GAIN, 1 / self._counts[kind]) * (value - mean)
