from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from helpers.hosts import TOKEN, make_host, new_address, serving, watching
from helpers.matrices import Floats, assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.cluster.activations import WireFormat
from moray.cluster.client import HelloRequiredError, HostAddress, HostClient
from moray.cluster.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    Ask,
    Coming,
    Compute,
    Computed,
    FileEntry,
    GateSpec,
    Hello,
    Hint,
    Message,
    Need,
    Ping,
    Pong,
    Refused,
    Release,
    Welcome,
    decode,
    encode,
)
from moray.cluster.server import DataPlaneServer
from moray.runtime.errors import CorruptShardError, HostLostError, ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.kernels.reference import quantize_activations
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon

KEYS = [ExpertKey(0, 1), ExpertKey(0, 3), ExpertKey(0, 5), ExpertKey(1, 0)]
HIDDEN = 256


@pytest.fixture(scope="module")
def host(demo: Store) -> Iterator[ShardHost]:
    made = make_host(demo, KEYS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def address() -> HostAddress:
    return new_address("host-7")


@pytest.fixture(scope="module")
def server(host: ShardHost, address: HostAddress) -> Iterator[DataPlaneServer]:
    with serving(address, host) as made:
        yield made


@pytest.fixture
def client(server: DataPlaneServer, address: HostAddress) -> Iterator[HostClient]:
    with connected(address) as made:
        made.greet()
        yield made


@contextmanager
def connected(address: HostAddress, name: str = "tester", timeout_s: float = 30.0) -> Iterator[HostClient]:
    made = HostClient(address, name, timeout_s=timeout_s)
    try:
        yield made
    finally:
        made.close()


class Peer:
    """Speaks ZeroMQ, but says what it likes."""

    def __init__(self, address: HostAddress) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.connect(address.address)
        self._token = address.token

    def greet(self) -> None:
        assert isinstance(self.ask([encode(1, Hello(client="peer", token=self._token))])[1], Welcome)

    def send(self, frames: Sequence[bytes]) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> tuple[int, Message]:
        return decode(self._socket.recv_multipart()[0])

    def ask(self, frames: Sequence[bytes]) -> tuple[int, Message]:
        self.send(frames)
        return self.receive()

    def replies_until(self, request_id: int) -> list[Message]:
        """Replies that came before the one to a request, which is not returned."""
        replies = []
        while (reply := self.receive())[0] != request_id:
            replies.append(reply[1])
        return replies

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture(scope="module")
def stranger(server: DataPlaneServer, address: HostAddress) -> Iterator[Peer]:
    """A peer that has not said Hello."""
    peer = Peer(address)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def friend(server: DataPlaneServer, address: HostAddress) -> Iterator[Peer]:
    """A peer that knows the token."""
    peer = Peer(address)
    peer.greet()
    yield peer
    peer.close()


# ------------------------------------------------------------------------------------------ hello


def test_a_host_says_what_it_holds(client: HostClient, host: ShardHost, demo: Store) -> None:
    welcome = client.greet()
    ref = host.arena.ref
    assert welcome == Welcome(
        host_id="host-7",
        store_fingerprint=demo.fingerprint,
        layout_id=LAYOUT_ID,
        numerics_id=demo.manifest.numerics_id,
        arena_pid=ref.pid,
        arena_fd=ref.fd,
        arena_bytes=ref.num_bytes,
        holds_all=True,
        experts=(held := [[1, 3, 5], [0], [], [], [], []]),
        assigned=held,
        resident=held,
    )


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + " ", TOKEN[:-1], "ü"])
def test_a_wrong_token_is_refused_and_counted(server: DataPlaneServer, address: HostAddress, token: str) -> None:
    rejected = server.stats.rejected
    with connected(HostAddress("host-7", address.address, token), "intruder") as intruder:
        with pytest.raises(ProtocolError, match="host-7: the session token is wrong; this host serves another engine"):
            intruder.greet()
        with pytest.raises(ProtocolError):  # still nobody
            intruder.request(Ask(layer=0, experts=[3]))
    assert server.stats.rejected >= rejected + 2
    assert "intruder" not in server.stats.clients


def test_a_request_before_hello_is_refused_and_counted(server: DataPlaneServer, address: HostAddress) -> None:
    rejected = server.stats.rejected
    with connected(address, "hasty") as hasty:
        for kind in (Need, Ask, Hint, Release):
            with pytest.raises(HelloRequiredError, match="introduce yourself"):
                hasty.receive(hasty.send(kind(layer=0, experts=[3])))
        assert server.stats.rejected == rejected + 4 and "hasty" not in server.stats.clients
        assert hasty.request(Ask(layer=0, experts=[3]))[0] == Coming()  # introduces itself
        assert "hasty" in server.stats.clients


