"""On which machine each of a layer's experts is computed, where some could be computed on another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moray.runtime.lanes.cost import Work, choose, predict_s
from moray.runtime.lanes.lane import Lane, Resource, network, remote_cpu
from moray.runtime.lanes.rates import Rates

HERE = -1  # in place, or from this machine's disk

_MOST_REMEMBERED = 16  # experts, in a question whose answer is kept
_CLEARLY = 0.9  # of the time that a layer takes if what is in memory here stays here: what sending it away must save


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
    (cost.py); but what is in memory here goes away only for a clear gain: times of other machines vary more, and a
    layer takes as long as the slowest. ``forced``: HOST_CPU takes none of the offers, REMOTE_COMPUTE one of every
    expert's, if it has any.
    """
    if forced is Lane.HOST_CPU or not any(offers):
        return [HERE] * len(tokens)
    if len(tokens) > _MOST_REMEMBERED or any([count != 1 for count in tokens]):
        return _choose(tokens, is_here, offers, num_bytes, rates, forced)
    # Decoding asks the same question again and again, but for the order of its experts.
    kinds = list(zip(is_here, offers, strict=True))
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    kinds.sort()
    chosen = rates.remember((num_bytes, forced, *kinds), lambda: _choose_of_kinds(kinds, num_bytes, rates, forced))
    places = [HERE] * len(kinds)
    for i, place in zip(order, chosen, strict=True):
        places[i] = place
    return places


def _choose_of_kinds(
    kinds: Sequence[tuple[bool, tuple[int, ...]]], num_bytes: int, rates: Rates, forced: Lane | None
) -> list[int]:
    is_here, offers = zip(*kinds, strict=True)
    return _choose([1] * len(kinds), is_here, offers, num_bytes, rates, forced)


def _choose(
    tokens: Sequence[int],
    is_here: Sequence[bool],
    offers: Sequence[tuple[int, ...]],
    num_bytes: int,
    rates: Rates,
    forced: Lane | None,
) -> list[int]:
    num_away = sum(bool(remotes) and not here for here, remotes in zip(is_here, offers, strict=True))
    work = []
    for i, (count, here, remotes) in enumerate(zip(tokens, is_here, offers, strict=True)):
        lanes: tuple[Lane, ...] = (Lane.HOST_CPU if here else Lane.DISK_LOAD,)
        if remotes:
            pays = not here and _load_pays(count, num_bytes, remotes, rates, num_away)
            is_remote = forced is Lane.REMOTE_COMPUTE or not (here or pays)
            lanes = (Lane.REMOTE_COMPUTE,) if is_remote else (*lanes, Lane.REMOTE_COMPUTE)
        work.append(Work(i, count, num_bytes, lanes, 0.0, remotes))
    best = choose(work, rates)
    if any(item.lanes[0] is Lane.HOST_CPU and place != HERE for item, place in zip(work, best.remotes, strict=True)):
        stays = [item._replace(lanes=item.lanes[:1]) if item.lanes[0] is Lane.HOST_CPU else item for item in work]
        usual = choose(stays, rates)
        if predict_s(work, best, rates) > _CLEARLY * predict_s(work, usual, rates):
            best = usual
    return list(best.remotes)


def _load_pays(tokens: int, num_bytes: int, remotes: tuple[int, ...], rates: Rates, num_away: int) -> bool:
    """Whether to load an expert that others have in memory. Where memory is full it takes the place of one that must
    be loaded again when it is used: so it counts twice. ``num_away``: experts of the layer that share a round trip.
    """
    load_s = 2 * rates.alone[Resource.DISK].seconds(num_bytes, 0)
    sent = 2 * tokens * rates.token_bytes
    ask_s = (
        rates.alone[network(remote)].fixed_s / num_away
        + sent * rates.alone[network(remote)].byte_s
        + rates.alone[remote_cpu(remote)].seconds(num_bytes, tokens)
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
