"""Which lane each of a layer's experts takes: the choice that is done first, and warms the cache.

Resources work beside each other, so what counts is the *makespan*, the time until the last of them is done, and not
the sum (HybriMoE, arXiv:2504.05897; Fiddler, arXiv:2402.07033, adds up). A lane is one piece of work, or two in a row:
a feeder (link, disk) brings something to a worker (CPU, device), which does what it has meanwhile. A resource is done
when its pieces are; a feeder, when its last shard is computed too, at best the cheapest that it could bring. A remote
host gets one request a layer: it is done after a round trip, the way of all its activations and all its computing.

CPU, link and disk share the memory bus: when more than one of them works, all cost what they cost together.

A lane that keeps the shard in a faster tier is an investment: a part of bringing it here, up to half, is not counted,
if uses to come repay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, frexp
from typing import NamedTuple

from moray.runtime.lanes.lane import BUS, Lane, Resource, network, remote_cpu
from moray.runtime.lanes.rates import Rate, Rates

_MOST_INVESTED = 0.5
_LOWEST_REUSE, _HIGHEST_REUSE = -4, 4  # exponents: reuse is rounded down to a power of two, and equal work is cheap
_MOST_SEARCHED = 256  # assignments that are all looked at
_PASSES = 3  # of moving single experts, where there are more
_NONE = -1  # in place of a feeder: the last of the loads, which stays 0


class Work(NamedTuple):
    """One expert that a layer needs."""

    expert: int
    tokens: int
    num_bytes: int  # of its shard
    lanes: tuple[Lane, ...]  # those open to it, at least one
    reuse: float = 0.0  # how often it is expected to be used again while it would be kept
    remotes: tuple[int, ...] = ()  # hosts that offer the remote lanes


class Assignment(NamedTuple):
    """A lane for each piece of work, in its order."""

    lanes: tuple[Lane, ...]
    remotes: tuple[int, ...]  # the host of a remote lane, else -1
    warm: int = -1  # index of the work whose shard is worth a copy that the layer does not wait for; -1: none


class Choice(NamedTuple):
    """A lane with its price: seconds of the feeder (``_NONE``: none, 0 s) and of the worker."""

    feeder: int
    feed_s: float
    worker: int
    work_s: float
    lane: Lane
    remote: int


_Options = tuple[Choice, ...]
_Class = tuple[int, int, tuple[Lane, ...], tuple[int, ...], int]  # tokens, bytes, lanes, remotes, exponent of reuse


def choose(work: Sequence[Work], rates: Rates) -> Assignment:
    """The assignment with the smallest makespan, shards worth keeping counted at a discount.

    Exact if at most 256 assignments differ in more than the order of equal experts, else longest first and improved by
    moves. Pure; costs next to nothing if every expert has one lane.
    """
    for item in work:
        if len(item.lanes) > 1 or len(item.remotes) > 1:
            break
    else:
        return _assignment(work, [_only_lane(item.lanes[0], item.remotes) for item in work], rates)
    classes: dict[_Class, list[int]] = {}
    for i, (_, tokens, num_bytes, lanes, reuse, remotes) in enumerate(work):
        level = min(max(frexp(reuse)[1], _LOWEST_REUSE), _HIGHEST_REUSE) if reuse > 0 else _LOWEST_REUSE
        classes.setdefault((tokens, num_bytes, lanes, remotes, level), []).append(i)
    found = _chosen_before(classes, rates)
    picks: list[tuple[Lane, int]] = [(Lane.DEVICE_HIT, -1)] * len(work)
    for members, chosen in zip(classes.values(), found, strict=True):
        for i, pick in zip(members, chosen, strict=True):
            picks[i] = pick
    return _assignment(work, picks, rates)


def _only_lane(lane: Lane, remotes: tuple[int, ...]) -> tuple[Lane, int]:
    return lane, remotes[0] if lane >= Lane.REMOTE_COMPUTE else -1


def _chosen_before(classes: dict[_Class, list[int]], rates: Rates) -> list[list[tuple[Lane, int]]]:
    """Lanes for the members of each class. Decoding asks the same question again and again."""

    def solve() -> list[list[tuple[Lane, int]]]:
        options, counts = [_class_options(*kind, rates) for kind in classes], [*map(len, classes.values())]
        solved = _solve_regimes(options, counts, rates)
        return [[(choice.lane, choice.remote) for choice in chosen] for chosen in solved]

    return rates.remember(tuple([(kind, len(members)) for kind, members in classes.items()]), solve)


def predict_s(work: Sequence[Work], assignment: Assignment, rates: Rates) -> float:
    """Makespan of an assignment, nothing discounted."""
    wanted = list(zip(assignment.lanes, assignment.remotes, strict=True))
    tables = (rates.alone, rates.together)
    priced = [[_prices(*item[1:4], item.remotes, rates, table) for item in work] for table in tables]
    picks = [[next(c for c in o if c[4:] == w) for o, w in zip(each, wanted, strict=True)] for each in priced]
    company = len({resource for pick in picks[0] for resource in _on_bus(pick)}) > 1
    loads = [0.0] * (rates.num_resources + 1)
    for pick in picks[company]:
        loads[pick.worker] += pick.work_s
        loads[pick.feeder] += pick.feed_s
    return _makespan(loads, _tails(priced[company], rates))


def _assignment(work: Sequence[Work], picks: Sequence[tuple[Lane, int]], rates: Rates) -> Assignment:
    """With no miss copied, the one that is used most is copied beside the layer: else the cache never warms.

    Unless the device would take longer for it than the CPU does.
    """
    lanes, remotes = zip(*picks, strict=True) if picks else ((), ())
    warm, most = -1, 0.0
    if Lane.DEVICE_COPY not in lanes:
        for i, item in enumerate(work):
            if item.reuse > most and Lane.DEVICE_COPY in item.lanes:
                warm, most = i, item.reuse
        if warm >= 0:
            _, tokens, num_bytes, *_ = work[warm]
            device_s, cpu_s = (rates.alone[of].seconds(num_bytes, tokens) for of in (Resource.DEVICE, Resource.CPU))
            warm = warm if device_s < cpu_s else -1
    return Assignment(lanes, remotes, warm)


# ------------------------------------------------------------------------------------------ prices


def _class_options(
    tokens: int, num_bytes: int, lanes: tuple[Lane, ...], remotes: tuple[int, ...], level: int, rates: Rates
) -> tuple[_Options, _Options]:
    """Prices of work of one kind: in company, and alone."""
    reuse = 2.0 ** (level - 1) if level > _LOWEST_REUSE else 0.0
    alone = _prices(tokens, num_bytes, lanes, remotes, rates, rates.alone)
    savings = _savings(alone, reuse)
    if not rates.company_costs:
        return (both := _discounted(alone, savings)), both
    together = _prices(tokens, num_bytes, lanes, remotes, rates, rates.together)
    return _discounted(together, savings), _discounted(alone, savings)


def _prices(
    tokens: int, num_bytes: int, lanes: tuple[Lane, ...], remotes: tuple[int, ...], rates: Rates, table: list[Rate]
) -> list[Choice]:
    choices = []
    for lane in lanes:
        if lane >= Lane.REMOTE_COMPUTE:
            choices += [_remote_price(lane, remote, tokens, num_bytes, rates, table) for remote in remotes]
            continue
        feeder, worker = _STAGES[lane]
        fixed_s, byte_s, token_s = table[worker]
        work_s = fixed_s + num_bytes * byte_s + tokens * token_s
        feed_s = 0.0
        if feeder != _NONE:
            fixed_s, byte_s, _ = table[feeder]
            feed_s = fixed_s + num_bytes * byte_s
        choices.append(Choice(feeder, feed_s, worker, work_s, lane, -1))
    return choices


_STAGES: dict[Lane, tuple[int, int]] = {  # feeder, worker
    Lane.DEVICE_HIT: (_NONE, int(Resource.DEVICE)),
    Lane.DEVICE_COPY: (int(Resource.LINK), int(Resource.DEVICE)),
    Lane.HOST_CPU: (_NONE, int(Resource.CPU)),
    Lane.DISK_LOAD: (int(Resource.DISK), int(Resource.CPU)),
}
_KEEPING = (Lane.DEVICE_COPY, Lane.DISK_LOAD)


def _remote_price(lane: Lane, remote: int, tokens: int, num_bytes: int, rates: Rates, table: list[Rate]) -> Choice:
    worker = remote_cpu(remote)
    sent_s = 2 * tokens * rates.token_bytes * table[network(remote)].byte_s  # and once the round trip: see _tails
    return Choice(_NONE, 0.0, worker, sent_s + table[worker].seconds(num_bytes, tokens), lane, remote)


def _savings(choices: list[Choice], reuse: float) -> list[float]:
    """Seconds that uses to come save, for each lane that keeps the shard: what the cheapest lane that keeps nothing
    here takes beyond the worker alone.

    At prices without company, always: else what is chosen alone would be dearer than the same in company.
    """
    if reuse <= 0 or len(choices) < 2:
        return [0.0] * len(choices)
    fleeting = [c.feed_s + c.work_s for c in choices if c.lane not in _KEEPING]
    cheapest = min(fleeting or [c.feed_s + c.work_s for c in choices])
    return [max(0.0, reuse * (cheapest - c.work_s)) if c.lane in _KEEPING else 0.0 for c in choices]


def _discounted(choices: list[Choice], savings: list[float]) -> _Options:
    """Without the part of the feeder's time that uses to come repay."""
    return tuple(
        c._replace(feed_s=c.feed_s - min(saved, _MOST_INVESTED * c.feed_s)) if saved else c
        for c, saved in zip(choices, savings, strict=True)
    )


