"""What a layer's experts cost where they lie: the lanes' cost model (runtime/lanes/cost.py), asked about whole hosts.

A host computes all experts of a layer that it has in one go, and is sent one request for them. So to the cost model
they are one piece of work: its tokens are their (token, expert) pairs, its bytes those of their shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moray.cluster.topology import ComputeSpeed, LinkReport
from moray.runtime.arrays import Doubles
from moray.runtime.lanes.cost import Assignment, Work, predict_s
from moray.runtime.lanes.lane import Lane, Resource, network, remote_cpu
from moray.runtime.lanes.rates import Rate, Rates
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.manifest import Manifest

_NO_DISK = Rate(0.0, 1e-12, 0.0)
_REQUEST_S = 2e-4  # of a layer's request, beyond an Echo of its bytes and the kernels (benchmarks/remote_round_trip.py)


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One MoE layer in numbers."""

    num_experts: int
    top_k: int  # experts a token
    shard_bytes: int
    sent_bytes: int  # a token's activations, to a remote host
    received_bytes: int  # a (token, expert) pair's output


@dataclass(frozen=True, slots=True)
class Worker:
    """What computes experts: the compute node (``link`` None), which all of its hosts' arenas belong to, or a host."""

    speed: ComputeSpeed
    link: LinkReport | None = None


def geometry_of(manifest: Manifest, top_k: Sequence[int], numerics: Numerics = "int8") -> list[LayerGeometry]:
    """The MoE layers of a store. ``top_k``: experts a token, by layer."""
    found = []
    for layer, k in zip(manifest.layers, top_k, strict=True):
        up, down = layer.layout.tensors[0].spec, layer.layout["down_proj"].spec
        assert up is not None and down is not None
        is_int8 = numerics == "int8" and up.is_quantized
        sent = up.columns + 4 * up.num_groups if is_int8 else 4 * up.columns
        found.append(LayerGeometry(layer.num_experts, k, layer.layout.num_bytes, sent, 4 * down.rows))
    return found


def make_rates(
    layer: LayerGeometry, workers: Sequence[Worker], disk: Rate = _NO_DISK, *, rows_per_pair: float = 0.0
) -> Rates:
    """The cost model's rates for a layer. The first worker is the compute node.

    A request has the activations of each of its tokens once: a first row, and ``rows_per_pair`` others.
    """
    both_ways = layer.received_bytes + rows_per_pair * layer.sent_bytes
    rates = Rates(len(workers) - 1, token_bytes=both_ways / 2)
    seeds = {int(Resource.CPU): workers[0].speed.rate(layer.shard_bytes), int(Resource.DISK): disk}
    for index, worker in enumerate(workers[1:]):
        assert worker.link is not None
        link = worker.link.rate
        first_row = link._replace(fixed_s=link.seconds(layer.sent_bytes, 0) + _REQUEST_S)
        seeds |= {network(index): first_row, remote_cpu(index): worker.speed.rate(layer.shard_bytes)}
    for resource, rate in seeds.items():
        rates.seed(resource, rate, rate)
    return rates


def layer_s(rates: Rates, layer: LayerGeometry, loads: Sequence[tuple[float, float]], loaded: float = 0.0) -> float:
    """Seconds until all workers have done their part of a layer.

    ``loads``: for each worker, experts and (token, expert) pairs. ``loaded``: how many of the first worker's experts
    come from the disk, which may be an expectation.
    """
    pieces = []
    (experts, pairs), *remote = loads
    if experts > loaded:
        here = experts - loaded
        pieces.append((_work(layer, here, pairs * here / experts, Lane.HOST_CPU), -1))
    if loaded > 0:
        number = max(1, round(loaded))
        each = _work(layer, loaded / number, pairs * loaded / experts / number, Lane.DISK_LOAD)
        pieces += number * [(each, -1)]
    for index, (experts, pairs) in enumerate(remote):
        if experts > 0:
            pieces.append((_work(layer, experts, pairs, Lane.REMOTE_COMPUTE, (index,)), index))
    if not pieces:
        return 0.0
    works, remotes = zip(*pieces, strict=True)
    return predict_s(works, Assignment(tuple(work.lanes[0] for work in works), remotes), rates)


def _work(layer: LayerGeometry, experts: float, pairs: float, lane: Lane, remotes: tuple[int, ...] = ()) -> Work:
    # Expectations need not be whole; the cost model only multiplies them.
    return Work(0, pairs, experts * layer.shard_bytes, (lane,), 0.0, remotes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- one token, random routing


class TokenCost:
    """Expected seconds of a layer for one token, for any split of its experts.

    Each expert is chosen with its own odds, ``top_k`` of them together (conditional Poisson sampling: Chen, Dempster
    and Liu, Biometrika 81, 1994): the number chosen at a worker is distributed as the elementary symmetric polynomials
    of the odds there.
    """

    def __init__(self, layer: LayerGeometry, workers: Sequence[Worker]) -> None:
        rates, counts = make_rates(layer, workers), range(layer.top_k + 1)
        nothing = len(workers) * [(0.0, 0.0)]
        #: [worker][n]: seconds for n experts, one token each
        self.tables = [
            [layer_s(rates, layer, [*nothing[:w], (n, n), *nothing[w + 1 :]]) for n in counts]
            for w in range(len(workers))
        ]
        self._top_k = layer.top_k
        self._levels = np.unique([seconds for table in self.tables for seconds in table])
        #: [worker][level, n]: whether n experts take it no longer than that
        self._within = [np.array(table) <= self._levels[:, None] for table in self.tables]

    def expected_s(self, odds: Sequence[Doubles]) -> float:
        """``odds``: of the experts at each worker, up to a common factor."""
        return self._expected_s([symmetric_polynomials(each, self._top_k) for each in odds])

    def expected_even_s(self, counts: Sequence[int]) -> float:
        """If all experts are chosen equally often; ``counts``: experts at each worker."""
        return self._expected_s([_binomials(count, self._top_k) for count in counts])

    def _expected_s(self, polynomials: list[Doubles]) -> float:
        k = self._top_k
        product = np.zeros((len(self._levels), k + 1))  # weights of choices that no worker takes longer for
        product[:, 0] = 1.0
        for polynomial, within in zip(polynomials, self._within, strict=True):
            mine, before = within * polynomial, product
            product = before * mine[:, :1]
            for n in range(1, k + 1):
                product[:, n:] += before[:, : k + 1 - n] * mine[:, n : n + 1]
        weights = product[:, np.flatnonzero(product[-1])[-1]]  # all of them, if there are fewer than top_k
        return float(np.diff(weights, prepend=0.0) @ self._levels / weights[-1])


def symmetric_polynomials(odds: Doubles, degree: int) -> Doubles:
    """The elementary symmetric polynomials of ``odds``, of degree 0 to ``degree``."""
    values = np.zeros(degree + 1)
    values[0] = 1.0
    for each in odds:
        values[1:] += each * values[:-1]
    return values


@lru_cache(maxsize=4096)
def _binomials(count: int, degree: int) -> Doubles:
    return symmetric_polynomials(np.ones(count), degree)


def odds_of(heat: Doubles, top_k: int) -> Doubles:
    """Odds of being chosen, from how often each expert is: shares of a layer's uses, or anything proportional."""
    share = np.minimum(top_k * heat / heat.sum(), 0.98) if heat.sum() > 0 else np.full(len(heat), top_k / len(heat))
    share = np.clip(share, 1e-4, 0.98)
    odds: Doubles = share / (1 - share)
    even: Doubles = odds / odds.mean()
    return even