def test_a_client_that_comes_back_loses_its_old_claims(
    host: ShardHost, address: HostAddress, client: HostClient
) -> None:
    client.request(Ask(layer=0, experts=[3, 5]))
    assert host._manager._claims["tester"]
    with connected(address) as again:
        again.greet()
        assert "tester" not in host._manager._claims
        with pytest.raises(HelloRequiredError):  # the connection it had before is nobody's now
            client.receive(client.send(Ask(layer=0, experts=[3])))


# -------------------------------------------------------------------- need, ask, hint and release


def test_what_is_asked_for_is_coming(client: HostClient, host: ShardHost) -> None:
    assert client.request(Ask(layer=0, experts=[1, 3])) == (Coming(), [])
    assert host._manager._claims["tester"] == {0, 1}
    assert client.request(Ask(layer=2, experts=[])) == (Coming(), [])
    assert "tester" not in host._manager._claims


def test_a_need_a_release_and_a_hint_have_no_reply(
    client: HostClient, host: ShardHost, server: DataPlaneServer
) -> None:
    hints = server.stats.hints
    client.send(Need(layer=0, experts=[1, 3, 5]))
    client.send(Hint(layer=1, experts=[0]))
    client.send(Release(layer=0, experts=[3]))
    client.send(Release(layer=1, experts=[0]))  # was not claimed
    failed = client.send(Ask(layer=5, experts=[0]))
    with pytest.raises(ProtocolError):  # the next reply there is
        client.receive(failed)
    assert host._manager._claims["tester"] == {0, 2} and server.stats.hints == hints + 1


def test_uses_come_with_needs_and_hints(monkeypatch: pytest.MonkeyPatch, client: HostClient, host: ShardHost) -> None:
    told: list[list[int]] = []
    monkeypatch.setattr(host._manager._policy, "used", lambda experts: told.append(experts))
    client.send(Need(layer=0, experts=[5], uses=[[0, 3, 1], [1, 0]]))
    client.send(Hint(layer=0, experts=[], uses=[[0, 5]]))
    client.request(Ask(layer=0, experts=[]))
    assert told == [[1, 0], [3], [2]]


@pytest.mark.parametrize(
    ("layer", "expert"), [(0, 0), (1, 3), (3, 0), (6, 0), (-1, 0), (0, -1), (2**63, 0), (0, 2**64 - 1)]
)
def test_an_expert_that_lives_elsewhere_is_refused_and_counted(
    client: HostClient, server: DataPlaneServer, layer: int, expert: int
) -> None:
    rejected = server.stats.rejected
    kinds = (Need, Ask, Hint, Release)
    for kind in kinds:
        with pytest.raises(ProtocolError, match="does not live here"):
            client.receive(client.send(kind(layer=layer, experts=[expert])))
    for kind in (Need, Hint):
        with pytest.raises(ProtocolError, match="does not live here"):
            client.receive(client.send(kind(layer=0, experts=[3], uses=[[layer, expert]])))
    assert server.stats.rejected == rejected + len(kinds) + 2


# ---------------------------------------------------------------------------------------- compute


ROW = 4 + HIDDEN + 4 * HIDDEN // 64  # bytes of one pair with a row of its own, in class int8


def wire(store: Store, numerics: Any) -> WireFormat:
    return WireFormat.of(store.manifest.layers[0].layout["gate_up_proj"].spec, numerics)