def _on_bus(choice: Choice) -> list[int]:
    return [resource for resource in (choice.feeder, choice.worker) if resource in BUS]


# ---------------------------------------------------------------------------------------- makespan


def _solve_regimes(options: list[tuple[_Options, _Options]], counts: list[int], rates: Rates) -> list[list[Choice]]:
    """Everything at the prices of company, against what leaves the bus to one resource, at the prices of that."""
    together = [each[0] for each in options]
    best, value = _solve(together, counts, rates)
    if rates.company_costs:
        for resource in BUS:
            pure = [tuple(c for c in each[1] if all(r == resource for r in _on_bus(c))) for each in options]
            if all(pure):
                found, found_s = _solve(pure, counts, rates)
                if found_s < value:
                    best, value = found, found_s
    return best


def _tails(options: Sequence[Sequence[Choice]], rates: Rates) -> list[float]:
    """What is added to each resource that is used at all: of a feeder, the cheapest computing that may follow the last
    thing it brings; of a remote host, the round trip.
    """
    tails = [0.0] * (rates.num_resources + 1)
    for each in options:
        for feeder, _, worker, work_s, _, remote in each:
            if feeder != _NONE and not 0.0 < tails[feeder] <= work_s:
                tails[feeder] = work_s
            if remote >= 0:
                tails[worker] = rates.alone[network(remote)].fixed_s
    return tails


