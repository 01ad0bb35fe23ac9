"""On which machine each of a layer's experts is computed, where some could be computed on another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moray.runtime.lanes.cost import Work, choose
from moray.runtime.lanes.lane import Lane, Resource, network, remote_cpu
from moray.runtime.lanes.rates import Rates

HERE = -1  # in place, or from this machine's disk


def choose_places(
    tokens: Sequence[int],
    is_here: Sequence[bool],
    offers: Sequence[tuple[int, ...]],
    num_bytes: int,
    rates: Rates,
    forced: Lane | None = None,
) -> list[int]:
    """For each expert the remote host that computes it, or ``HERE``.

    tokens: of each expert; is_here: whether its shard is in memory here; offers: the remote hosts that have it in
    memory; num_bytes: of a shard. An expert with one way takes it, others the one with the smallest makespan
    (cost.py). ``forced``: HOST_CPU takes none of the offers, REMOTE_COMPUTE one of every expert's, if it has any.
    """
    if forced is Lane.HOST_CPU or not any(offers):
        return [HERE] * len(tokens)
    work = []
    for i, (count, here, remotes) in enumerate(zip(tokens, is_here, offers, strict=True)):
        lanes: tuple[Lane, ...] = (Lane.HOST_CPU if here else Lane.DISK_LOAD,)
        if remotes:
            is_remote = forced is Lane.REMOTE_COMPUTE or not (here or _load_pays(count, num_bytes, remotes, rates))
            lanes = (Lane.REMOTE_COMPUTE,) if is_remote else (*lanes, Lane.REMOTE_COMPUTE)
        work.append(Work(i, count, num_bytes, lanes, 0.0, remotes))
    return list(choose(work, rates).remotes)


def _load_pays(tokens: int, num_bytes: int, remotes: tuple[int, ...], rates: Rates) -> bool:
    """Whether to load an expert that others have in memory. Where memory is full it takes the place of one that must
    be loaded again when it is used: so it counts twice.
    """
    load_s = 2 * rates.alone[Resource.DISK].seconds(num_bytes, 0)
    sent = 2 * tokens * rates.token_bytes
    ask_s = (
        rates.alone[network(remote)].seconds(sent, 0) + rates.alone[remote_cpu(remote)].seconds(num_bytes, tokens)
        for remote in remotes
    )
    return load_s < min(ask_s)


class Part(NamedTuple):
    """Work of one request: some experts, and of each the range of its pairs."""

    experts: list[int]  # positions in the list of experts
    first: list[int]
    last: list[int]


def split_work(counts: Sequence[int], fixed_s: float, expert_s: float, pair_s: float, longest_s: float) -> list[Part]:
    """Cut experts with so many pairs each into requests that take no longer than ``longest_s``, if possible.

    A request costs fixed_s, each of its experts expert_s and each pair pair_s.
    """
    parts, part, left_s = [], Part([], [], []), longest_s - fixed_s
    most = max(1, int((longest_s - fixed_s - expert_s) / pair_s)) if pair_s > 0 else max(counts, default=1)
    for expert, count in enumerate(counts):
        for first in range(0, count, most):
            last = min(first + most, count)
            cost_s = expert_s + (last - first) * pair_s
            if part.experts and cost_s > left_s:
                parts.append(part)
                part, left_s = Part([], [], []), longest_s - fixed_s
            part.experts.append(expert)
            part.first.append(first)
            part.last.append(last)
            left_s -= cost_s
    return [*parts, part] if part.experts else parts
