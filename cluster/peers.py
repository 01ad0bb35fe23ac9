"""Shards from other hosts, for a host whose disk lacks or has damaged them; and whole stores, for who copies one."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeVar

from moray.cluster.client import HelloRequiredError, HostAddress, HostClient
from moray.cluster.keys import KeyPair
from moray.cluster.messages import Bytes, Files, ListFiles, Message, Read, ReadFile
from moray.runtime.errors import CorruptShardError, HostLostError, MorayError, ProtocolError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest, decode_manifest
from moray.runtime.store.presence import keys_of
from moray.runtime.store.reader import ShardReader
from moray.runtime.store.shelf import StoreFile

_READ_BYTES = 512 << 10  # of one request: what a Compute may have to wait for on the host's way out
_IN_FLIGHT = 4  # requests of one read, so that disk and link work at once
_TIMEOUT_S = 1.5  # without any answer
_SUSPECTED_S = 5.0  # then a host that did not answer is asked like others again
_ATTEMPTS = 3  # of one who copies a store
_LACKING_S = 30.0  # then a host that had no good copy is asked for it like others again
_Got = TypeVar("_Got")


class _Reads:
    """Reads from one host, by any thread: each borrows a connection."""

    def __init__(self, host: HostAddress, keys: KeyPair | None, fingerprint: str | None, timeout_s: float) -> None:
        self.host = host
        self._keys, self._fingerprint, self._timeout_s = keys, fingerprint, timeout_s
        self._idle: list[HostClient] = []
        self._num_made = 0
        self._is_closed = False
        self._lock = threading.Lock()

    def fill(self, ask: Callable[[int, int], Message], start: int, view: memoryview) -> None:
        """Fill ``view`` with answers to ``ask(offset, num_bytes)`` from offset ``start`` on. Raises MorayError."""
        client = self._borrow()
        try:
            waiting: deque[tuple[int, memoryview]] = deque()
            for at in range(0, len(view), _READ_BYTES):
                part = view[at : at + _READ_BYTES]
                waiting.append((client.send(ask(start + at, len(part))), part))
                if len(waiting) == _IN_FLIGHT:
                    self._take(client, *waiting.popleft())
            while waiting:
                self._take(client, *waiting.popleft())
        except BaseException:
            client.close()  # answers may still come
            raise
        self._give_back(client)

    def ask(self, message: Message) -> Message:
        client = self._borrow()
        try:
            reply, _ = client.request(message)
        except BaseException:
            client.close()
            raise
        self._give_back(client)
        return reply

    def drop_idle(self) -> None:
        """The host was restarted, or did not answer: connections of before are of no use."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def close(self) -> None:
        """Reads under way come to their end."""
        self._is_closed = True
        self.drop_idle()

    def _take(self, client: HostClient, request_id: int, part: memoryview) -> None:
        reply, data = client.receive(request_id)
        if not isinstance(reply, Bytes) or len(data) != len(part):
            raise ProtocolError(f"host {self.host.host_id} did not answer with the {len(part)} bytes asked for")
        part[:] = data

    def _borrow(self) -> HostClient:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._num_made += 1
            name = f"reader-{os.getpid()}-{id(self):x}-{self._num_made}"
        client = HostClient(self.host, name, keys=self._keys, timeout_s=self._timeout_s)
        try:
            welcome = client.greet()
            if self._fingerprint is not None and welcome.store_fingerprint != self._fingerprint:
                raise StoreError(
                    f"host {self.host.host_id} serves another store (fingerprint {welcome.store_fingerprint}, expected "
                    f"{self._fingerprint}); give every node the same store"
                )
        except BaseException:
            client.close()
            raise
        return client

    def _give_back(self, client: HostClient) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(client)
                return
        client.close()