def _makespan(loads: list[float], tails: list[float]) -> float:
    return max([load + tail for load, tail in zip(loads, tails, strict=True) if load], default=0.0)


def _solve(options: list[_Options], counts: list[int], rates: Rates) -> tuple[list[list[Choice]], float]:
    """The choices of each class with the smallest makespan, and that."""
    tails = _tails(options, rates)
    loads = [0.0] * len(tails)
    jobs: list[tuple[int, _Options]] = []  # those that have a choice
    chosen: list[list[Choice]] = []
    for index, (each, count) in enumerate(zip(options, counts, strict=True)):
        if len(each) == 1:
            loads[each[0].worker] += count * each[0].work_s
            loads[each[0].feeder] += count * each[0].feed_s
            chosen.append(count * [each[0]])
        else:
            jobs += count * [(index, each)]
            chosen.append([])
    if jobs:
        jobs.sort(key=lambda job: -min([c.feed_s + c.work_s for c in job[1]]))
        lists, fixed = [job[1] for job in jobs], _makespan(loads, tails)
        picks, value = _longest_first(lists, tails, loads, fixed)
        if _num_assignments(options, counts) <= _MOST_SEARCHED:
            picks = _Search(lists, tails, loads, picks, value).run(fixed)
        else:
            _improve(lists, tails, loads, picks, value)
        for (index, _), pick in zip(jobs, picks, strict=True):
            chosen[index].append(pick)
            loads[pick.worker] += pick.work_s
            loads[pick.feeder] += pick.feed_s
    return chosen, _makespan(loads, tails)


