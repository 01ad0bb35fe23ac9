"""How fast each resource is on the running system: moving averages of what was measured while it worked."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from moray.runtime.lanes.lane import Resource

T = TypeVar("T")

_SMOOTHING = 0.05  # weight of the newest observation
_INERTIA = 0.01  # weight of what was believed before, where observations leave it open
_LEAST_WORKED = 0.1  # of the time that a piece of work took: what is not its fixed cost
_TOLERANCE = 0.05  # of a rate, before choices follow
_MUCH = 0.25  # of a rate, before they follow at once
_MOST_REMEMBERED = 4096  # questions whose answers are kept
_OLD_ANSWERS = 16  # times that an answer is given again after rates have changed
_LARGEST_CHANGE = 4.0  # an observation counts as at most so many times too slow or too fast: a process that was stopped


class Rate(NamedTuple):
    """What a piece of work costs a resource: s for each piece, byte and token, added up."""

    fixed_s: float
    byte_s: float
    token_s: float

    def seconds(self, num_bytes: float, tokens: float) -> float:
        return self.fixed_s + num_bytes * self.byte_s + tokens * self.token_s


#: Before anything was measured: an ordinary PC. The first observation replaces the size, not the proportions.
_CPU = Rate(2e-6, 1 / 15e9, 2e-6)
_STARTING = {
    Resource.CPU: _CPU,
    Resource.DEVICE: Rate(1e-4, 1 / 100e9, 1e-6),
    Resource.LINK: Rate(1e-5, 1 / 10e9, 0.0),
    Resource.DISK: Rate(1e-4, 1 / 2e9, 0.0),
}
_SMALLEST = Rate(0.0, 1e-15, 1e-8)  # s; below, a term would never grow again
_NETWORK = Rate(5e-4, 1 / 0.1e9, 0.0)


@dataclass(frozen=True, slots=True)
class ResourceRate:
    """A snapshot of one resource. Bytes are of shards; on a network, of whatever is sent."""

    name: str
    num_observations: int
    fixed_us: float  # a piece of work
    token_us: float
    bytes_per_s: float  # alone
    bytes_per_s_together: float  # while others on the same memory bus work


@dataclass(frozen=True, slots=True)
class RatesSnapshot:
    resources: tuple[ResourceRate, ...]

    def __getitem__(self, name: str) -> ResourceRate:
        return next(resource for resource in self.resources if resource.name == name)


class _Fit:
    """Seconds of a byte and of a token by least squares of relative errors, older observations counting less.

    What the observations leave open (decoding has always as many bytes a token) stays in the proportions it had.
    """

    def __init__(self) -> None:
        self._bb = self._bt = self._tt = self._b = self._t = self._weight = 0.0  # the normal equations

    def update(self, rate: Rate, num_bytes: int, tokens: int, seconds: float) -> Rate:
        worked_s = max(seconds - rate.fixed_s, _LEAST_WORKED * seconds)
        b, t, keep = num_bytes / worked_s, tokens / worked_s, 1 - _SMOOTHING
        self._bb, self._bt, self._tt = keep * self._bb + b * b, keep * self._bt + b * t, keep * self._tt + t * t
        self._b, self._t, self._weight = keep * self._b + b, keep * self._t + t, keep * self._weight + 1
        stay_b = _INERTIA * self._weight / max(rate.byte_s, _SMALLEST.byte_s) ** 2
        stay_t = _INERTIA * self._weight / max(rate.token_s, _SMALLEST.token_s) ** 2
        bb, tt = self._bb + stay_b, self._tt + stay_t
        right_b, right_t = self._b + stay_b * rate.byte_s, self._t + stay_t * rate.token_s
        determinant = bb * tt - self._bt * self._bt
        byte_s = (right_b * tt - right_t * self._bt) / determinant
        token_s = (right_t * bb - right_b * self._bt) / determinant
        if token_s < 0:
            byte_s, token_s = right_b / bb, 0.0
        elif byte_s < _SMALLEST.byte_s:
            token_s = right_t / tt
        return Rate(rate.fixed_s, max(byte_s, _SMALLEST.byte_s), token_s)


class Rates:
    """A rate for each resource, alone and together with others. Written and read by the step loop's thread.

    ``alone`` and ``together`` are what lanes are chosen by: they follow what is measured once it is 5 % away, so that
    jitter changes no choice. Nothing is cheaper together than alone; what looks so is noise. Of a network, ``fixed_s``
    is a request's, of which a host gets one a layer.
    """

    def __init__(self, num_remotes: int = 0, token_bytes: float = 0) -> None:
        """``token_bytes``: of one token's activations on the network, one way."""
        starting = [_STARTING[resource] for resource in Resource] + num_remotes * [_NETWORK, _CPU]
        self.names = [resource.name.lower() for resource in Resource]
        self.names += [f"{kind}-{i}" for i in range(num_remotes) for kind in ("network", "remote-cpu")]
        self.token_bytes = token_bytes
        self.alone, self.together = list(starting), list(starting)
        self.company_costs = False  # whether any resource is slower together than alone
        self._version = 0  # of the rates that choices follow
        self._emptied_at = list(zip(starting, starting, strict=True))  # the rates when ``choices`` was last emptied
        self.choices: dict[
            Hashable, tuple[Any, int, int]
        ] = {}  # answers that follow from ``alone`` and ``together``: see ``remember``
        self._measured = (list(starting), list(starting))  # alone, together
        self._counts = [[0, 0] for _ in starting]
        self._fits = ([_Fit() for _ in starting], [_Fit() for _ in starting])

    @property
    def num_resources(self) -> int:
        return len(self.alone)

    def add_remote(self) -> int:
        """Room for one more remote host. Returns its number."""
        remote = (self.num_resources - len(Resource)) // 2
        for kind, rate in (("network", _NETWORK), ("remote-cpu", _CPU)):
            self.names.append(f"{kind}-{remote}")
            for table in (self.alone, self.together, *self._measured):
                table.append(rate)
            self._counts.append([0, 0])
            for fits in self._fits:
                fits.append(_Fit())
        self._forget()
        return remote

    def observe(self, resource: int, num_bytes: int, tokens: int, seconds: float, concurrent: bool) -> None:
        """A completed piece of work: its bytes, its (token, expert) pairs and how long the resource worked on it.

        ``concurrent``: another resource on the memory bus was busy meanwhile.
        """
        counts, table = self._counts[resource], self._measured[concurrent]
        rate = table[resource]
        expected = rate.seconds(num_bytes, tokens)
        if seconds <= 0 or expected <= rate.fixed_s:
            return
        if counts[concurrent] == 0:
            scale = max(seconds - rate.fixed_s, _LEAST_WORKED * seconds) / (expected - rate.fixed_s)
            rate = Rate(rate.fixed_s, scale * rate.byte_s, scale * rate.token_s)
        else:
            seconds = min(max(seconds, expected / _LARGEST_CHANGE), expected * _LARGEST_CHANGE)
        table[resource] = self._fits[concurrent][resource].update(rate, num_bytes, tokens, seconds)
        if counts[not concurrent] == 0:  # nothing better is known about the other
            self._measured[not concurrent][resource] = table[resource]
        counts[concurrent] += 1
        self._publish(resource)

    def seed(self, resource: int, alone: Rate, together: Rate) -> None:
        """What a calibration measured, in place of all observations so far."""
        self._measured[False][resource], self._measured[True][resource] = alone, together
        self._counts[resource] = [1, 1]
        self._publish(resource)
        self._forget()

    def follow(self, resource: int, rate: Rate) -> None:
        """A rate that is averaged elsewhere has moved."""
        self._measured[False][resource] = self._measured[True][resource] = rate
        self._publish(resource)

    def remember(self, question: Hashable, find: Callable[[], T]) -> T:
        """What ``find`` gives, or gave before. When rates have moved a little since, that is good for a few times more:
        they never rest, and finding out again takes as long as computing an expert.
        """
        kept: tuple[T | None, int, int] = self.choices.get(question, (None, self._version, 0))
        answer, version, times_left = kept
        if answer is None or (version != self._version and not times_left):
            answer = find()
            if len(self.choices) >= _MOST_REMEMBERED:
                self.choices.clear()
            self.choices[question] = (answer, self._version, _OLD_ANSWERS)
        elif version != self._version:
            self.choices[question] = (answer, version, times_left - 1)
        return answer

    def snapshot(self) -> RatesSnapshot:
        return RatesSnapshot(
            tuple(
                ResourceRate(name, sum(count), 1e6 * a.fixed_s, 1e6 * a.token_s, 1 / a.byte_s, 1 / t.byte_s)
                for name, count, a, t in zip(self.names, self._counts, *self._measured, strict=True)
            )
        )

    def validate(self) -> None:
        """Raises AssertionError unless all rates are positive, none is cheaper in company, and all are up to date."""
        assert len(self.names) == len(self.together) == len(self.alone)
        assert self.company_costs == (self.together != self.alone)
        for resource, (alone, together) in enumerate(zip(self.alone, self.together, strict=True)):
            assert alone.byte_s > 0 and min(alone) >= 0, alone
            assert all(t >= a for a, t in zip(alone, together, strict=True)), (alone, together)
            assert not _differ((self._measured[False][resource],), (alone,), _TOLERANCE)

    def _publish(self, resource: int) -> None:
        alone = self._measured[False][resource]
        together = Rate(*[max(pair) for pair in zip(alone, self._measured[True][resource], strict=True)])
        before = (self.alone[resource], self.together[resource])
        if _differ((alone, together), before, _TOLERANCE):
            self.alone[resource], self.together[resource] = alone, together
            self.company_costs = self.together != self.alone
            self._version += 1
            if _differ((alone, together), self._emptied_at[resource], _MUCH):
                self._forget()

    def _forget(self) -> None:
        self.choices.clear()
        self._emptied_at = list(zip(self.alone, self.together, strict=True))


def _differ(rates: tuple[Rate, ...], others: tuple[Rate, ...], tolerance: float) -> bool:
    pairs = [pair for rate, other in zip(rates, others, strict=True) for pair in zip(rate, other, strict=True)]
    return any([abs(x - y) > tolerance * y for x, y in pairs])
