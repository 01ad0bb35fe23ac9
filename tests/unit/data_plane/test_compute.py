"""Computing with experts where they live."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.data_plane import HIDDEN, KEYS, ROW, connected, rows, wire
from helpers.hosts import make_host, new_address, serving
from helpers.matrices import assert_same_bits

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostClient
from moray.cluster.messages import Compute, Computed, GateSpec, Ping, Pong
from moray.cluster.server import DataPlaneServer
from moray.cluster.wire import Frames, Wire
from moray.runtime.arrays import Floats
from moray.runtime.errors import ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.kernels.reference import quantize_activations
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon


@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_outputs_computed_by_a_host_are_the_same_bits(client: HostClient, demo: Store, numerics: Any) -> None:
    experts, counts, x = [5, 1, 3], [2, 1, 4], rows(7)
    taken = np.array([0, 6, 3, 1, 2, 5, 6])  # a row may be several experts', or nobody's
    request = Compute(layer=0, experts=experts, counts=counts, num_rows=7, numerics=numerics)
    reply, buffer = client.request(request, wire(demo, numerics).encode(x, taken).data)
    assert isinstance(reply, Computed) and reply.compute_s > 0
    x = x[taken]
    layout = demo.manifest.layers[0].layout
    up, down = layout["gate_up_proj"], layout["down_proj"]
    shards = [demo.read_shard(ExpertKey(0, expert)) for expert in experts]
    at = np.array([shard.ctypes.data for shard in shards], dtype=np.int64)
    pairs = np.arange(7)
    grouping = Grouping(np.array(experts), np.array([0, 2, 3, 7]), pairs, pairs[:, None])
    kernels = [MatrixKernel.of(tensor.spec, numerics) for tensor in (up, down)]
    ones = np.ones((7, 1), dtype=np.float32)
    expected = ops.moe_layer(x, ones, grouping, LayerKernel(*kernels), at + up.offset, at + down.offset)
    assert_same_bits(np.frombuffer(buffer, dtype=np.float32).reshape(7, HIDDEN), expected)


def test_a_host_waits_awake_while_requests_come_fast_and_it_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, client: HostClient, server: DataPlaneServer, demo: Store
) -> None:
    awake: list[float] = []
    since: list[float] = []
    receive = Wire.receive

    def note(self: Wire, awake_s: float = 0.0) -> Frames:
        awake.append(awake_s)
        return receive(self, awake_s)

    def ask(gap_s: float) -> None:
        """``gap_s`` after the last answer."""
        monkeypatch.setattr(server, "_awake_s", lambda since_s: since.append(since_s) or choose(gap_s))
        request = Compute(layer=0, experts=[3], counts=[1], num_rows=1, numerics="int8")
        reply, _ = client.request(request, wire(demo, "int8").encode(rows(1), np.arange(1)).data)
        client.request(Ping())  # by then its thread has waited for this one
        assert isinstance(reply, Computed)

    choose = server._awake_s
    monkeypatch.setattr(Wire, "receive", note)
    monkeypatch.setattr(server, "_has_spare_core", True)
    ask(1.0)
    assert set(awake) == {0.0}
    ask(1e-5)
    assert awake[-1] > 0
    ask(1.0)
    assert awake[-1] == 0
    monkeypatch.setattr(ShardHost, "is_idle", False)
    ask(1e-5)
    assert awake[-1] == 0
    monkeypatch.setattr(ShardHost, "is_idle", True)
    monkeypatch.setattr(server, "_has_spare_core", False)
    ask(1e-5)
    assert awake[-1] == 0
    assert all(0 < since_s < 60 for since_s in since[1:])


def test_activations_that_are_not_numbers_stay_in_their_rows(client: HostClient, demo: Store) -> None:
    def computed(x: Floats) -> Floats:
        request = Compute(layer=0, experts=[3], counts=[3], num_rows=3, numerics="int8")
        return np.frombuffer(client.request(request, wire(demo, "int8").encode(x, np.arange(3)).data)[1], np.float32)

    x = rows(3)
    clean = computed(x)
    x[1] = np.nan
    one, other = clean.reshape(3, HIDDEN), computed(x).reshape(3, HIDDEN)
    assert np.isnan(other[1]).all()
    assert_same_bits(other[[0, 2]], one[[0, 2]])


def special_rows(seed: int, num_rows: int) -> Floats:
    """Rows of all sizes, with values that int8 treats in ways of their own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, HIDDEN)) * 10.0 ** rng.integers(-46, 38, (num_rows, HIDDEN // 16)).repeat(16, 1)
    specials = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, -3.4e38]
    where = rng.random(x.shape) < 0.003
    x[where] = rng.choice(specials, int(where.sum()))
    x[0, :16], x[-1] = 0.0, np.linspace(-1, 1, HIDDEN)
    return x.clip(-3.4e38, 3.4e38).astype(np.float32)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_int8_on_the_wire_loses_nothing(group: int) -> None:
    form = WireFormat(HIDDEN, group)
    for seed in range(40):
        x = special_rows(seed, 9)
        again, taken = form.decode(form.encode(x, np.arange(9)[::-1]).tobytes(), 9, 9)
        assert taken.tolist() == list(range(9))[::-1]
        for found, expected in zip(quantize_activations(again, group), quantize_activations(x, group), strict=True):
            assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def test_an_expert_that_is_not_in_memory_is_refused_and_fetched(demo: Store) -> None:
    host, address = make_host(demo, KEYS, assigned=[KEYS[1]]), new_address("lazy")
    request = Compute(layer=0, experts=[3, 5], counts=[1, 1], num_rows=1, numerics="int8")
    buffer = wire(demo, "int8").encode(rows(1), np.zeros(2, dtype=np.int64)).data
    try:
        with serving(address, host) as server, connected(address) as client:
            welcome = client.greet()
            assert welcome.assigned == welcome.resident == [[3], [], [], [], [], []]
            reply = client.receive(client.send(Ping()))[0]
            assert reply == Pong()
            with pytest.raises(ProtocolError, match=r"experts \[5\] of layer 0 are not in memory yet"):
                client.request(request, buffer)
            host.assign([KEYS[2]])
            assert host.wait_filled(60)
            assert isinstance(client.request(request, buffer)[0], Computed)
            assert client.request(Ping(wants_resident=True))[0] == Pong(resident=[[5], [], [], [], [], []])
            assert server.stats.pairs_computed == 2
    finally:
        host.close()


@pytest.mark.parametrize(
    ("fields", "num_bytes", "reason"),
    [
        ({"layer": 9}, ROW, "layer 9 does not exist"),
        ({"layer": -1}, ROW, "layer -1 does not exist"),
        ({"experts": [0]}, ROW, "does not live here"),
        ({"counts": [0]}, 0, "counts must give at least one pair"),
        ({"counts": [-1]}, ROW, "counts must give at least one pair"),
        ({"counts": [1, 1]}, ROW, "counts must give at least one pair"),
        ({"experts": [], "counts": []}, 0, "counts must give at least one pair"),
        ({"counts": [2]}, ROW, "expected 1 rows of 256 activations in groups of 64 for 2 pairs"),
        ({"counts": [2**62]}, ROW, "expected 1 rows of"),
        ({"num_rows": 2}, ROW, "expected 2 rows of"),
        ({"num_rows": 0}, 4, "expected 0 rows of"),
        ({"num_rows": -(2**60)}, ROW, "rows of"),
        ({"num_rows": 2**62}, ROW, "rows of"),
        ({"numerics": "float"}, ROW, "groups of 0 for 1 pairs"),
        ({"gate": GateSpec(limit=1.0, is_gelu=True)}, ROW, "a gate of kind 5 is not one"),
        ({"gate": GateSpec(limit=1e300)}, ROW, "limit"),
        ({}, ROW + 1, "expected 1 rows of 256"),
        ({}, 0, "expected 1 rows of 256"),
    ],
)
def test_a_compute_request_that_does_not_add_up_is_refused(
    client: HostClient, server: DataPlaneServer, fields: dict[str, Any], num_bytes: int, reason: str
) -> None:
    rejected = server.stats.rejected
    request = Compute(**({"layer": 0, "experts": [3], "counts": [1], "num_rows": 1, "numerics": "int8"} | fields))
    with pytest.raises(ProtocolError, match=reason):
        client.request(request, memoryview(bytes(num_bytes)))
    assert server.stats.rejected == rejected + 1


@pytest.mark.parametrize("row", [-1, 1, 2**31 - 1])
def test_a_pair_of_a_row_that_is_not_there_is_refused(client: HostClient, row: int) -> None:
    buffer = np.zeros(ROW, dtype=np.uint8)
    buffer[:4].view(np.int32)[:] = row
    with pytest.raises(ProtocolError, match="a pair takes a row that is not one of the 1"):
        client.request(Compute(layer=0, experts=[3], counts=[1], num_rows=1, numerics="int8"), buffer.data)
