"""Whether loading experts ahead of need pays; off by itself when it does not, tried again later.

Every prefetch ends in one of three ways:

- *used*: a layer needed the expert after its load was complete.
- *late*: a layer needed it while it was still loading; only what was read by then was saved.
- *wasted*: it was evicted, cancelled, or contradicted by the routing of the layer it was meant for, before any layer
  needed it.

Saved is the time in which the disk would have read, with a layer waiting, what was there already. The cost is reading
what was wasted (times ``_WASTE_WEIGHT``: it is done in spare time, but shares memory and disk with the demand), and
that the cache holds it and not its victim: the victim's load if that is missed, less its own if it is used later after
all. What a used prefetch evicts costs nothing: the demand load it replaced would have evicted as well.

Pure: times are given; nothing here reads a clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Literal

from moray.runtime.prefetch.budget import RateMeter

State = Literal["on", "off", "probing"]
Fate = Literal["used", "late", "wasted"]

_WINDOW = 512  # prefetches, and hints, that a decision looks back on
_LEAST = 128  # before the first decision
_PROBE = 64
_WASTE_WEIGHT = 0.4
PAYS_FROM = _WASTE_WEIGHT / (1 + _WASTE_WEIGHT)  # 29 % needed; routers that choose 2 of 8 reach 25 % by chance
_MARGIN = 1.25  # saved over cost that turns it on again
_LEAST_ADMITTED = 0.02  # of hints: below that the disk has no time for them
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 64.0


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """Since the start. ``num_missed``: experts that were needed, not in memory, and not on their way."""

    state: State
    reason: str
    num_begun: int
    num_used: int
    num_late: int
    num_wasted: int
    num_used_after: int  # of the wasted: contradicted, but used in the end
    num_missed: int
    num_refused: int  # within no budget
    num_unlikely: int  # predictions of a kind that seldom comes true
    used_bytes: int
    late_bytes: int
    wasted_bytes: int
    saved_s: float
    cost_s: float

    @property
    def precision(self) -> float:
        """Of the prefetches that ended, the part that was needed; 0 if none did."""
        needed = self.num_used + self.num_late
        return needed / max(1, needed + self.num_wasted)

    @property
    def recall(self) -> float:
        """Of the experts that would have been missed, the part that was on its way or there; 0 if none would."""
        needed = self.num_used + self.num_late
        return needed / max(1, needed + self.num_missed)


@dataclass(slots=True, eq=False)
class _Prefetch:
    num_bytes: int
    fate: Fate | None = None
    read_bytes: int = 0  # of a late or wasted one, when that was known
    saved_s: float = 0.0
    cost_s: float = 0.0
    victim_cost_s: float = 0.0
    later_use_s: float = 0.0


class PayoffTracker:
    """Counts what becomes of prefetches and decides. Experts are numbers, as in ``residency/policy.py``.

    ``state``: "on"; "off" for a pause that doubles from 2 to 64 s; then "probing", until 64 prefetches have shown
    whether it pays again.
    """

    def __init__(self, meter: RateMeter) -> None:
        self._meter = meter
        self._state: State = "on"
        self._reason = "prefetch is on"
        self._open: dict[int, _Prefetch] = {}
        self._kept: dict[int, _Prefetch] = {}  # contradicted, and still in memory
        self._victims: OrderedDict[int, _Prefetch] = OrderedDict()
        self._recent: deque[_Prefetch] = deque(maxlen=_WINDOW)
        self._admissions: deque[bool] = deque(maxlen=_WINDOW)
        self._counts: dict[Fate, int] = {"used": 0, "late": 0, "wasted": 0}
        self._bytes: dict[Fate, int] = {"used": 0, "late": 0, "wasted": 0}
        self._num_begun = self._num_missed = self._num_refused = self._num_unlikely = self._num_used_after = 0
        self._saved_s = self._cost_s = 0.0
        self._pause_s, self._resume_s = _FIRST_PAUSE_S, 0.0

    @property
    def state(self) -> State:
        return self._state

    @property
    def reason(self) -> str:
        """Why it is on or off, in words."""
        return self._reason

    def stats(self) -> PrefetchStats:
        counts, read = self._counts, self._bytes
        return PrefetchStats(
            self._state, self._reason, self._num_begun, counts["used"], counts["late"], counts["wasted"],
            self._num_used_after, self._num_missed, self._num_refused, self._num_unlikely,
            read["used"], read["late"], read["wasted"], self._saved_s, self._cost_s,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- events

    def began(self, expert: int, num_bytes: int, victim: int | None = None) -> None:
        """A prefetch was admitted; ``victim`` was evicted for it."""
        assert expert not in self._open, f"expert {expert} is being prefetched already"
        prefetch = _Prefetch(num_bytes)
        self._open[expert] = prefetch
        self._num_begun += 1
        self._admissions.append(True)
        self._victims.pop(expert, None)
        self._kept.pop(expert, None)
        if victim is not None:
            self._victims[victim] = prefetch
            if len(self._victims) > _WINDOW:
                self._victims.popitem(last=False)

    def refused(self) -> None:
        """A hint was within no budget."""
        self._num_refused += 1
        self._admissions.append(False)

    def unlikely(self) -> None:
        """A hint was not acted on, because its kind seldom comes true."""
        self._num_unlikely += 1

    def needed(self, expert: int, num_bytes: int, loaded_bytes: int) -> None:
        """A layer needs an expert, of whose ``num_bytes`` so many are in memory. For hits and misses alike."""
        assert 0 <= loaded_bytes <= num_bytes
        if expert in self._open:
            self._end(expert, "used" if loaded_bytes == num_bytes else "late", loaded_bytes)
        elif expert in self._kept:
            prefetch = self._kept.pop(expert)
            self._num_used_after += 1
            prefetch.later_use_s = self._seconds(num_bytes)
            self._charge(prefetch)
        elif loaded_bytes < num_bytes:
            self._num_missed += 1
            cause = self._victims.pop(expert, None)
            if cause is not None:
                cause.victim_cost_s = self._seconds(num_bytes)
                if cause.fate == "wasted":
                    self._charge(cause)

    def contradicted(self, expert: int, num_bytes: int) -> None:
        """The layer that a loaded prefetch was meant for does not need it. It stays in memory."""
        if expert in self._open:
            self._kept[expert] = self._open[expert]
            self._end(expert, "wasted", num_bytes)

    def dropped(self, expert: int, read_bytes: int) -> None:
        """An expert was evicted, or its load was cancelled when so many bytes had been read. For any expert."""
        self._kept.pop(expert, None)
        if expert in self._open:
            self._end(expert, "wasted", read_bytes)

    # ----------------------------------------------------------------------------------- decision

    def is_on(self, now_s: float) -> bool:
        """Whether hints are to be acted on now. To be asked before hints are admitted, at least once a step."""
        if self._state == "off":
            if now_s >= self._resume_s:
                self._change("probing", "prefetch is being tried again")
        elif reason := self._no_time() or self._no_gain():
            self._resume_s = now_s + self._pause_s
            self._change("off", f"prefetch is off: {reason}; next try in {self._pause_s:.0f} s")
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif self._state == "probing" and len(self._recent) >= _PROBE:
            self._pause_s = _FIRST_PAUSE_S
            self._state, self._reason = "on", f"prefetch is on again: {self._tell()}"
        return self._state != "off"

    def validate(self) -> None:
        """Every prefetch is open or has ended in one way."""
        assert self._num_begun == len(self._open) + sum(self._counts.values())
        assert all(prefetch.fate is None for prefetch in self._open.values())
        assert all(prefetch.fate is not None for prefetch in self._recent)
        assert all(prefetch.fate == "wasted" for prefetch in self._kept.values())
        assert len(self._victims) <= _WINDOW

    def _no_time(self) -> str:
        least = _PROBE if self._state == "probing" else _LEAST
        num_hints, num_admitted = len(self._admissions), sum(self._admissions)
        if num_hints < least or num_admitted > _LEAST_ADMITTED * num_hints:
            return ""
        return f"the disk had time for {num_admitted} of {num_hints} hints"

    def _no_gain(self) -> str:
        is_probe = self._state == "probing"
        if len(self._recent) < (_PROBE if is_probe else _LEAST):
            return ""
        saved_s, cost_s = self._balance()
        return self._tell() if saved_s < (_MARGIN if is_probe else 1.0) * cost_s else ""

    def _balance(self) -> tuple[float, float]:
        return sum(p.saved_s for p in self._recent), sum(p.cost_s for p in self._recent)

    def _tell(self) -> str:
        total = len(self._recent)
        used, late = (100 * sum(p.fate == fate for p in self._recent) / total for fate in ("used", "late"))
        saved_s, cost_s = self._balance()
        return (
            f"of {total} experts loaded ahead {used:.0f} % were used and {late:.0f} % came too late, which saved "
            f"{saved_s:.3g} s of waiting and cost {cost_s:.3g} s"
        )

    def _change(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason
        self._recent.clear()
        self._admissions.clear()

    def _end(self, expert: int, fate: Fate, read_bytes: int) -> None:
        prefetch = self._open.pop(expert)
        prefetch.fate, prefetch.read_bytes = fate, read_bytes
        self._counts[fate] += 1
        self._bytes[fate] += read_bytes
        if fate == "wasted":
            self._charge(prefetch)
        else:
            prefetch.saved_s = self._seconds(read_bytes)
            self._saved_s += prefetch.saved_s
        if self._state != "off":
            self._recent.append(prefetch)

    def _charge(self, prefetch: _Prefetch) -> None:
        """What a wasted prefetch costs, as far as it is known."""
        cost_s = _WASTE_WEIGHT * self._seconds(prefetch.read_bytes) + prefetch.victim_cost_s - prefetch.later_use_s
        self._cost_s += cost_s - prefetch.cost_s
        prefetch.cost_s = cost_s

    def _seconds(self, num_bytes: int) -> float:
        bandwidth = self._meter.bandwidth
        return num_bytes / bandwidth if bandwidth else 0.0
