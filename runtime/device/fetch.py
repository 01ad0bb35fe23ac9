"""A layer call's experts where some are on the device already: only the others are fetched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moray.runtime.arrays import Ints
from moray.runtime.experts.source import Fetch, FixedLease, Lease, ShardSource


class _PartLease:
    """A lease on some of a call's experts; the others, on the device, have no address."""

    def __init__(self, lease: Lease, addresses: Ints) -> None:
        self._lease, self.addresses = lease, addresses

    def is_valid(self) -> bool:
        return self._lease.is_valid()


class DeviceFetch:
    """What is on the device is taken at once, in one part with what else is here.

    If a part was not valid, what is on the device is looked up anew: copies may have taken the place of others there.
    """

    def __init__(self, source: ShardSource, layer: int, experts: Ints, missing: Callable[[Ints], Ints]) -> None:
        """``missing``: bool [E], which experts are not on the device."""
        self._source, self._layer, self._experts, self._missing = source, layer, experts, missing
        self._is_left = np.ones(len(experts), dtype=np.bool_)
        self._begin()
        self.missed: Ints = experts[:0] if self._fetch is None else self._fetch.missed

    @property
    def is_over(self) -> bool:
        return not self._is_left.any()

    def take(self) -> tuple[Ints, Lease]:
        held = np.flatnonzero(self._is_left & ~self._is_fetched)
        if self._missing(self._experts[held]).any():
            self._begin()
            held = np.flatnonzero(self._is_left & ~self._is_fetched)
        if self._fetch is None or self._fetch.is_over or (len(held) and len(self.missed)):
            return held, FixedLease(np.zeros(len(held), dtype=np.int64))  # the others are still on their way
        here, lease = self._fetch.take()
        addresses = np.zeros(len(self._experts), dtype=np.int64)
        addresses[self._positions[here]] = lease.addresses
        both = np.sort(np.concatenate([held, self._positions[here]]))
        return both, _PartLease(lease, addresses[both])

    def finish(self, positions: Ints) -> None:
        self._is_left[positions] = False
        if self._fetch is not None and (fetched := np.flatnonzero(np.isin(self._positions, positions))).size:
            self._fetch.finish(fetched)

    def _begin(self) -> None:
        """Fetch what is left and not on the device."""
        self._is_fetched = self._is_left.copy()
        self._is_fetched[self._is_left] = self._missing(self._experts[self._is_left])
        self._positions = np.flatnonzero(self._is_fetched)
        wanted = self._experts[self._positions]
        self._fetch: Fetch | None = self._source.fetch(self._layer, wanted) if len(wanted) else None
