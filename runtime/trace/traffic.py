"""A store's recent traffic: which experts its last tokens used, kept for choosing a policy at the next start.

One file a store, ``~/.local/state/moray/traffic/<fingerprint>.msgpack``. It is bounded, and written whole or not at
all. Nothing depends on it: whatever is wrong with it, it is as if there were none.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgpack

from moray.runtime.residency.policies import POLICIES
from moray.runtime.store.receipt import write_aside
from moray.runtime.trace.simulate import hit_rates

_FORMAT = 1
_MAX_TOKENS = 4000
_MAX_USES = 300_000  # replaying them takes about a second
_MIN_USES_PER_EXPERT = 8  # on average, before traffic says something about policies


class Choice(NamedTuple):
    """A policy, and why."""

    policy: str
    reason: str


def traffic_file(fingerprint: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "moray" / "traffic" / f"{fingerprint}.msgpack"


class TrafficRecorder:
    """Keeps the last choices of a run. Not for several threads at once. Nothing raises."""

    def __init__(self, fingerprint: str, num_experts: Sequence[int]) -> None:
        self.error: str | None = None  # why ``close`` could not keep the traffic
        self._fingerprint, self._num_experts = fingerprint, tuple(num_experts)
        # Layer, count, experts; layer, count, ... The older block goes when the newer one is full.
        self._older, self._newer = array("H"), array("H")

    def add(self, layer: int, experts: Sequence[int]) -> None:
        """One layer call; experts are numbered within their layer."""
        newer = self._newer
        newer.append(layer)
        newer.append(len(experts))
        newer.extend(experts)
        if len(newer) > 2 * _MAX_USES:
            self._older, self._newer = newer, array("H")

    def close(self) -> None:
        """Add what was kept to the store's file. Of two engines that close at once, one may lose its traffic."""
        block, self._older, self._newer = self._older + self._newer, array("H"), array("H")
        if not block:
            return
        file = traffic_file(self._fingerprint)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                earlier = read_traffic(self._fingerprint, self._num_experts)
                calls = _newest([*earlier, *_split(block)], len(self._num_experts))
                write_aside(file, _encode(calls, self._num_experts))
        except OSError as error:
            self.error = f"traffic is not kept: {file}: {error.strerror}"


def read_traffic(fingerprint: str, num_experts: Sequence[int]) -> list[list[int]]:
    """The layer calls kept for a store, oldest first, each [layer, expert, ...]. Empty if there are none to be read."""
    try:
        document = msgpack.unpackb(traffic_file(fingerprint).read_bytes())
        if (document["format"], document["experts"]) != (_FORMAT, list(num_experts)):
            return []
        block = array("H")
        block.frombytes(document["calls"])
        calls = _split(block)
    except (OSError, ValueError, KeyError, TypeError, IndexError, msgpack.UnpackException):
        return []
    is_sound = all(
        len(call) > 1 and call[0] < len(num_experts) and max(call[1:]) < num_experts[call[0]] for call in calls
    )
    return calls if is_sound else []


def choose_policy(fingerprint: str, num_experts: Sequence[int], num_slots: int) -> Choice:
    """The policy that would have had the most hits on a store's recent traffic with so many slots.

    Takes up to some seconds. Without enough traffic: the first of POLICIES.
    """
    default = POLICIES[0]
    if num_slots >= sum(num_experts):
        return Choice(default, "every expert fits, nothing is evicted")
    calls = read_traffic(fingerprint, num_experts)
    num_uses = sum(len(call) - 1 for call in calls)
    if num_uses < _MIN_USES_PER_EXPERT * sum(num_experts):
        return Choice(default, "the default: too little traffic of this store is recorded to choose by")
    first = [0, *accumulate(num_experts)]
    numbered = [[first[layer] + expert for expert in experts] for layer, *experts in calls]
    rates = hit_rates([numbered], num_experts, num_slots)
    found = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items())
    return Choice(max(rates, key=rates.__getitem__), f"hits over the last {len(calls)} layer calls: {found}")


def _newest(calls: list[list[int]], num_layers: int) -> list[list[int]]:
    """The last calls within both bounds."""
    kept = calls[-_MAX_TOKENS * num_layers :]
    surplus = sum(len(call) - 1 for call in kept) - _MAX_USES
    start = 0
    while surplus > 0:
        surplus -= len(kept[start]) - 1
        start += 1
    return kept[start:]


def _split(block: array[int]) -> list[list[int]]:
    """Raises ValueError if the block ends within a call."""
    values, calls, start = block.tolist(), [], 0
    while start < len(values):
        end = start + 2 + values[start + 1]
        calls.append([values[start], *values[start + 2 : end]])
        start = end
    if start > len(values):
        raise ValueError("a call is cut off")
    return calls


def _encode(calls: list[list[int]], num_experts: Sequence[int]) -> bytes:
    block = array("H")
    for layer, *experts in calls:
        block.extend((layer, len(experts), *experts))
    packed: bytes = msgpack.packb({"format": _FORMAT, "experts": list(num_experts), "calls": block.tobytes()})
    return packed
