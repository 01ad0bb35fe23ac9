"""The experts of hosts on this node, used in place: their arenas mapped into the compute process.

What is in memory is found in the arenas' directories, without a message. Only a layer call that misses something
sends, one Need a host; the shards then appear in the directory. What a host lacks that is lost (host_link.py) is read
from the disk into this process, computed with, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.host_link import HostLink
from moray.cluster.messages import Ask, Hint, Need, Release, Welcome
from moray.runtime import futex
from moray.runtime.arena import FAILED, Arena, ArenaRef
from moray.runtime.arrays import Bools, Bytes, Ints
from moray.runtime.errors import ClusterError, HostLostError
from moray.runtime.events import Event
from moray.runtime.experts.source import Fetch, Lease, LeaseTable, SourceInfo, SourceStats
from moray.runtime.kernels.memory import (
    ENTRY,
    FIRST_COUNTER,
    FIRST_SLOT,
    GENERATION,
    NUM_COLUMNS,
    SLOT_BYTES,
    all_equal,
    look_up_each,
)
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import NUMERICS_ID
from moray.runtime.store.store import Store

_CLIENT = "compute"  # an engine has one: a new one takes the place of one that died, whose claims are dropped
_SLICE_S = 0.005  # of a wait, when shards may come from several hosts: one can only sleep on one
_LOOK_S = 0.02  # of a wait for one host, before it is looked after
_ASK_S = 0.5  # without an arrival, before a host is asked whether it answers
_STALL_S = 30.0  # without an arrival, before a living host's disk is given up
_MAX_USES = 512  # layer calls kept to be told with the next message


class ArenaLease:
    """Slots found in directories; valid while none of their generations has moved."""

    def __init__(self, addresses: Ints, counters: Ints, generations: Ints) -> None:
        self.addresses = addresses
        self._counters, self._generations = counters, generations

    def is_valid(self) -> bool:
        return bool(all_equal(self._counters, self._generations))


class _ReadLease:
    """A shard in memory of its own."""

    def __init__(self, shard: Bytes) -> None:
        self._shard = shard
        self.addresses: Ints = np.array([shard.ctypes.data], dtype=np.int64)

    def is_valid(self) -> bool:
        return True


class _Layer:
    """For each expert of a layer: its host, where to look it up, and what was found."""

    def __init__(self, num_experts: int) -> None:
        self.owners: Ints = np.full(num_experts, -1, dtype=np.int64)
        self.leases = LeaseTable(np.zeros((NUM_COLUMNS, num_experts), dtype=np.int64))
        self.leases.columns[GENERATION] = -1

    def look_up(self, experts: Ints) -> Bools:
        found: Bools = look_up_each(self.leases.columns, experts)
        return found


class _Host:
    """What this process knows of one host."""

    def __init__(self, client: HostClient, welcome: Welcome, report: Callable[[Event], None]) -> None:
        self.link, self.holds_all = HostLink(client, welcome, report), welcome.holds_all
        self.arena = self.link.arena
        self.num_experts = sum(len(experts) for experts in welcome.experts)
        self.info = SourceInfo(welcome.host_id, "arena", self.num_experts, welcome.arena_bytes)
        self.uses: list[list[int]] = []
        self.hinted: dict[int, set[int]] = {}  # layer -> experts that it was told to load ahead of its next call

    def directory_of(self, layer: _Layer, experts: Ints) -> Ints:
        """What the directory says of experts of this host: their slots, or why there is none."""
        first_entry = self.arena.entry_addresses(np.zeros(1, dtype=np.int64))
        found: Ints = self.arena.directory[(layer.leases.columns[ENTRY, experts] - first_entry) // 8]
        return found

    def take_uses(self) -> list[list[int]]:
        uses, self.uses = self.uses, []
        return uses


class ArenaSource:
    """The experts of all hosts.

    ``whole_layers``: a layer call that misses anything asks for all experts of its layer and waits for them: what
    offloading whole layers costs, to compare with. ``join_s``: how long a host may take to answer at first.
    ``report`` is told of hosts that are lost and come back; it may not wait.
    """

    remote = None

    def __init__(
        self,
        store: Store,
        hosts: Sequence[HostAddress],
        *,
        whole_layers: bool = False,
        join_s: float = 30.0,
        report: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """Connect to all hosts. Raises ClusterError if they do not hold this store's experts between them."""
        self._store, self._whole_layers, self._report = store, whole_layers, report
        self._layers = [_Layer(layer.num_experts) for layer in store.manifest.layers]
        self._shard_bytes = [layer.layout.num_bytes for layer in store.manifest.layers]
        self._hosts: list[_Host] = []
        self._clients = [HostClient(host, _CLIENT, timeout_s=join_s) for host in hosts]
        self._stats = SourceStats()
        try:
            for client in self._clients:
                self._join(client)
            missing = sum(int((layer.owners < 0).sum()) for layer in self._layers)
            if missing:
                raise ClusterError(f"{missing} experts of {store.path} live on no host; start the engine again")
        except BaseException:
            self.close()  # a connection left to the garbage collector blocks it
            raise
        self.wants_uses = not all(host.holds_all for host in self._hosts)

    @property
    def wants_hints(self) -> bool:
        return self.wants_uses and any(host.arena.wants_hints for host in self._hosts)

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        return _ArenaFetch(self, layer, experts)

    def table(self, layer: int) -> LeaseTable:
        return self._layers[layer].leases

    def in_memory(self, layer: int, experts: Ints) -> Bools:
        """bool [N]: which of a layer's experts are here now."""
        return self._layers[layer].look_up(experts)

    def used(self, layer: int, experts: list[int]) -> None:
        owners = self._layers[layer].owners
        for index, host in enumerate(self._hosts):
            if host.holds_all:
                continue
            mine = experts if len(self._hosts) == 1 else [e for e in experts if owners[e] == index]
            if mine:
                host.uses.append([layer, *mine])
            is_wrong = bool(host.hinted.pop(layer, set()).difference(experts))  # what it still loads should end now
            if (mine and is_wrong) or len(host.uses) > _MAX_USES:
                host.link.send(Hint(layer=layer, experts=[], uses=host.take_uses()))

    def hint(self, layer: int, experts: list[int]) -> None:
        owners, is_here = self._layers[layer].owners, self.in_memory(layer, np.array(experts, dtype=np.int64))
        absent = [e for e, here in zip(experts, is_here.tolist(), strict=True) if not here]
        for index, host in enumerate(self._hosts):
            mine = [e for e in absent if owners[e] == index]
            if mine and host.arena.wants_hints:
                host.hinted[layer] = set(mine)
                host.link.send(Hint(layer=layer, experts=mine, uses=host.take_uses()))

    def describe(self) -> list[SourceInfo]:
        return [host.info for host in self._hosts]

    def owner_of(self, layer: int) -> Ints:
        return self._layers[layer].owners

    def held_by(self, layer: int) -> Ints:
        """int64 [E]: index into ``describe()`` of the arena that each expert is in, -1 if none. From any thread."""
        of_layer, held = self._layers[layer], np.full(len(self._layers[layer].owners), -1, dtype=np.int64)
        for index, host in enumerate(self._hosts):
            mine = np.flatnonzero(of_layer.owners == index)
            held[mine[host.directory_of(of_layer, mine) >= 0]] = index
        return held

    def stats(self) -> SourceStats:
        return self._stats

    @property
    def arenas(self) -> list[Arena]:
        return [host.arena for host in self._hosts]

    def arena_refs(self) -> dict[str, ArenaRef]:
        """This process's own descriptors of the arenas: what a restarted host takes its arena back from."""
        return {host.info.name: host.arena.ref for host in self._hosts}

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for host in self._hosts:
            host.link.close()

    def _join(self, client: HostClient) -> None:
        """Map a host's arena and note where its experts' entries lie."""
        welcome = client.greet()
        check_welcome(welcome, self._store)
        host, first = _Host(client, welcome, self._report), 0
        self._hosts.append(host)
        for of_layer, experts in zip(self._layers, welcome.experts, strict=True):
            columns = of_layer.leases.columns
            of_layer.owners[experts] = len(self._hosts) - 1
            columns[ENTRY, experts] = host.arena.entry_addresses(np.arange(first, first + len(experts)))
            columns[FIRST_SLOT, experts] = host.arena.addresses(np.zeros(1, dtype=np.int64))
            columns[SLOT_BYTES, experts] = host.arena.slot_bytes
            columns[FIRST_COUNTER, experts] = host.arena.counter_address(0)
            first += len(experts)


