"""Placing experts on hosts. Pure: the orchestrator asks, the wiring enacts.

The rule, layer by layer, because layers follow each other:

1. If memory does not hold all, the experts that are used least are left out.
2. How many of a layer's experts each worker should have is what makes the layer's expected time shortest, if all are
   used equally: computing here beside requests to remote hosts (layer_cost.py). Where memory does not allow it, experts
   go where it costs least.
3. Experts are dealt hottest first, each to the worker whose share of the layer's traffic is furthest below what it
   should be: that of an even split, or more where memory holds few experts of a worker that should have many.
4. In layers with few experts single moves and exchanges follow, as long as they shorten the expected time.
5. What memory is left takes replicas, the hottest first: where an expert is held twice, each call takes what is done
   first. Before all others come experts that one remote host alone has and the compute node's disk lacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import permutations

import numpy as np

from moray.cluster.layer_cost import LayerGeometry, TokenCost, Worker, odds_of
from moray.cluster.placement import Heat, HostSpec, Placement, all_keys, deal, keys_of, uniform_heat
from moray.cluster.topology import ComputeSpeed
from moray.runtime.arrays import Doubles
from moray.runtime.errors import ConfigError
from moray.runtime.layout.shard import ExpertKey

_FEW = 16  # experts of a layer in which single moves are tried
_LEAST_GAIN = 1e-6  # of a layer's time, for a move


def place(
    layers: Sequence[LayerGeometry],
    hosts: Sequence[HostSpec],
    heat: Heat | None = None,
    not_here: Collection[ExpertKey] = (),
) -> Placement:
    """Place all experts anew. ``not_here``: experts that the compute node's disk lacks. The same answer every time.

    Raises ConfigError without a host on the compute node, or if memory does not hold what that node's disk lacks.
    """
    return _Planner(layers, hosts, heat, not_here).place()


def replace(
    old: Placement,
    layers: Sequence[LayerGeometry],
    hosts: Sequence[HostSpec],
    heat: Heat | None = None,
    not_here: Collection[ExpertKey] = (),
) -> Placement:
    """Place after hosts have come or gone (``hosts``: all that are there now), moving as little as possible.

    Experts whose primary is gone are computed by a replica or placed anew; a new host takes over its share from those
    that have more than theirs. Nothing else changes its primary. Raises as ``place`` does.
    """
    return _Planner(layers, hosts, heat, not_here).replace(old)


class _Planner:
    """One placement being made. Workers are numbered: 0 is the compute node, all of its hosts together."""

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        hosts: Sequence[HostSpec],
        heat: Heat | None,
        not_here: Collection[ExpertKey],
    ) -> None:
        self._layers, self._not_here = layers, set(not_here)
        self._local = [host for host in hosts if host.link is None]
        self._remote = sorted((host for host in hosts if host.link is not None), key=lambda host: host.host_id)
        if not self._local:
            raise ConfigError("no host is on the compute node; placement needs one there, even with one slot")
        self._slots = [sum(host.num_slots for host in self._local), *(host.num_slots for host in self._remote)]
        workers = [Worker(self._local[0].speed), *(Worker(host.speed, host.link) for host in self._remote)]
        costs = {layer: TokenCost(layer, workers) for layer in set(layers)}
        self._costs = [costs[layer] for layer in layers]
        self._best: dict[tuple[TokenCost, int], tuple[int, ...]] = {}
        self._seconds: dict[tuple[TokenCost, tuple[int, ...]], float] = {}
        self._dealt: dict[tuple[TokenCost, bytes, tuple[int, ...], tuple[float, ...]], list[int]] = {}
        # A share of its layer's traffic for each expert: layers are alike in that every token passes through all.
        given = uniform_heat(layers) if heat is None else heat
        used = [each if np.sum(each) > 0 else np.ones(len(each)) for each in given]
        self._heat = [np.asarray(each, dtype=float) / np.sum(each) for each in used]

    def place(self) -> Placement:
        chosen = self._choose({})
        splits = self._splits(chosen)
        workers: dict[ExpertKey, int] = {}
        for index, (experts, rooms) in enumerate(zip(chosen, self._with_spare(splits), strict=True)):
            placed = self._deal(index, experts, rooms, self._shares(index, experts, splits[index]))
            workers |= {ExpertKey(index, expert): worker for expert, worker in placed.items()}
        return self._finish(workers, Placement({}))

    def replace(self, old: Placement) -> Placement:
        workers = self._kept(old)
        chosen = self._choose(workers)
        splits = self._splits(chosen)
        shares = [self._shares(index, experts, splits[index]) for index, experts in enumerate(chosen)]
        wanted = {ExpertKey(index, expert) for index, experts in enumerate(chosen) for expert in experts}
        workers = {key: worker for key, worker in workers.items() if key in wanted}
        room = [slots - count for slots, count in zip(self._slots, self._totals(workers), strict=True)]
        for key in sorted(wanted - workers.keys(), key=lambda k: (-self._heat[k.layer][k.expert], k.expert, k.layer)):
            loads = self._loads(workers, key.layer)
            worker = _neediest(shares[key.layer], loads, [bool(free) for free in room])
            workers[key], room[worker] = worker, room[worker] - 1
        known = {host for key in old.primary for host in old.hosts_of(key)}
        for worker, host in enumerate(self._remote, start=1):
            share = sum(split[worker] for split in splits) - self._totals(workers)[worker]
            for index, split in enumerate(splits if host.host_id not in known else ()):
                share -= self._take_over(workers, index, split, worker, shares[index][worker], share)
        return self._finish(workers, old)

    def _finish(self, workers: Mapping[ExpertKey, int], old: Placement) -> Placement:
        primary = self._name(workers, old)
        left_out = tuple(key for key in all_keys(self._layers) if key not in workers)
        return Placement(primary, self._replicate(primary, old), left_out)

    def _totals(self, workers: Mapping[ExpertKey, int]) -> list[int]:
        counts = Counter(workers.values())
        return [counts[worker] for worker in range(len(self._slots))]

    # ------------------------------------------------------------------------------- what is placed

    def _kept(self, old: Placement) -> dict[ExpertKey, int]:
        """What stays where it is: held by a host that is there, on as many as have room."""
        numbers = {host.host_id: 0 for host in self._local}
        numbers |= {host.host_id: index + 1 for index, host in enumerate(self._remote)}
        room, kept = list(self._slots), {}
        hottest = sorted(old.primary, key=lambda key: (-self._heat[key.layer][key.expert], key))
        for key in hottest:
            worker = next((numbers[h] for h in old.hosts_of(key) if h in numbers and room[numbers[h]]), None)
            if worker is not None:
                room[worker] -= 1
                kept[key] = worker
        return kept

    def _choose(self, kept: Mapping[ExpertKey, int]) -> list[list[int]]:
        """Of each layer, the experts that memory is given to: what the disk here lacks, what is there already, and then
        what is used most; between equals, experts of all layers in turn.
        """
        room = sum(self._slots)
        if len(self._not_here) > room:
            raise ConfigError(
                f"{len(self._not_here)} experts are missing on the compute node's disk, and the hosts have memory for "
                f"{room}; give them more memory, or copy the store to that node's disk (moray store sync)"
            )

        def order(key: ExpertKey) -> tuple[bool, bool, float, int, int]:
            heat = round(float(self._heat[key.layer][key.expert]) * self._layers[key.layer].num_experts, 6)
            return key not in self._not_here, key not in kept, -heat, key.expert, key.layer

        chosen: list[list[int]] = [[] for _ in self._layers]
        for key in sorted(all_keys(self._layers), key=order)[:room]:
            chosen[key.layer].append(key.expert)
        return [sorted(experts) for experts in chosen]

    # ------------------------------------------------------------------------------- how many where

    def _splits(self, chosen: list[list[int]]) -> list[list[int]]:
        """Experts of each layer for each worker, as memory allows."""
        splits = [list(self._wanted(index, len(experts))) for index, experts in enumerate(chosen)]
        total = [sum(split[w] for split in splits) for w in range(len(self._slots))]
        for worker, slots in enumerate(self._slots):
            while total[worker] > slots:
                layer, target = self._cheapest_move(splits, worker, total)
                splits[layer][worker] -= 1
                splits[layer][target] += 1
                total[worker] -= 1
                total[target] += 1
        return splits

    def _with_spare(self, splits: list[list[int]]) -> list[list[int]]:
        """The splits, and what memory is left spread over the layers: then shares of traffic can be met closely."""
        rooms = [list(split) for split in splits]
        for worker, slots in enumerate(self._slots):
            spare, rest = divmod(slots - sum(split[worker] for split in splits), len(splits))
            for index, room in enumerate(rooms):
                room[worker] += spare + (index < rest)
        return rooms

    def _wanted(self, index: int, count: int) -> tuple[int, ...]:
        """How many of a layer's experts each worker should have if memory were no limit."""
        cost = self._costs[index]
        if (cost, count) not in self._best:
            self._best[cost, count] = _best_split(cost, count, [host.speed for host in (self._local[0], *self._remote)])
        return self._best[cost, count]

    def _cheapest_move(self, splits: list[list[int]], worker: int, total: list[int]) -> tuple[int, int]:
        """The layer and the target for one expert less at a worker."""
        best, found = float("inf"), (-1, -1)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for index, split in enumerate(splits):
            kind = (id(self._costs[index]), tuple(split))
            if not split[worker] or kind in seen:
                continue
            seen.add(kind)
            before = self._even_s(index, tuple(split))
            for target, slots in enumerate(self._slots):
                if target != worker and total[target] < slots:
                    split[worker] -= 1
                    split[target] += 1
                    cost = self._even_s(index, tuple(split)) - before
                    split[worker] += 1
                    split[target] -= 1
                    if cost < best:
                        best, found = cost, (index, target)
        return found

    def _even_s(self, index: int, split: tuple[int, ...]) -> float:
        cost = self._costs[index]
        if (cost, split) not in self._seconds:
            self._seconds[cost, split] = cost.expected_even_s(split)
        return self._seconds[cost, split]

    # ------------------------------------------------------------------------------- which where

    def _shares(self, index: int, experts: list[int], split: list[int]) -> list[float]:
        """Of the traffic to a layer's experts, the share that each worker should have."""
        wanted, heat = self._wanted(index, len(experts)), np.sort(self._heat[index][experts])[::-1]
        total, shares = float(heat.sum()), [0.0] * len(split)
        for worker, (want, count) in enumerate(zip(wanted, split, strict=True)):
            if count < want:  # as much as the hottest give it
                shares[worker] = min(want / len(experts), float(heat[:count].sum()) / total)
        rest, others = max(0.0, 1 - sum(shares)), [s if s >= w else 0 for s, w in zip(split, wanted, strict=True)]
        return [share + rest * count / max(sum(others), 1) for share, count in zip(shares, others, strict=True)]

    def _deal(self, index: int, experts: list[int], rooms: list[int], shares: list[float]) -> dict[int, int]:
        """The worker of each of a layer's experts."""
        heat = self._heat[index][experts]
        kind = (self._costs[index], heat.tobytes(), tuple(rooms), tuple(shares))
        if kind not in self._dealt:
            workers = [-1] * len(experts)
            left, loads = list(rooms), [0.0] * len(rooms)
            for position in sorted(range(len(experts)), key=lambda i: (-heat[i], i)):
                worker = _neediest(shares, loads, [count > 0 for count in left])
                workers[position] = worker
                left[worker] -= 1
                loads[worker] += heat[position] / heat.sum()
            if len(experts) <= _FEW and len(set(heat.tolist())) > 1:
                odds = odds_of(heat, self._layers[index].top_k)
                _improve(workers, left, odds, self._costs[index])
            self._dealt[kind] = workers
        return dict(zip(experts, self._dealt[kind], strict=True))

    def _loads(self, workers: Mapping[ExpertKey, int], index: int) -> list[float]:
        """Shares of the traffic to those of a layer's experts that are placed."""
        loads = [0.0] * len(self._slots)
        for expert in range(self._layers[index].num_experts):
            worker = workers.get(ExpertKey(index, expert))
            if worker is not None:
                loads[worker] += self._heat[index][expert]
        total = max(sum(loads), 1e-300)
        return [load / total for load in loads]

    def _take_over(
        self, workers: dict[ExpertKey, int], index: int, split: list[int], worker: int, share: float, most: int
    ) -> int:
        """Give a new worker its part of a layer, at most ``most``, of those with more. Returns how many."""
        mine = [key for key in keys_of(self._layers, index) if key in workers]
        counts, load, taken = Counter(workers[key] for key in mine), self._loads(workers, index)[worker], 0
        total = sum(self._heat[index][key.expert] for key in mine)
        while counts[worker] < split[worker] and taken < most:
            offered = [key for key in mine if workers[key] != worker and counts[workers[key]] > split[workers[key]]]
            if not offered:
                break
            # With as much traffic as those that are still to come must have on average.
            needed = (share - load) / (split[worker] - counts[worker])
            key = min(offered, key=lambda key: (round(abs(self._heat[index][key.expert] / total - needed), 9), key))
            counts[workers[key]] -= 1
            counts[worker] += 1
            workers[key] = worker
            load += self._heat[index][key.expert] / total
            taken += 1
        return taken

    # ------------------------------------------------------------------------------- names, replicas

    def _name(self, workers: Mapping[ExpertKey, int], old: Placement) -> dict[ExpertKey, str]:
        """Host ids in place of workers. On the compute node any host will do: what has none yet is dealt in turn."""
        free = {host.host_id: host.num_slots for host in self._local}
        primary, others = {}, []
        for key, worker in sorted(workers.items()):
            before = next((host for host in old.hosts_of(key) if free.get(host)), None)
            if worker:
                primary[key] = self._remote[worker - 1].host_id
            elif before is not None:
                primary[key] = before
                free[before] -= 1
            else:
                others.append(key)
        primary |= {key: host_id for host_id, keys in deal(others, free).items() for key in keys}
        return primary

    def _replicate(self, primary: Mapping[ExpertKey, str], old: Placement) -> dict[ExpertKey, tuple[str, ...]]:
        """Copies as long as there is memory, round after round, where they were before or where most is left."""
        local, counts = {host.host_id for host in self._local}, Counter(primary.values())
        free = {host.host_id: host.num_slots - counts[host.host_id] for host in (*self._local, *self._remote)}
        holders: dict[ExpertKey, list[str]] = {key: [host] for key, host in primary.items()}

        def order(key: ExpertKey) -> tuple[bool, float, ExpertKey]:
            is_alone = key in self._not_here and primary[key] not in local
            return not is_alone, -self._heat[key.layer][key.expert], key

        keys, added = sorted(primary, key=order), 1
        while added:
            added = 0
            for key in keys:
                taken = {*holders[key], *(local if local & {*holders[key]} else ())}  # they share a CPU
                targets = [host for host, slots in free.items() if slots > 0 and host not in taken]
                if targets:
                    target = min(targets, key=lambda host: (host not in old.hosts_of(key), -free[host], host))
                    free[target] -= 1
                    holders[key].append(target)
                    added += 1
        return {key: tuple(hosts[1:]) for key, hosts in sorted(holders.items()) if len(hosts) > 1}


