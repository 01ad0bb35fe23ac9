"""One of the two machines of placement.py: a process in groups of its own. Orders and answers are JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.keys import CurveKeys, CurveServer
from moray.cluster.messages import Compute
from moray.cluster.server import DataPlaneServer
from moray.cluster.topology import measure_link, measure_node
from moray.runtime.experts.fused import FusedExperts
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels.gates import SWIGLU
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

TOKEN = "placement"


class Machine:
    """A host with a listening data plane, and a client of the other machine's."""

    def __init__(self, store: str, threads: int, keys: CurveKeys, admitted: str) -> None:
        self._store, self._threads = Store.open(store), threads
        self._curve, self._keys = CurveServer(keys, [admitted]), keys
        self._host: ShardHost | None = None
        self._server: DataPlaneServer | None = None
        self._client: HostClient | None = None

    def measure(self) -> dict[str, Any]:
        return asdict(measure_node(self._store.path, self._threads))

    def hold(self, experts: list[list[int]]) -> dict[str, Any]:
        """Hold these experts, and listen. Returns where."""
        self._close()
        self._host = ShardHost(self._store, sorted(ExpertKey(*key) for key in experts), self._threads)
        self._host.wait_filled()
        self._host.prepare("int8")
        self._server = DataPlaneServer("other", self._host, "tcp://127.0.0.1:0", TOKEN, self._curve)
        return {"address": self._server.address}

    def link(self, address: str, server_key: str) -> dict[str, Any]:
        self._connect(address, server_key)
        assert self._client is not None
        return asdict(measure_link(self._client))

    def run(self, address: str, server_key: str, tokens: int, seed: int) -> dict[str, float]:
        """Median seconds of a token's experts in all layers, as a compute process has them computed."""
        self._connect(address, server_key)
        layers = self._store.manifest.layers
        fused = [FusedExperts.of(layer.layout, "int8", SWIGLU) for layer in layers]
        random, times = np.random.default_rng(seed), []
        for _ in range(tokens):
            started = perf_counter()
            for index, layer in enumerate(layers):
                active = np.sort(random.permutation(layer.num_experts)[: self.top_k])
                x = random.standard_normal((1, fused[index].kernel.gate_up.spec.columns), dtype=np.float32)
                self._layer(index, active.tolist(), x, fused[index])
            times.append(perf_counter() - started)
        return {"mean_s": float(np.mean(times)), "median_s": median(times)}

    def configure(self, top_k: int) -> dict[str, Any]:
        self.top_k = top_k
        return {}

    def _layer(self, index: int, active: list[int], x: np.ndarray, fused: FusedExperts) -> np.ndarray:
        assert self._host is not None and self._client is not None
        held = set(self._host.keys)
        here = [expert for expert in active if ExpertKey(index, expert) in held]
        there = [expert for expert in active if ExpertKey(index, expert) not in held]
        y = np.empty((len(active), x.shape[1]), dtype=np.float32)
        if there:
            form = WireFormat.of(fused.kernel.gate_up.spec, "int8")
            request = Compute(layer=index, experts=there, counts=[1] * len(there), num_rows=1, numerics="int8")
            buffer = form.encode(x, np.zeros(len(there), dtype=np.int64))
            sent = self._client.send(request, memoryview(buffer))
        if here:
            is_here = np.isin(active, here)
            y[is_here] = self._host.compute(
                index, here, [1] * len(here), x, np.zeros(len(here), np.int64), "int8", SWIGLU
            )
        if there:
            _, [data] = self._client.receive(sent)
            y[np.isin(active, there)] = np.frombuffer(data, np.float32).reshape(len(there), -1)
        return y.sum(axis=0)

    def _connect(self, address: str, server_key: str) -> None:
        if self._client is not None:
            self._client.close()
        where = HostAddress("other", address, TOKEN, server_key=server_key)
        self._client = HostClient(where, "compute", curve=self._keys)
        self._client.greet()

    def _close(self) -> None:
        if self._server is not None and self._host is not None:
            self._server.close()
            self._host.close()


def main() -> None:
    first = json.loads(sys.stdin.readline())  # by then this process is in its groups
    machine = Machine(first["store"], first["threads"], CurveKeys(*first["keys"]), first["admitted"])
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(machine, order.pop("do"))(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
