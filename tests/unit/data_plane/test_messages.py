"""Messages that are not as they should be: refused, counted, and without effect."""

from __future__ import annotations

import socket
from typing import Any, get_type_hints

import msgpack
import numpy as np
import pytest
from helpers.data_plane import ROW, Peer, check_alive, header
from helpers.hosts import TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    Ask,
    Coming,
    Computed,
    FileEntry,
    GateSpec,
    Hello,
    Message,
    Need,
    Refused,
    Welcome,
    decode,
    encode,
)
from moray.cluster.server import DataPlaneServer

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon


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


def test_a_peer_of_another_version_is_told_to_upgrade(stranger: Peer) -> None:
    _, reply = stranger.ask([header(version=1)])
    assert isinstance(reply, Refused)
    assert reply.message == "the peer speaks protocol 1, this moray speaks 4; upgrade both"


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
        some = {name: value for name, value in some.items() if name in MESSAGES[kind].__struct_fields__}
    for peer in (stranger, friend):
        peer.send([header(kind, some, request_id, version), *buffers])
        check_alive(peer, 2**40)


def test_bytes_that_are_no_messages_never_stop_the_server(client: HostClient, address: HostAddress) -> None:
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
        for name, hint in get_type_hints(kind).items():
            annotation = str(hint)
            if hint in (GateSpec, float):
                made[name] = GateSpec(limit=7.0) if hint is GateSpec else 0.25
            elif "| None" in annotation:
                made[name] = None
            elif name in examples and not (kind is Welcome and name == "experts"):
                made[name] = examples[name]
            elif "list[list" in annotation:
                made[name] = many
            else:
                made[name] = [1, 2] if "list" in annotation else number if hint is int else "x"
        message = kind(**made)
        assert decode(encode(2**64 - 1, message)) == (2**64 - 1, message)