def _neediest(shares: Sequence[float], loads: Sequence[float], is_open: Sequence[bool]) -> int:
    """The open worker whose load is furthest below its share."""
    gaps = [(round(load - share, 9), worker) for worker, (load, share) in enumerate(zip(loads, shares, strict=True))]
    return min(gap for gap, is_free in zip(gaps, is_open, strict=True) if is_free)[1]


def _best_split(cost: TokenCost, count: int, speeds: Sequence[ComputeSpeed]) -> tuple[int, ...]:
    """How many of ``count`` equally used experts each worker should have: shifts of ever fewer, from two starts."""
    total = sum(speed.bytes_per_s for speed in speeds)
    shares = [int(count * speed.bytes_per_s / total) for speed in speeds]
    starts = [[count, *[0] * (len(speeds) - 1)], [count - sum(shares[1:]), *shares[1:]]]
    found = []
    for split in starts:
        value, step = cost.expected_even_s(split), max(1, count // 2)
        while step:
            shifts = []
            for source, target in permutations(range(len(split)), 2):
                if split[source] >= step:
                    trial = list(split)
                    trial[source] -= step
                    trial[target] += step
                    shifts.append((cost.expected_even_s(trial), trial))
            if shifts and min(shifts)[0] < value * (1 - _LEAST_GAIN):
                value, split = min(shifts)
            else:
                step //= 2
        found.append((value, split))
    return tuple(min(found)[1])


def _improve(workers: list[int], left: list[int], odds: Doubles, cost: TokenCost) -> None:
    """Move or exchange experts as long as that shortens the layer. Changes ``workers`` and ``left``."""

    def seconds(trial: list[int]) -> float:
        array = np.array(trial)
        return cost.expected_s([odds[array == worker] for worker in range(len(left))])

    value = seconds(workers)
    while True:
        trials = []
        for i, worker in enumerate(workers):
            for target, free in enumerate(left):
                if free and target != worker:
                    trials.append([*workers[:i], target, *workers[i + 1 :]])
            for j in range(i):
                if workers[j] != worker:
                    trial = list(workers)
                    trial[i], trial[j] = trial[j], trial[i]
                    trials.append(trial)
        best = min(((seconds(trial), trial) for trial in trials), default=(value, workers))
        if best[0] >= value * (1 - _LEAST_GAIN):
            return
        for worker in range(len(left)):
            left[worker] += workers.count(worker) - best[1].count(worker)
        value, workers[:] = best[0], best[1]
