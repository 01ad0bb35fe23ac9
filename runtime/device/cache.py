"""Shards kept in the device's memory, within a budget of bytes.

    ABSENT -> COPYING -> RESIDENT -> ABSENT
                 |
                 +-> ABSENT, if what was copied had changed meanwhile

A copy may run beside everything else, also past the lease that it began with. What it brought counts only if the lease
says, after the copy, that the arena still holds what was leased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moray.runtime.device.transfer import Mover, Transfer, make_mover
from moray.runtime.errors import ConfigError, ResourceError
from moray.runtime.memory import format_bytes
from moray.runtime.residency.policy import Policy


@dataclass(slots=True, eq=False)
class Entry:
    """A shard in a slot. ``transfer`` is None once it is resident."""

    expert: int
    slot: int
    num_bytes: int
    transfer: Transfer | None
    is_valid: Callable[[], bool]
    concurrent: bool  # the CPU computed beside the copy


@dataclass(slots=True)
class CacheCounts:
    """Since the start."""

    copies: int = 0
    evictions: int = 0
    dropped: int = 0  # copies of what had changed meanwhile


class DeviceCache:
    """Slots of shard size in one buffer on the device. Used by one thread.

    ``policy`` suggests what to evict; the cache accounts, and evicts only what is resident and not held. Experts are
    numbers over all layers.
    """

    def __init__(
        self, device: torch.device, budget_bytes: int, slot_bytes: int, num_experts: int, policy: Policy
    ) -> None:
        """Take the memory, at most ``budget_bytes``. Raises ConfigError for a budget below one shard, ResourceError."""
        self.num_slots = min(budget_bytes // slot_bytes, num_experts)
        if self.num_slots < 1:
            raise ConfigError(
                f"device memory for experts is {format_bytes(budget_bytes)}, one expert takes "
                f"{format_bytes(slot_bytes)}; give at least that, or 0 to compute all experts on the CPU"
            )
        self.device, self.slot_bytes = device, slot_bytes
        self.counts = CacheCounts()
        self._slots = _take_memory(device, self.num_slots, slot_bytes)
        self._mover: Mover = make_mover(device, slot_bytes)
        self._policy = policy
        self._entries: dict[int, Entry] = {}  # by expert: copying or resident
        self._copying: list[Entry] = []  # in the order of their starts
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._held: set[int] = set()
        self._last_use: list[Any | None] = [None] * self.num_slots
        self._link_times: list[tuple[int, float, bool]] = []

    @property
    def num_resident(self) -> int:
        return len(self._entries) - len(self._copying)

    @property
    def is_copying(self) -> bool:
        return bool(self._copying)

    def register(self, address: int, num_bytes: int) -> bool:
        """Let the device read an arena by itself: faster, and pins that memory. False if it cannot."""
        return self._mover.register(address, num_bytes)

    def resident(self, experts: Sequence[int]) -> list[bool]:
        """Whether each is ready to be used."""
        entries = self._entries
        return [(entry := entries.get(expert)) is not None and entry.transfer is None for expert in experts]

    @property
    def memory(self) -> torch.Tensor:
        """uint8 [num_slots * slot_bytes]: all slots."""
        return self._slots.view(-1)

    def offset(self, expert: int) -> int:
        """In ``memory``, of an expert that is resident, or whose copy the device's computing has joined."""
        return self._entries[expert].slot * self.slot_bytes

    def trial(self, address: int, target: torch.Tensor) -> None:
        """Copy as ``copy`` does, but into ``target``, and wait for it: to measure. May be called by another thread."""
        self._mover.start(address, target, None).wait()

    @contextmanager
    def holding(self, experts: Sequence[int]) -> Iterator[None]:
        """Nothing of these is evicted meanwhile."""
        added = set(experts) - self._held
        self._held |= added
        try:
            yield
        finally:
            self._held -= added

    def copy(
        self, expert: int, address: int, num_bytes: int, is_valid: Callable[[], bool], concurrent: bool = False
    ) -> Entry | None:
        """Start to copy the shard of an expert that is absent; None if no slot can be had now.

        ``is_valid``: of the lease on ``address``; called after the copy, perhaps after the lease was released.
        ``concurrent``: the CPU computes meanwhile.
        """
        assert expert not in self._entries and num_bytes <= self.slot_bytes
        slot = self._take_slot(expert)
        if slot is None:
            return None
        transfer = self._mover.start(address, self._slots[slot, :num_bytes], self._last_use[slot])
        entry = self._entries[expert] = Entry(expert, slot, num_bytes, transfer, is_valid, concurrent)
        self._copying.append(entry)
        self._policy.loaded(expert)
        self.counts.copies += 1
        return entry

    def settle(self, entry: Entry) -> bool:
        """Wait for a copy: it becomes resident, or is dropped because its source changed. Returns which."""
        assert entry.transfer is not None
        seconds = entry.transfer.wait()
        self._link_times.append((entry.num_bytes, seconds, entry.concurrent))
        self._copying.remove(entry)
        if entry.is_valid():
            entry.transfer = None
            return True
        self.counts.dropped += 1
        self._release(entry)
        return False

    def collect(self, wanted: Sequence[int] | None = None) -> None:
        """Settle the copies that are done, and wait for those that are wanted, by default all."""
        for entry in list(self._copying):
            assert entry.transfer is not None
            if wanted is None or entry.expert in wanted or entry.transfer.is_done():
                self.settle(entry)

    def take_link_times(self) -> list[tuple[int, float, bool]]:
        """Bytes, seconds and whether the CPU computed meanwhile, of the copies settled since the last call."""
        times, self._link_times = self._link_times, []
        return times

    def used(self, experts: Sequence[int]) -> None:
        """A layer call used these of the device's, or will have when the device has done what it was given."""
        mark = self._mover.mark()
        for expert in experts:
            self._last_use[self._entries[expert].slot] = mark

    def tell_policy(self, experts: Sequence[int]) -> None:
        """What a layer call used, wherever it was computed."""
        self._policy.used([expert for expert in experts if expert in self._entries])

    def clear(self) -> None:
        """Forget all shards."""
        self.collect()
        for entry in list(self._entries.values()):
            self._release(entry)

    def close(self) -> None:
        """Wait for the copies under way. Call it before the memory that they read is unmapped."""
        self.collect()
        self._mover.close()

    def validate(self) -> None:
        """Raises AssertionError unless every slot is free or has one shard, and the budget is kept."""
        slots = [entry.slot for entry in self._entries.values()]
        assert sorted(slots + self._free) == list(range(self.num_slots)), (slots, self._free)
        assert all(expert == entry.expert for expert, entry in self._entries.items())
        assert all(self._entries[entry.expert] is entry for entry in self._copying)
        assert {id(e) for e in self._copying} == {id(e) for e in self._entries.values() if e.transfer is not None}
        assert self._slots.numel() == self.num_slots * self.slot_bytes

    def _take_slot(self, incoming: int) -> int | None:
        if not self._free:
            victim = self._policy.victim(incoming, self._may_evict)
            if victim is None:
                return None
            assert self._may_evict(victim), f"the policy suggests {victim}, which may not be evicted"
            self.counts.evictions += 1
            self._release(self._entries[victim])
        return self._free.pop()

    def _may_evict(self, expert: int) -> bool:
        entry = self._entries.get(expert)
        return entry is not None and entry.transfer is None and expert not in self._held

    def _release(self, entry: Entry) -> None:
        del self._entries[entry.expert]
        self._free.append(entry.slot)
        self._policy.evicted(entry.expert)


def _take_memory(device: torch.device, num_slots: int, slot_bytes: int) -> torch.Tensor:
    try:
        return torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ResourceError(
            f"{num_slots} experts need {format_bytes(num_slots * slot_bytes)} of device memory, {format_bytes(free)} "
            f"of {format_bytes(total)} are free; use a smaller --device-memory"
        ) from error
