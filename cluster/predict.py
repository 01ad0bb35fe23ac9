"""Tokens a second of a placement, before anything is loaded. Pure.

A token takes the sum over layers of the trunk's time and the experts'. Of the experts, the mean over layer calls, real
ones if traffic was recorded, else drawn at random: each call's experts are given to those who hold them as the compute
process does it (runtime/lanes/places.py), and the cost model says how long that takes (layer_cost.py). A prompt's chunk
is one call in which every expert has its expected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import numpy as np

from moray.cluster.layer_cost import LayerGeometry, Worker, layer_s, make_rates
from moray.cluster.placement import Heat, HostSpec, Placement, heat_of, uniform_heat
from moray.runtime.arrays import Doubles, Ints
from moray.runtime.lanes.places import choose_places
from moray.runtime.lanes.rates import Rate, Rates
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.trace.simulate import hit_rates

_DRAWN_CALLS = 64  # a layer
_MOST_CALLS = 256  # a layer, of those recorded
_DISK_S = 1e-4  # of a read
# Of a layer that asks others, beside the request that layer_cost.py counts: choosing, packing and summing up, with a
# cache that weights have just gone through (benchmarks/plan_accuracy.py).
_ASKING_S = 5e-4
_LAYER_S = 5e-5  # of a layer's bookkeeping: the demonstration model's six take 0.5 ms a token, from the CPU's cache


@dataclass(frozen=True, slots=True)
class Trunk:
    """Everything but the routed experts, as a token meets it."""

    num_layers: int  # with experts
    bytes_per_token: int  # of weights, read once a forward pass
    kv_bytes: int = 0  # of the cache that is read


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one sequence. Seconds are of a decoded token."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    trunk_s: float
    experts_s: float
    hit_rate: float  # of the experts computed on the compute node: found in its memory
    disk_bytes_per_token: float
    link_bytes_per_token: float  # both ways, over all links


def predict(
    layers: Sequence[LayerGeometry],
    trunk: Trunk,
    hosts: Sequence[HostSpec],
    placement: Placement,
    disk_bytes_per_s: float,
    *,
    calls: Sequence[Sequence[int]] = (),
    chunk: int = 512,
) -> Prediction:
    """Predict what ``placement`` gives. ``calls``: recorded layer calls of single tokens, each [layer, expert, ...].

    ``chunk``: tokens of a prompt in one forward pass. Deterministic.
    """
    return _Predictor(layers, trunk, hosts, placement, disk_bytes_per_s, calls).predict(chunk)


class _LayerPart(NamedTuple):
    """Of a layer, for one token."""

    seconds: float
    disk_bytes: float
    link_bytes: float  # sent and received


class _Predictor:
    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        trunk: Trunk,
        hosts: Sequence[HostSpec],
        placement: Placement,
        disk_bytes_per_s: float,
        calls: Sequence[Sequence[int]],
    ) -> None:
        local = [host for host in hosts if host.link is None]
        remote = [host for host in hosts if host.link is not None]
        numbers = {host.host_id: 0 for host in local} | {host.host_id: i + 1 for i, host in enumerate(remote)}
        self._layers, self._trunk, self._speed = layers, trunk, local[0].speed
        self._num_slots, self._recorded = sum(host.num_slots for host in local), calls
        self._workers = [Worker(local[0].speed), *(Worker(host.speed, host.link) for host in remote)]
        self._disk = Rate(_DISK_S, 1 / disk_bytes_per_s, 0.0)
        rates = {layer: make_rates(layer, self._workers, self._disk) for layer in set(layers)}
        self._rates = [rates[layer] for layer in layers]
        #: [layer][expert]: the workers that hold it; the compute node what nobody does
        self._holders = [
            [_holders(ExpertKey(i, e), placement, numbers) for e in range(layer.num_experts)]
            for i, layer in enumerate(layers)
        ]

    def predict(self, chunk: int) -> Prediction:
        parts = [self._token(index) for index in range(len(self._layers))]
        trunk_s, experts_s = self._trunk_s(1), sum(part.seconds for part in parts)
        prefill_s = self._trunk_s(chunk) + sum(self._chunk_s(index, chunk) for index in range(len(self._layers)))
        return Prediction(
            decode_tokens_per_s=1 / (trunk_s + experts_s),
            prefill_tokens_per_s=chunk / prefill_s,
            trunk_s=trunk_s,
            experts_s=experts_s,
            hit_rate=self._hit_rate,
            disk_bytes_per_token=sum(part.disk_bytes for part in parts),
            link_bytes_per_token=sum(part.link_bytes for part in parts),
        )

    def _trunk_s(self, tokens: int) -> float:
        trunk, speed = self._trunk, self._speed
        read_s = (trunk.bytes_per_token + tokens * trunk.kv_bytes) / speed.bytes_per_s
        return read_s + (tokens - 1) * trunk.bytes_per_token / speed.token_bytes_per_s + trunk.num_layers * _LAYER_S

    def _token(self, index: int) -> _LayerPart:
        """One token's experts of a layer: means over its calls."""
        layer, rates, known = self._layers[index], self._rates[index], {}
        parts = []
        for experts in self._calls[index]:
            kind = tuple(sorted(self._holders[index][expert] for expert in experts))
            if kind not in known:
                places = self._places([1.0] * len(kind), kind, layer, rates)
                counts = np.bincount(places, minlength=len(self._workers))
                missed = self._missed(places, kind, np.ones(len(kind)))
                seconds = layer_s(rates, layer, [(n, n) for n in counts.tolist()], missed)
                requests, pairs = np.count_nonzero(counts[1:]), counts[1:].sum()
                seconds += _ASKING_S if requests else 0.0
                sent = int(requests * layer.sent_bytes + pairs * layer.received_bytes)
                known[kind] = _LayerPart(seconds, missed * layer.shard_bytes, sent)
            parts.append(known[kind])
        return _LayerPart(*(fmean(values) for values in zip(*parts, strict=True)))

    def _chunk_s(self, index: int, tokens: int) -> float:
        layer = self._layers[index]
        share = self._heat[index] / self._heat[index].sum()
        pairs = tokens * layer.top_k * share
        used = 1 - (1 - np.minimum(layer.top_k * share, 1)) ** tokens
        places = self._places(pairs.tolist(), self._holders[index], layer, self._rates[index])
        loads = [
            (float(used[places == worker].sum()), float(pairs[places == worker].sum()))
            for worker in range(len(self._workers))
        ]
        elsewhere = sum(pairs for _, pairs in loads[1:])
        rows = sum(tokens * (1 - (1 - pairs / (tokens * layer.top_k)) ** layer.top_k) for _, pairs in loads[1:])
        rates = make_rates(layer, self._workers, self._disk, rows_per_pair=rows / elsewhere if elsewhere else 0.0)
        return layer_s(rates, layer, loads, self._missed(places, self._holders[index], used))

    def _missed(self, places: Ints, holders: Sequence[tuple[int, ...]], used: Doubles) -> float:
        """Experts that the compute node reads from its disk: those it does not hold, and misses of those it does."""
        chances = np.where([0 in each for each in holders], 1 - self._hit_rate, 1.0)
        return float((chances * used)[places == 0].sum())

    def _places(
        self, tokens: Sequence[float], holders: Sequence[tuple[int, ...]], layer: LayerGeometry, rates: Rates
    ) -> Ints:
        """The worker that computes each expert."""
        is_here, offers = [0 in each for each in holders], [tuple(w - 1 for w in each if w) for each in holders]
        # Expectations need not be whole; the cost model only multiplies them.
        return np.array(choose_places(tokens, is_here, offers, layer.shard_bytes, rates)) + 1  # type: ignore[arg-type]

    @cached_property
    def _heat(self) -> Heat:
        if not self._recorded:
            return uniform_heat(self._layers)
        return heat_of(self._recorded, [layer.num_experts for layer in self._layers])

    @cached_property
    def _calls(self) -> list[list[list[int]]]:
        """Calls of each layer: the last ones recorded, or drawn ones."""
        calls: list[list[list[int]]] = [[] for _ in self._layers]
        for index, *experts in self._recorded:
            if len(experts) <= self._layers[index].top_k:  # others are of several tokens
                calls[index].append(experts)
        random = np.random.default_rng(0)
        for index, layer in enumerate(self._layers):
            drawn = (random.permutation(layer.num_experts)[: layer.top_k].tolist() for _ in range(_DRAWN_CALLS))
            calls[index] = calls[index][-_MOST_CALLS:] or [*drawn]
        return calls

    @cached_property
    def _hit_rate(self) -> float:
        """Of the experts that are computed here, how many are in memory."""
        here = [[e for e, holders in enumerate(layer) if 0 in holders] for layer in self._holders]
        total = sum(len(experts) for experts in here)
        if total <= self._num_slots:
            return 1.0
        if not self._recorded:
            return self._num_slots / total
        sizes = [len(experts) for experts in here if len(experts)]
        number, first = [], 0
        for experts in here:
            number.append(dict(zip(experts, range(first, first + len(experts)), strict=True)))
            first += len(experts)
        calls = [[number[i][e] for e in experts if e in number[i]] for i, *experts in self._recorded]
        # The engine takes the policy that would have been best, too (runtime/trace/traffic.py).
        return max(hit_rates([[call for call in calls if call]], sizes, self._num_slots).values())


def _holders(key: ExpertKey, placement: Placement, numbers: dict[str, int]) -> tuple[int, ...]:
    return tuple(sorted({numbers[host] for host in placement.hosts_of(key)})) or (0,)
