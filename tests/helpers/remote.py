"""Remote hosts: over tcp:// with TLS, in threads of this process or in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

from helpers.hosts import TOKEN, make_host, new_address
from helpers.processes import child, read_line

from moray.cluster.client import HostAddress
from moray.cluster.cluster_source import ClusterSource
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store


@dataclass
class Remote:
    """One remote host of this process."""

    address: HostAddress
    host: ShardHost
    server: DataPlaneServer


@dataclass
class Net:
    """A local host, remote ones, and what reads from all of them."""

    source: ClusterSource
    local: ShardHost
    remotes: list[Remote]

    def remote_pairs(self) -> int:
        return sum(remote.server.stats.pairs_computed for remote in self.remotes)


def serve(
    store: Store, host_id: str, assigned: Sequence[ExpertKey], client: KeyPair, address: str = "tcp://127.0.0.1:0",
    keys: KeyPair | None = None, **options: Any,
) -> Remote:  # fmt: skip
    """A host that knows all experts, and has in memory those assigned to it."""
    host = make_host(store, list(store.manifest.shards), assigned=assigned, **options)
    admission = Admission(keys or KeyPair.make(), [client.public])
    server = DataPlaneServer(host_id, host, address, TOKEN, admission)
    made = HostAddress(host_id, server.address, TOKEN, node=host_id, server_key=admission.keys.public)
    return Remote(made, host, server)


@contextmanager
def net(
    store: Store, local: Sequence[ExpertKey], remote: Sequence[Sequence[ExpertKey]], num_slots: int | None = None,
    **options: Any,
) -> Iterator[Net]:  # fmt: skip
    """``local``, ``remote``: the experts assigned to this node and to the others. ``num_slots``: of the local arena;
    None: as many as are assigned. ``options``: of ClusterSource.
    """
    client = KeyPair.make()
    every = list(store.manifest.shards)
    with ExitStack() as stack:
        here, address = (
            make_host(store, every, assigned=local, num_slots=num_slots or max(1, len(local))),
            new_address("here"),
        )
        stack.callback(here.close)
        stack.callback(DataPlaneServer("here", here, address.address, TOKEN).close)
        remotes = []
        for index, assigned in enumerate(remote):
            remotes.append(serve(store, f"far-{index}", assigned, client))
            stack.callback(remotes[-1].host.close)
            stack.callback(remotes[-1].server.close)
        source = ClusterSource(store, [address], [made.address for made in remotes], client, **options)
        stack.callback(source.close)
        yield Net(source, here, remotes)
        here._manager.validate()


# A remote host as an actor makes one. Arguments: store, address, token, host id, its keys, the client's public key,
# and of the experts, in the manifest's order: every so many-th, from which one.
HOST = """
import sys
from moray.cluster.keys import KeyPair, Admission
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store

path, address, token, host_id, public, secret, client, step, first = sys.argv[1:]
store = Store.open(path)
every = list(store.manifest.shards)
host = ShardHost(store, every, 1, assigned=every[int(first) :: int(step)])
host.wait_filled()
server = DataPlaneServer(host_id, host, address, token, Admission(KeyPair(public, secret), [client]))
print(server.address, flush=True)
for line in sys.stdin:
    print(server.stats.pairs_computed, flush=True)
"""


@contextmanager
def host_process(
    store: Store, host_id: str, keys: KeyPair, client: KeyPair, part: tuple[int, int] = (1, 0),
    address: str = "tcp://127.0.0.1:0", **environment: str,
) -> Iterator[tuple[Popen[str], HostAddress]]:  # fmt: skip
    """``part``: (step, first) of the experts that it has. ``address``: that of one that it takes the place of."""
    words = [str(store.path), address, TOKEN, host_id, keys.public, keys.secret, client.public, *map(str, part)]
    with child(HOST, *words, **environment) as process:
        yield process, HostAddress(host_id, read_line(process), TOKEN, node=host_id, server_key=keys.public)


def pairs_computed(process: Popen[str]) -> int:
    assert process.stdin is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return int(read_line(process))