def _longest_first(
    jobs: list[_Options], tails: list[float], fixed: list[float], value: float
) -> tuple[list[Choice], float]:
    """Each job where it is done first. Also the makespan."""
    loads, picks = list(fixed), []
    for each in jobs:
        best, best_s = each[0], (float("inf"), 0.0)
        for choice in each:
            feeder, feed_s, worker, work_s, _, _ = choice
            done, fed = loads[worker] + work_s + tails[worker], loads[feeder] + feed_s + tails[feeder]
            found = (fed if fed > done else done, feed_s + work_s)
            if found < best_s:
                best, best_s = choice, found
        loads[best[2]] += best[3]
        loads[best[0]] += best[1]
        value = max(value, best_s[0])
        picks.append(best)
    return picks, value


def _improve(jobs: list[_Options], tails: list[float], fixed: list[float], picks: list[Choice], value: float) -> None:
    """Move one expert at a time to another lane while that helps. Changes ``picks``."""
    loads = list(fixed)
    for pick in picks:
        loads[pick.worker] += pick.work_s
        loads[pick.feeder] += pick.feed_s
    for _ in range(_PASSES):
        before = value
        for i, each in enumerate(jobs):
            for choice in each:
                pick = picks[i]
                if choice is pick:
                    continue
                trial = list(loads)
                trial[pick[2]] -= pick[3]
                trial[pick[0]] -= pick[1]
                trial[choice[2]] += choice[3]
                trial[choice[0]] += choice[1]
                found = _makespan(trial, tails)
                if found < value * (1 - 1e-9):
                    value, picks[i], loads = found, choice, trial
        if value == before:
            break


def _num_assignments(options: list[_Options], counts: list[int]) -> int:
    """Assignments that differ in more than the order of equal jobs."""
    product = 1
    for each, count in zip(options, counts, strict=True):
        product *= comb(count + len(each) - 1, len(each) - 1)
    return product


class _Search:
    """All assignments, but for those that are already longer than the best one."""

    def __init__(
        self, jobs: list[_Options], tails: list[float], loads: list[float], picks: list[Choice], value: float
    ) -> None:
        self._jobs, self._tails, self._best, self._value = jobs, tails, picks, value
        self._loads, self._picks = list(loads), list(picks)

    def run(self, reached: float) -> list[Choice]:
        self._place(0, 0, reached)
        return self._best

    def _place(self, index: int, first: int, reached: float) -> None:
        """Place the jobs from ``index`` on; ``first``: its first option that is not just another order."""
        if index == len(self._jobs):
            self._best, self._value = list(self._picks), reached
            return
        each, loads, tails = self._jobs[index], self._loads, self._tails
        follows_equal = index + 1 < len(self._jobs) and self._jobs[index + 1] is each
        for option in range(first, len(each)):
            choice = each[option]
            feeder, feed_s, worker, work_s, _, _ = choice
            before, fed_before = loads[worker], loads[feeder]
            done, fed = before + work_s, fed_before + feed_s
            ended = max(done + tails[worker], fed + tails[feeder], reached)
            if ended >= self._value:
                continue
            loads[worker], loads[feeder] = done, fed
            self._picks[index] = choice
            self._place(index + 1, option if follows_equal else 0, ended)
            loads[worker], loads[feeder] = before, fed_before
