"""Stores with a part of their shards, and hosts that lend theirs."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.hosts import new_address, serving

from moray.cluster.client import HostAddress
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.presence import write_presence
from moray.runtime.store.store import Store


def partial_copy(store: Store, path: Path, keys: Collection[ExpertKey]) -> Path:
    """A copy with holes in place of all shards but these."""
    shutil.copytree(store.path, path)
    for key, entry in store.manifest.shards.items():
        if key not in keys:
            with (path / entry.file).open("r+b") as file:
                file.seek(entry.offset)
                file.write(bytes(entry.num_bytes))
    write_presence(path, store.manifest, keys)
    return path


def damage(path: Path, store: Store, key: ExpertKey) -> None:
    """Change a byte of a shard in a copy of a store."""
    entry = store.manifest.shards[key]
    with (path / entry.file).open("r+b") as file:
        file.seek(entry.offset + 100_000)
        byte = file.read(1)
        file.seek(entry.offset + 100_000)
        file.write(bytes([byte[0] ^ 1]))


@contextmanager
def lending(store: Store, name: str = "lender") -> Iterator[HostAddress]:
    """A host with nothing in memory, whose store others may read."""
    host, address = ShardHost(store, [], 1), new_address(name)
    try:
        with serving(address, host):
            yield address
    finally:
        host.close()