class _ArenaFetch:
    """One layer call's experts."""

    def __init__(self, source: ArenaSource, layer: int, experts: Ints) -> None:
        self._source, self._layer, self._experts = source, layer, experts
        self._asked_at = perf_counter()  # or begun: since then nobody has confirmed that hosts know of this call
        self._of_layer = source._layers[layer]
        self._is_left = np.ones(len(experts), dtype=np.bool_)
        self._left = np.arange(len(experts))
        self._asked: set[int] = set()  # hosts that know of this call
        self.missed: Ints = experts[:0]
        if len(self._ready()) < len(experts):
            self.missed = self._need()
            source._stats.misses += len(self.missed)
            source._stats.missed_bytes += len(self.missed) * source._shard_bytes[layer]

    @property
    def is_over(self) -> bool:
        return not len(self._left)

    def take(self) -> tuple[Ints, Lease]:
        while True:
            arrivals = [int(host.arena.arrivals[0]) for host in self._source._hosts]
            ready = self._ready()
            if len(ready) < len(self._left) and len(self._asked) < len(self._source._hosts):
                self._need()  # something was evicted before a host knew that it is needed
            waits = self._source._whole_layers and len(ready) < len(self._left) and self._lost() is None
            if len(ready) and not waits:
                leases, experts = self._of_layer.leases, self._experts[ready]
                return ready, ArenaLease(
                    leases.addresses[experts], leases.counters[experts], leases.generations[experts]
                )
            lost = self._lost()
            if lost is not None:
                return self._read(*lost)
            self._wait(arrivals)

    def finish(self, positions: Ints) -> None:
        self._is_left[positions] = False
        self._left = np.flatnonzero(self._is_left)
        if not self._asked:
            return
        for index, host, mine in self._by_host(self._experts):
            if len(mine) <= host.arena.num_slots:
                continue
            done = self._experts[positions]
            done = done[self._of_layer.owners[done] == index]
            if len(done):  # others wait for these slots
                host.link.send(Release(layer=self._layer, experts=done.tolist()))

    def _ready(self) -> Ints:
        return self._left[self._of_layer.look_up(self._experts[self._left])]

    def _need(self) -> Ints:
        """Ask every host that lacks something; it keeps what it has while it loads the rest. Returns what is missed.

        After ``_ready``, which has looked them up.
        """
        experts, generations = self._experts, self._of_layer.leases.generations
        if self._source._whole_layers:
            experts = np.arange(len(self._of_layer.owners))
            self._of_layer.look_up(experts)
        for index, host, mine in self._by_host(experts):
            if host.link.is_lost:
                self._asked.discard(index)
                host.link.check()
            elif index not in self._asked and (generations[mine] < 0).any():
                self._asked.add(index)
                host.hinted.pop(self._layer, None)  # the host sees itself what came true
                host.link.send(Need(layer=self._layer, experts=mine.tolist(), uses=host.take_uses()))
        return self._experts[generations[self._experts] < 0]

    def _wait(self, arrivals: list[int]) -> None:
        """Sleep until something arrives. Raises what keeps it from arriving."""
        started = perf_counter()
        pending = self._by_host(self._experts[self._left])
        slice_s = _LOOK_S if len(pending) == 1 else _SLICE_S
        while True:
            now = perf_counter()
            is_due = now - self._asked_at > _ASK_S  # what arrives meanwhile may be for others
            for index, host, mine in pending:
                if is_due or self._has_failed(host, mine):
                    host.link.ask(Ask(layer=self._layer, experts=mine.tolist()))
                host.link.check()
                if not host.link.is_lost:
                    futex.wait(host.arena.arrivals_address, arrivals[index], slice_s)
            if is_due:
                self._asked_at = now
                if len(self._ready()):
                    break
            if self._lost() is not None:
                break
            if any(int(host.arena.arrivals[0]) != arrivals[index] for index, host, _ in pending):
                break
            if perf_counter() - started > _STALL_S:
                raise HostLostError(f"no expert has come from the disk for {_STALL_S:g} s; is it failing? See dmesg")
        self._source._stats.wait_s += perf_counter() - started

    def _lost(self) -> tuple[int, _Host] | None:
        """The first expert, as a position, that a lost host should have and that is not here."""
        if not any(host.link.is_lost for host in self._source._hosts):
            return None
        absent = self._left[self._of_layer.leases.generations[self._experts[self._left]] < 0]
        for position in absent.tolist():
            host = self._source._hosts[self._of_layer.owners[self._experts[position]]]
            if host.link.is_lost:
                return position, host
        return None

    def _read(self, position: int, host: _Host) -> tuple[Ints, Lease]:
        """An expert of a lost host, from the disk. Raises CorruptShardError, StoreError."""
        started = perf_counter()
        shard = self._source._store.read_shard(ExpertKey(self._layer, int(self._experts[position])))
        host.link.shards_read += 1
        self._source._stats.wait_s += perf_counter() - started
        return np.array([position]), _ReadLease(shard)

    def _has_failed(self, host: _Host, experts: Ints) -> bool:
        return bool((host.directory_of(self._of_layer, experts) == FAILED).any())

    def _by_host(self, experts: Ints) -> list[tuple[int, _Host, Ints]]:
        hosts = self._source._hosts
        if len(hosts) == 1:
            return [(0, hosts[0], experts)]
        owners = self._of_layer.owners[experts]
        split = [(index, host, experts[owners == index]) for index, host in enumerate(hosts)]
        return [(index, host, mine) for index, host, mine in split if len(mine)]


def check_welcome(welcome: Welcome, store: Store) -> None:
    """Raises ClusterError unless a host has the same shards, and computes with them by the same rules."""
    mine = (store.fingerprint, LAYOUT_ID, NUMERICS_ID)
    theirs = (welcome.store_fingerprint, welcome.layout_id, welcome.numerics_id)
    if mine != theirs:
        raise ClusterError(
            f"expert host {welcome.host_id} holds another store or speaks another format: it has {theirs}, "
            f"this process has {mine}; give every node the same store and the same version of moray"
        )