def rows(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_outputs_computed_by_a_host_are_the_same_bits(client: HostClient, demo: Store, numerics: Any) -> None:
    experts, counts, x = [5, 1, 3], [2, 1, 4], rows(7)
    taken = np.array([0, 6, 3, 1, 2, 5, 6])  # a row may be several experts', or nobody's
    request = Compute(layer=0, experts=experts, counts=counts, num_rows=7, numerics=numerics)
    reply, buffers = client.request(request, wire(demo, numerics).encode(x, taken).data)
    assert isinstance(reply, Computed) and reply.compute_s > 0 and len(buffers) == 1
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
    assert_same_bits(np.frombuffer(buffers[0], dtype=np.float32).reshape(7, HIDDEN), expected)


def test_activations_that_are_not_numbers_stay_in_their_rows(client: HostClient, demo: Store) -> None:
    def computed(x: Floats) -> Floats:
        request = Compute(layer=0, experts=[3], counts=[3], num_rows=3, numerics="int8")
        return np.frombuffer(client.request(request, wire(demo, "int8").encode(x, np.arange(3)).data)[1][0], np.float32)

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


@pytest.mark.parametrize("num_buffers", [0, 2])
def test_a_compute_request_needs_one_buffer(client: HostClient, num_buffers: int) -> None:
    buffers = [memoryview(bytes(ROW))] * num_buffers
    with pytest.raises(ProtocolError, match="expected one of activations"):
        client.request(Compute(layer=0, experts=[3], counts=[1], num_rows=1, numerics="int8"), *buffers)


@pytest.mark.parametrize("row", [-1, 1, 2**31 - 1])
def test_a_pair_of_a_row_that_is_not_there_is_refused(client: HostClient, row: int) -> None:
    buffer = np.zeros(ROW, dtype=np.uint8)
    buffer[:4].view(np.int32)[:] = row
    with pytest.raises(ProtocolError, match="a pair takes a row that is not one of the 1"):
        client.request(Compute(layer=0, experts=[3], counts=[1], num_rows=1, numerics="int8"), buffer.data)


# -------------------------------------------------------------------------------- malformed messages


def header(
    kind: object = "Need", fields: object = None, request_id: object = 5, version: object = PROTOCOL_VERSION
) -> bytes:
    fields = {"layer": 0, "experts": [3]} if fields is None else fields
    packed: bytes = msgpack.Packer().pack([version, request_id, kind, fields])
    return packed


NESTED: list[Any] = []  # as deep as msgpack allows, deeper than Python's repr can go
for _ in range(1000):
    NESTED = [NESTED]

MALFORMED = {
    "nothing": b"",
    "never used": b"\xc1",
    "cut short": header()[:-1],
    "more after it": header() + b"\x00",
    "not a list": msgpack.packb({"layer": 0}),
    "too short": msgpack.packb([PROTOCOL_VERSION, 5, "Need"]),
    "older version": header(version=PROTOCOL_VERSION - 1),
    "newer version": header(version=PROTOCOL_VERSION + 1),
    "version is text": header(version="1"),
    "id is text": header(request_id="5"),
    "id is nothing": header(request_id=None),
    "unknown type": header("Shutdown"),
    "type is a list": header(["Need"]),
    "type is a base class": header("Message"),
    "a host's message": header("Coming", {}),
    "uses are no lists": header(fields={"layer": 0, "experts": [3], "uses": [0, 3]}),
    "a use of nothing": header(fields={"layer": 0, "experts": [3], "uses": [[]]}),
    "a use of text": header(fields={"layer": 0, "experts": [3], "uses": [["0", 3]]}),
    "no fields": header(fields={}),
    "fields are a list": header(fields=[0, [3]]),
    "missing field": header(fields={"layer": 0}),
    "unknown field": header(fields={"layer": 0, "experts": [3], "more": 1}),
    "number as text": header(fields={"layer": "0", "experts": [3]}),
    "number as float": header(fields={"layer": 0.0, "experts": [3]}),
    "yes as a number": header(fields={"layer": True, "experts": [3]}),
    "list of text": header(fields={"layer": 0, "experts": ["3"]}),
    "unknown numerics": header(
        "Compute", {"layer": 0, "experts": [3], "counts": [1], "num_rows": 1, "numerics": "fp8"}
    ),
    "a number as key": msgpack.packb([PROTOCOL_VERSION, 5, "Need", {0: 1}]),
    "a list as key": b"\x94\x03\x05\xa4Need\x81\x90\x01",
    "too long a list": header(fields={"layer": 0, "experts": [3] * ((1 << 20) + 1)}),
    "announces a long list": b"\x94\x03\x05\xa4Need\xdd\xff\xff\xff\xff",
    "announces long text": b"\x94\x03\x05\xdb\xff\xff\xff\xff",
    "too many keys": header(fields={str(key): 0 for key in range(65)}),
    "too long a text": header("Hello", {"client": "x" * ((1 << 16) + 1), "token": ""}),
    "not utf-8": b"\x94\x03\x05\xa4\xff\xff\xff\xff\x80",
    "a bad timestamp": b"\x94\x03\x05\xc7\x03\xff\x00\x00\x00\x80",
    "nested too deeply": b"\x91" * 3000 + b"\x00",
    "version nested deeply": header(version=NESTED),
    "id nested deeply": header(request_id=NESTED),
    "type nested deeply": header(NESTED),
    "field nested deeply": header(fields={"layer": NESTED, "experts": [3]}),
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("who", ["stranger", "friend"])
def test_a_malformed_message_is_refused_and_counted(
    server: DataPlaneServer, frame: bytes, who: str, request: pytest.FixtureRequest
) -> None:
    peer: Peer = request.getfixturevalue(who)
    requests, rejected = server.stats.requests, server.stats.rejected
    _, reply = peer.ask([frame])
    assert isinstance(reply, Refused) and reply.message
    if who == "friend":
        assert reply.reason == "request"
    assert (server.stats.requests, server.stats.rejected) == (requests + 1, rejected + 1)
    check_alive(peer)


def check_alive(peer: Peer, request_id: int = 99) -> None:
    peer.send([encode(request_id, Ask(layer=0, experts=[3]))])
    peer.replies_until(request_id)


def test_a_peer_of_another_version_is_told_to_upgrade(stranger: Peer) -> None:
    _, reply = stranger.ask([header(version=1)])
    assert isinstance(reply, Refused)
    assert reply.message == "the peer speaks protocol 1, this moray speaks 3; upgrade both"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_random_bytes_never_stop_the_server(stranger: Peer, friend: Peer, frames: list[bytes]) -> None:
    for peer in (stranger, friend):
        assert isinstance(peer.ask(frames)[1], Refused)
        check_alive(peer)


numbers = st.integers(-3, 10) | st.integers(-(2**63), 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# Fields as they should be, more or less: right names with wrong values, and the other way round.
fields = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.integers(-1, 7) | values,
        "experts": st.lists(st.integers(-1, 8), max_size=4) | values,
        "counts": st.lists(st.integers(-1, 3), max_size=4) | values,
        "numerics": st.sampled_from(["int8", "float"]) | values,
        "num_rows": st.integers(-1, 3) | values,
        "gate": st.just({}) | values,
        "wants_resident": st.booleans() | values,
        "uses": st.lists(st.lists(st.integers(-1, 8), max_size=3), max_size=2) | values,
        "client": st.text(max_size=5) | values,
        "token": st.just(TOKEN) | values,
        "x": values,
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(MESSAGES)) | values,
    some=fields | values,
    request_id=st.integers(0, 90) | values,
    version=st.just(PROTOCOL_VERSION) | values,
    buffers=st.lists(st.binary(max_size=8) | st.sampled_from([bytes(ROW), bytes(ROW + 4)]), max_size=2),
)
def test_messages_that_are_nearly_right_never_stop_the_server(
    stranger: Peer, friend: Peer, kind: object, some: object, request_id: object, version: object, buffers: list[bytes]
) -> None:
    if isinstance(kind, str) and kind in MESSAGES and isinstance(some, dict):  # its own names only: many must pass
        some = {name: value for name, value in some.items() if name in MESSAGES[kind].model_fields}
    for peer in (stranger, friend):
        peer.send([header(kind, some, request_id, version), *buffers])
        check_alive(peer, 2**40)


def test_bytes_that_are_not_zeromq_never_stop_the_server(client: HostClient, address: HostAddress) -> None:
    rng = np.random.default_rng(0)
    for num_bytes in (1, 10, 64, 5000):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect("\0" + address.address.removeprefix("ipc://@"))
            raw.sendall(rng.bytes(num_bytes))
    assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()


@pytest.mark.parametrize(
    "message", [Need(layer=0, experts=[3], uses=[[1, 2], [3]]), Hello(client="ü", token="t"), Computed(compute_s=0.5)]
)
def test_messages_survive_encoding(message: Message) -> None:
    assert decode(encode(7, message)) == (7, message)


def test_every_message_survives_encoding() -> None:
    text, number, many = {"str": "x", "int": 3, "list[int]": [1, 2]}, 2**64 - 1, [[0], [1, 2]]
    examples: dict[str, Any] = {
        "experts": [1],
        "reason": "shard",
        "numerics": "float",
        "holds_all": True,
        "is_gelu": True,
        "is_interleaved": False,
        "wants_resident": True,
        "uses": [[1, 2]],
        "files": [FileEntry(name="config.json", num_bytes=7, xxh3=number)],
        **dict.fromkeys(("reply_bytes", "num_bytes", "offset", "manifest_bytes"), 4096),
        **text,
    }
    for kind in MESSAGES.values():
        made = {}
        for name, field in kind.model_fields.items():
            annotation = str(field.annotation)
            if field.annotation in (GateSpec, float):
                made[name] = GateSpec(limit=7.0) if field.annotation is GateSpec else 0.25
            elif "| None" in annotation:
                made[name] = None
            elif name in examples and not (kind is Welcome and name == "experts"):
                made[name] = examples[name]
            elif "list[list" in annotation:
                made[name] = many
            else:
                made[name] = [1, 2] if "list" in annotation else number if field.annotation is int else "x"
        message = kind(**made)
        assert decode(encode(2**64 - 1, message)) == (2**64 - 1, message)


# ----------------------------------------------------------------------------- the client's patience


class QuietHost:
    """Listens, and answers each request with a list of frames somebody prepared."""

    def __init__(self, *answers: bytes) -> None:
        self.address = new_address("quiet")
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address.address)
        self._answers = answers
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> QuietHost:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        identity, *_ = self._socket.recv_multipart()
        for answer in self._answers:
            self._socket.send_multipart([identity, answer])