class Peer:
    """One other host as a ``ShardReader``. Remembers when it did not answer, and of what it had no good copy."""

    def __init__(
        self,
        host: HostAddress,
        manifest: Manifest,
        keys: KeyPair | None,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.host, self.name = host, f"host {host.host_id}"
        self._reads = _Reads(host, keys, manifest.fingerprint, timeout_s)
        self._manifest, self._clock = manifest, clock
        self._suspected_until = 0.0
        self._lacking: dict[ExpertKey, float] = {}

    def rank(self, key: ExpertKey) -> int:
        """0: to be asked first; 1: it lacked this shard lately; 2: it did not answer lately."""
        now = self._clock()
        return 2 if now < self._suspected_until else int(now < self._lacking.get(key, 0.0))

    def read(self, key: ExpertKey, start: int, view: memoryview) -> None:
        wanted = view[: self._manifest.shards[key].num_bytes - start]

        def ask(offset: int, num_bytes: int) -> Message:
            return Read(layer=key.layer, expert=key.expert, offset=offset, num_bytes=num_bytes)

        try:
            try:
                self._reads.fill(ask, start, wanted)
            except HelloRequiredError:
                self._reads.drop_idle()
                self._reads.fill(ask, start, wanted)
        except HostLostError:
            self._suspected_until = self._clock() + _SUSPECTED_S
            raise
        except MorayError:
            self._lacking[key] = self._clock() + _LACKING_S
            raise
        self._suspected_until = 0.0
        self._lacking.pop(key, None)

    def corrupt(self, key: ExpertKey) -> CorruptShardError:
        self._lacking[key] = self._clock() + _LACKING_S
        return CorruptShardError(
            f"{self.name} at {self.host.address} sent a shard of expert {key.expert} of MoE layer {key.layer} that "
            "fails its checksum; run `moray store verify` there"
        )

    def close(self) -> None:
        self._reads.close()


class Peers:
    """The other hosts of a store. Thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        hosts: Sequence[HostAddress],
        keys: KeyPair | None = None,
        *,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """``timeout_s``: without any answer, before a host counts as gone."""
        self._manifest, self._keys, self._timeout_s, self._clock = manifest, keys, timeout_s, clock
        self._peers: dict[HostAddress, Peer] = {}
        self.set_hosts(hosts)

    def set_hosts(self, hosts: Sequence[HostAddress]) -> None:
        """From now on these: a host joined, or left. Reads under way come to their end."""
        old = self._peers
        new = set(hosts) - old.keys()
        made = {host: Peer(host, self._manifest, self._keys, self._timeout_s, self._clock) for host in new}
        self._peers = {host: old[host] if host in old else made[host] for host in hosts}
        for host in old.keys() - self._peers.keys():
            old[host].close()

    def of(self, key: ExpertKey) -> list[ShardReader]:
        """All, those that are likely to have the shard first; among equals, each expert begins with another."""
        peers = list(self._peers.values())
        first = (key.layer + key.expert) % len(peers) if peers else 0
        ranked: list[Peer] = sorted(peers[first:] + peers[:first], key=lambda peer: peer.rank(key))
        return [*ranked]

    def close(self) -> None:
        self.set_hosts([])


class RemoteStore:
    """A ``SyncSource``: the store of a host."""

    def __init__(self, host: HostAddress, keys: KeyPair | None, *, timeout_s: float = 10.0) -> None:
        """Connect. ``timeout_s``: without an answer, for each of some attempts. Raises HostLostError, ProtocolError."""
        self.name = host.address
        self._reads = _Reads(host, keys, None, timeout_s)
        try:
            listed = self._patiently(lambda: self._reads.ask(ListFiles()))
            if not isinstance(listed, Files):
                raise ProtocolError(f"{self.name} answered ListFiles with {type(listed).__name__}")
            data = memoryview(bytearray(listed.manifest_bytes))
            self.read_file(MANIFEST_NAME, 0, data)
            self.manifest_data = bytes(data)
            manifest = decode_manifest(self.manifest_data, f"the manifest of {self.name}")
            self._present = _present(listed, manifest, self.name)
        except BaseException:
            self.close()
            raise
        self._files = [StoreFile(entry.name, entry.num_bytes, entry.xxh3) for entry in listed.files]

    def files(self) -> list[StoreFile]:
        return self._files

    def has(self, key: ExpertKey) -> bool:
        return key in self._present

    def read_shard(self, key: ExpertKey, view: memoryview) -> None:
        def ask(offset: int, num_bytes: int) -> Message:
            return Read(layer=key.layer, expert=key.expert, offset=offset, num_bytes=num_bytes)

        self._patiently(lambda: self._reads.fill(ask, 0, view))

    def read_file(self, name: str, start: int, view: memoryview) -> None:
        def ask(offset: int, num_bytes: int) -> Message:
            return ReadFile(name=name, offset=offset, num_bytes=num_bytes)

        self._patiently(lambda: self._reads.fill(ask, start, view))

    def close(self) -> None:
        self._reads.close()

    def _patiently(self, attempt: Callable[[], _Got]) -> _Got:
        """A link that fails for a while costs only time."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return attempt()
            except (HostLostError, HelloRequiredError):
                self._reads.drop_idle()
        try:
            return attempt()
        except HostLostError as error:
            raise HostLostError(
                f"{self.name} did not answer; is it served there, with the same keys, and the way not blocked? "
                "Run the same command again, it continues where it stopped"
            ) from error


def _present(listed: Files, manifest: Manifest, name: str) -> frozenset[ExpertKey]:
    try:
        return keys_of(listed.present, manifest)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"{name} sent a list of shards that is none ({error})") from error
