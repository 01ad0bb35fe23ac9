"""What a cache of some size would have made of a trace, for every policy and for Belady's bound.

One layer call with the experts A: those of A in the cache are hits. The others are loaded one after the other, each
into a free slot or in place of ``Policy.victim``, which may be any expert outside A; if there are fewer slots than A
has experts, any expert that the call has finished with. Then the policy is told of A. Caches are empty at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moray.runtime.arrays import Ints
from moray.runtime.errors import TraceError
from moray.runtime.residency.policies import POLICIES, make_policy
from moray.runtime.residency.policies.belady import Belady
from moray.runtime.residency.policy import Policy
from moray.runtime.trace.format import Trace
from moray.runtime.trace.recall import Foresight

BELADY = "belady"
Calls = Sequence[list[int]]  # each: the experts of a layer call, numbered as policies number them


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy and one budget, over one or several traces. A use is one expert of one layer call."""

    policy: str
    num_slots: int
    num_uses: int
    num_hits: int
    loaded_bytes: int
    serial_s: float  # sum over layer calls of (bytes to load / disk bandwidth + recorded compute time)
    overlapped_s: float  # the same with the larger of the two: loading behind computing, layer call by layer call
    num_foreseen: int  # of the misses, those that the layer before predicted
    num_needless: int  # predicted by the layer before, not in memory, and not used

    @property
    def hit_rate(self) -> float:
        return self.num_hits / max(self.num_uses, 1)


def simulate(traces: Sequence[Trace], policy: str, num_slots: int, bytes_per_s: float) -> Outcome:
    """Replay traces, each from an empty cache. ``policy``: one of POLICIES, or "belady".

    Raises ConfigError for an unknown policy, TraceError if the traces are of different models.
    """
    check_alike(traces)
    num_uses = num_missed = loaded_bytes = 0
    num_foreseen = num_needless = 0
    serial_s = overlapped_s = 0.0
    for trace in traces:
        calls = trace.calls()
        made = make_any_policy(policy, trace.header.num_experts, num_slots, calls)
        foresight = Foresight.of(trace)
        missed_C = replay(calls, made, num_slots, foresight)
        bytes_C = missed_C * np.array(trace.header.shard_bytes)[trace.layers_C]
        load_s_C, compute_s_C = bytes_C / bytes_per_s, 1e-6 * trace.compute_us_C
        num_uses += len(trace.experts_U)
        num_missed += int(missed_C.sum())
        num_foreseen += foresight.num_foreseen
        num_needless += foresight.num_needless
        loaded_bytes += int(bytes_C.sum())
        serial_s += float((load_s_C + compute_s_C).sum())
        overlapped_s += float(np.maximum(load_s_C, compute_s_C).sum())
    times, foreseen = (serial_s, overlapped_s), (num_foreseen, num_needless)
    return Outcome(policy, num_slots, num_uses, num_uses - num_missed, loaded_bytes, *times, *foreseen)


def replay(calls: Calls, policy: Policy, num_slots: int, foresight: Foresight | None = None) -> Ints:
    """[C]: the misses of every call. ``foresight`` is told of all of them."""
    resident: set[int] = set()
    missed_C = np.zeros(len(calls), dtype=np.int64)
    for index, active in enumerate(calls):
        if foresight is not None:
            foresight.note(index, active, resident)
        missing = [expert for expert in active if expert not in resident]
        if missing:
            missed_C[index] = len(missing)
            # The hits of a call with more experts than slots are over before anything is loaded.
            pinned = frozenset(active if len(active) <= num_slots else ())
            for expert in missing:
                _load(expert, resident, pinned, policy, num_slots)
        policy.used(active)
    return missed_C


def _load(expert: int, resident: set[int], pinned: frozenset[int], policy: Policy, num_slots: int) -> None:
    if len(resident) >= num_slots:
        victim = policy.victim(expert, lambda other: other not in pinned)
        if victim is None:  # used and not kept
            return
        resident.remove(victim)
        policy.evicted(victim)
    resident.add(expert)
    policy.loaded(expert)


def make_any_policy(name: str, num_experts: Sequence[int], num_slots: int, calls: Calls) -> Policy:
    return Belady(calls, num_slots) if name == BELADY else make_policy(name, num_experts, num_slots)


def best_policy(traces: Sequence[Trace], num_slots: int) -> str:
    """The policy with the most hits over all traces; of equal ones the first in POLICIES. Raises TraceError."""
    check_alike(traces)
    rates = hit_rates([trace.calls() for trace in traces], traces[0].header.num_experts, num_slots)
    return max(rates, key=rates.__getitem__)


def hit_rates(traces: Sequence[Calls], num_experts: Sequence[int], num_slots: int) -> dict[str, float]:
    """Of each of POLICIES, in their order, over all traces."""
    num_uses = max(1, sum(len(active) for calls in traces for active in calls))
    rates = {}
    for name in POLICIES:
        missed = (replay(calls, make_policy(name, num_experts, num_slots), num_slots).sum() for calls in traces)
        rates[name] = 1 - int(sum(missed)) / num_uses
    return rates


def check_alike(traces: Sequence[Trace]) -> None:
    """Raise TraceError unless there are traces, and all of one model's experts."""
    if not traces:
        raise TraceError("no traces; name at least one")
    shapes = {(trace.header.num_experts, trace.header.shard_bytes) for trace in traces}
    if len(shapes) > 1:
        raise TraceError("the traces are of different models or recipes; replay them one at a time")
