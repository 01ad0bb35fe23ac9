"""What a device's tier did, as numbers; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from moray.runtime.lanes.rates import RatesSnapshot


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """A snapshot. Uses and bytes count an expert once for each layer call that needed it; bytes are of its shard."""

    device: str
    num_slots: int
    num_resident: int
    slot_bytes: int
    uses_by_lane: dict[str, int]
    bytes_by_lane: dict[str, int]
    copies: int  # to the device, those that no layer waited for included
    evictions: int
    dropped: int  # copies whose source changed meanwhile
    rates: RatesSnapshot