def test_a_silent_host_is_lost_after_the_deadline() -> None:
    lost = pytest.raises(HostLostError, match=r"expert host quiet did not answer within 0\.05 s")
    with QuietHost() as host, connected(host.address, timeout_s=0.05) as client, lost:
        client.greet()


def test_a_host_that_does_not_exist_is_lost_after_the_deadline() -> None:
    with connected(new_address("nobody"), timeout_s=0.05) as client, pytest.raises(HostLostError, match="nobody"):
        client.request(Ask(layer=0, experts=[0]))


def test_replies_to_older_requests_are_skipped() -> None:
    old, new = Computed(compute_s=0.5), Coming()
    with QuietHost(encode(0, old), encode(7, old), encode(1, new)) as host, connected(host.address) as client:
        assert client.receive(client.send(Ask(layer=0, experts=[0]))) == (new, [])


def test_only_replies_to_older_requests_are_no_reply() -> None:
    old = Coming()
    lost = pytest.raises(HostLostError)
    with QuietHost(encode(0, old)) as host, connected(host.address, timeout_s=0.05) as client, lost:
        client.receive(client.send(Ask(layer=0, experts=[0])))


def test_a_host_that_speaks_nonsense_is_a_protocol_error() -> None:
    with QuietHost(b"\xc1") as host, connected(host.address) as client, pytest.raises(ProtocolError, match="msgpack"):
        client.greet()


