"""Where all experts are at a moment, for those who watch."""

from __future__ import annotations

from dataclasses import dataclass

from moray.runtime.arrays import Ints


@dataclass(frozen=True, slots=True)
class Place:
    """Where experts can be."""

    tier: str  # device, arena, remote or disk
    name: str  # of the host, or of the device
    node: str


@dataclass(frozen=True, slots=True)
class Residency:
    """A snapshot. ``layers``: int64 [E] each, indices into ``places``, of which the first is the disk."""

    places: tuple[Place, ...]
    layers: tuple[Ints, ...]
