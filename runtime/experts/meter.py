"""What the experts did: tokens per expert, bytes read, and where the time of a layer went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moray.runtime.arrays import Ints
from moray.runtime.experts.source import ExpertSource
from moray.runtime.store.manifest import Manifest

if TYPE_CHECKING:  # keeps Numba out of processes that only read statistics
    from moray.runtime.kernels.ops import Grouping


@dataclass(frozen=True, slots=True)
class ExpertsStats:
    """A snapshot. Bytes count a shard once for each layer call that used it."""

    tokens_per_expert: list[list[int]]  # [layer][expert]
    bytes_by_source: dict[str, int]
    layer_calls: int
    uses: int  # of experts by layer calls
    group_s: float
    lease_s: float
    compute_s: float

    @property
    def num_used(self) -> int:
        return sum(count > 0 for layer in self.tokens_per_expert for count in layer)

    @property
    def num_experts(self) -> int:
        return sum(len(layer) for layer in self.tokens_per_expert)


@dataclass(slots=True)
class ExpertsMeter:
    """Counts. Written by the step loop's thread; snapshots may be a layer behind."""

    tokens: list[Ints]
    owners: list[Ints]
    shard_bytes: list[int]
    names: list[str]
    bytes_by_owner: Ints
    layer_calls: int = 0
    uses: int = 0
    group_s: float = 0.0
    lease_s: float = 0.0
    compute_s: float = 0.0
    _times: Ints = field(default_factory=lambda: np.zeros(3, dtype=np.int64))

    @classmethod
    def of(cls, manifest: Manifest, source: ExpertSource) -> ExpertsMeter:
        places = source.describe()
        return cls(
            tokens=[np.zeros(layer.num_experts, dtype=np.int64) for layer in manifest.layers],
            owners=[source.owner_of(layer) for layer in range(len(manifest.layers))],
            shard_bytes=[layer.layout.num_bytes for layer in manifest.layers],
            names=[place.name for place in places],
            bytes_by_owner=np.zeros(len(places), dtype=np.int64),
        )

    def record(
        self, layer: int, grouping: Grouping, group_s: float, lease_s: float, compute_s: float,
        elsewhere: Ints | None = None,
    ) -> None:  # fmt: skip
        """``elsewhere``: experts that other machines computed; they count for the last place."""
        from moray.runtime.kernels.moe import count_use

        owners = self.owners[layer]
        if elsewhere is not None:
            owners = owners.copy()
            owners[elsewhere] = len(self.names) - 1
        count_use(
            grouping.active, grouping.starts, self.shard_bytes[layer], owners, self.tokens[layer], self.bytes_by_owner
        )
        self.layer_calls += 1
        self.uses += len(grouping.active)
        self.group_s += group_s
        self.lease_s += lease_s
        self.compute_s += compute_s

    def time_routed(self, layer: int, used: Ints, compute: Callable[[tuple[Ints, Ints, Ints], Ints], bool]) -> bool:
        """Count a layer whose kernel counts by itself: its counters, and ns of grouping, leases and computing.

        ``used``: where the kernel says which experts it used (kernels/routed.py).
        """
        self._times[:] = 0
        done = compute((self.owners[layer], self.tokens[layer], self.bytes_by_owner), self._times)
        if done:
            self._count(1, int(used[0]))
        return done

    def time_layers(self, first: int, uses: Ints, compute: Callable[[int, tuple[Ints, Ints, Ints]], int]) -> int:
        """As ``time_routed``, of several layers from ``first`` on, which count their tokens. Returns where they end.

        ``uses`` [L, ..]: how many experts each layer used, and which, written; ``compute``: given the first and what it
        adds to, as ``layers_at`` takes it.
        """
        self._times[:] = 0
        end = compute(first, (self.bytes_by_owner, self._times, uses))
        self._count(end - first, int(uses[first:end, 0].sum()))
        return end

    def _count(self, layer_calls: int, uses: int) -> None:
        self.layer_calls += layer_calls
        self.uses += uses
        group_ns, lease_ns, compute_ns = self._times.tolist()
        self.group_s += 1e-9 * group_ns
        self.lease_s += 1e-9 * lease_ns
        self.compute_s += 1e-9 * compute_ns

    def reset(self) -> None:
        """Forget what was counted so far."""
        for tokens in self.tokens:
            tokens[:] = 0
        self.bytes_by_owner[:] = 0
        self.layer_calls, self.uses = 0, 0
        self.group_s, self.lease_s, self.compute_s = 0.0, 0.0, 0.0

    def snapshot(self) -> ExpertsStats:
        return ExpertsStats(
            tokens_per_expert=[layer.tolist() for layer in self.tokens],
            bytes_by_source=dict(zip(self.names, self.bytes_by_owner.tolist(), strict=True)),
            layer_calls=self.layer_calls,
            uses=self.uses,
            group_s=self.group_s,
            lease_s=self.lease_s,
            compute_s=self.compute_s,
        )