def test_a_host_that_answers_hello_with_something_else_is_a_protocol_error() -> None:
    refused = pytest.raises(ProtocolError, match="host quiet answered Hello with Computed")
    with QuietHost(encode(1, Computed(compute_s=0.1))) as host, connected(host.address) as client, refused:
        client.greet()


def test_a_shard_the_host_could_not_read_is_a_corrupt_shard() -> None:
    answer = encode(1, Refused(reason="shard", message="checksum"))
    refused = pytest.raises(CorruptShardError, match="expert host quiet: checksum")
    with QuietHost(answer) as host, connected(host.address) as client, refused:
        client.receive(client.send(Ask(layer=0, experts=[0])))


def test_several_requests_may_be_under_way(client: HostClient, demo: Store) -> None:
    asks = [client.send(Ask(layer=0, experts=[expert])) for expert in (3, 5)]
    request = Compute(layer=0, experts=[3], counts=[2], num_rows=2, numerics="int8")
    compute = client.send(request, wire(demo, "int8").encode(rows(2), np.arange(2)).data)
    assert [client.receive(request_id)[0] for request_id in asks] == [Coming(), Coming()]
    reply, (buffer,) = client.receive(compute)
    assert isinstance(reply, Computed) and len(buffer) == 8 * HIDDEN


def test_a_client_works_on_after_its_host_was_restarted(host: ShardHost) -> None:
    address = new_address("phoenix")
    with connected(address) as client, ExitStack() as stack:
        with serving(address, host):
            assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
            wait = stack.enter_context(watching(client))
        with serving(address, host) as restarted:
            wait()
            assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
            assert restarted.stats.clients == {"tester"}


def test_a_server_can_be_closed_while_clients_are_connected(host: ShardHost) -> None:
    address = new_address("short")
    with serving(address, host), connected(address) as client:
        client.greet()
    before = threading.active_count()
    with serving(address, host):
        assert threading.active_count() == before + 2  # one for reads of the store
    assert threading.active_count() == before


def test_what_a_host_cannot_do_is_told_to_its_client_alone(
    monkeypatch: pytest.MonkeyPatch, client: HostClient, host: ShardHost, server: DataPlaneServer
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no room")

    rejected = server.stats.rejected
    with monkeypatch.context() as patched:
        patched.setattr(host, "need", fail)
        with pytest.raises(ProtocolError, match="host-7: MemoryError: no room"):
            client.request(Ask(layer=0, experts=[3]))
    assert server.stats.rejected == rejected + 1
    assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
