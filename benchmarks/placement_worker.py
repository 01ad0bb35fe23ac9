"""One of the two machines of placement.py: a process in groups of its own. Orders and answers are JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.cluster_source import ClusterSource
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.server import DataPlaneServer
from moray.cluster.topology import measure_link, measure_node
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

TOKEN = "placement"


class Machine:
    """A host that listens; the compute node also generates, with its own host's experts and the other machine's."""

    def __init__(self, store: str, threads: int, slots: int, keys: KeyPair, admitted: str) -> None:
        self._store, self._threads, self._slots = Store.open(store), threads, slots
        self._admission, self._keys = Admission(keys, [admitted]), keys
        self._host: ShardHost | None = None
        self._server: DataPlaneServer | None = None
        self._model: Any = None

    def measure(self) -> dict[str, Any]:
        return asdict(measure_node(self._store.path, self._threads))

    def hold(self, assigned: list[list[int]], address: str) -> dict[str, Any]:
        """Hold these experts, and listen. The compute node's host (ipc) may load all others. Returns where."""
        if self._server is not None and self._host is not None:
            self._server.close()
            self._host.close()
        mine = sorted(ExpertKey(*key) for key in assigned)
        known = sorted(self._store.manifest.shards) if address.startswith("ipc") else mine
        self._host = ShardHost(self._store, known, self._threads, num_slots=self._slots, assigned=mine)
        self._host.wait_filled()
        admission = None if address.startswith("ipc") else self._admission
        self._server = DataPlaneServer(address, self._host, address, TOKEN, admission)
        return {"address": self._server.address}

    def link(self, address: str, server_key: str) -> dict[str, Any]:
        client = HostClient(self._other(address, server_key), "measure", keys=self._keys)
        client.greet()
        found = measure_link(client)
        client.close()
        return asdict(found)

    def run(self, address: str, server_key: str, tokens: int, runs: int) -> dict[str, Any]:
        """Generate greedily, to warm up and then ``runs`` times. Decoded tokens a second of each, and tokens."""
        assert self._server is not None
        set_num_threads(self._threads)
        if self._model is None:
            self._model = load_model(self._store, "int8", torch.device("cpu"))
        here = HostAddress("here", self._server.address, TOKEN)
        source = ClusterSource(self._store, [here], [self._other(address, server_key)], self._keys)
        runner, rates = Runner(self._store, source, self._model, "int8"), []
        try:
            for turn in range(runs + 1):
                request = GenerationRequest(f"run-{turn}", tuple(range(1, 9)), tokens)
                times, ids = [], []
                for event in runner.stream(request):
                    times.append(perf_counter())
                    ids += event.token_ids
                rates.append((len(times) - 1) / (times[-1] - times[0]))
            remote, experts, misses = source.remote_stats()[0], runner.stats(), source.stats().misses
        finally:
            runner.close()
            source.close()
        calls = experts.layer_calls
        times = {
            "group": experts.group_s / calls, "wait": experts.lease_s / calls, "compute": experts.compute_s / calls,
            "round trip": 1e-6 * remote.round_trip_us,
        }  # fmt: skip
        return {"rates": rates[1:], "ids": ids, "times": times, "misses": misses / calls}

    def _other(self, address: str, server_key: str) -> HostAddress:
        return HostAddress("other", address, TOKEN, "other", server_key)


def main() -> None:
    first = json.loads(sys.stdin.readline())  # by then this process is in its groups
    keys = KeyPair(*first["keys"])
    machine = Machine(first["store"], first["threads"], first["slots"], keys, first["admitted"])
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(machine, order.pop("do"))(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
