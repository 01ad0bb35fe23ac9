"""The data plane's messages.

A message is a msgpack header [version, request id, type, fields] and at most one raw buffer (cluster/wire.py).
Nothing is pickled. What does not decode into exactly one of these types is refused.

    client -> host                          host -> client
    Hello   who I am, the session's token   Welcome   what I hold, and my arena
    Need    these experts of a layer        (nothing: they appear in the arena's directory)
    Ask     the same; is anything wrong?    Coming, or Refused
    Compute these experts, + activations    Computed  + outputs
    Hint    likely needed soon              (nothing)
    Release experts no longer used          (nothing)
    Echo    + any bytes                     Echoed    + as many bytes as asked for
    Ping    are you there?                  Pong      what is in memory, if asked
    Read, ReadFile  a part of the store     Bytes     + those bytes
    ListFiles  what the store consists of   Files
                                            Refused   why

Need and Hint carry along what the client used since its last message (``uses``), for the host's cache policy: a layer
whose experts are all in memory sends nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct
from msgspec.msgpack import Decoder, Encoder

from moray.runtime.errors import ProtocolError

PROTOCOL_VERSION = 4
MAX_READ_BYTES = 4 << 20
MAX_MANIFEST_BYTES = 256 << 20
MAX_ECHO_BYTES = 16 << 20

Numerics = Literal["int8", "float"]
_MOST = Meta(max_length=1 << 20)  # looked at before memory is taken for what a message only announces
Text = Annotated[str, Meta(max_length=1 << 16)]
Numbers = Annotated[list[int], _MOST]
Lists = Annotated[list[Numbers], _MOST]
Use = Annotated[Numbers, Meta(min_length=1)]  # [layer, expert, expert, ...] a layer call
Uses = Annotated[list[Use], _MOST]


class Message(Struct, forbid_unknown_fields=True):
    """Fields are checked when a message is received; who makes one keeps to them."""


class Hello(Message):
    """``numerics``: of a client that will have experts computed; the kernels are made ready before the answer."""

    client: Text
    token: Text
    numerics: Numerics | None = None


class Welcome(Message):
    host_id: Text
    store_fingerprint: Text
    layout_id: Text
    numerics_id: Text
    arena_pid: int
    arena_fd: int
    arena_bytes: int
    holds_all: bool  # nothing is ever evicted here, so no use need be told
    experts: Lists  # [layer]: its experts that live on this host, in the order of the arena's directory
    assigned: Lists  # [layer]: those that it keeps in memory
    resident: Lists  # [layer]: those of them that are there now


class Need(Message):
    """They stay in memory until the next Need of this client, or Release."""

    layer: int
    experts: Numbers
    uses: Uses = []


class Ask(Message):
    """Need again, from a client that has waited for long, or found a shard marked as failed."""

    layer: int
    experts: Numbers


class Coming(Message):
    """They are in memory, or being loaded."""


class GateSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A fused gate: the fields of ``Gate`` in runtime/kernels/gates.py."""

    limit: float | None = None
    alpha: float | None = None
    is_gelu: bool = False
    is_interleaved: bool = False


class Compute(Message):
    """Buffer: the activations of ``num_rows`` tokens, and which of them each pair takes (cluster/activations.py)."""

    layer: int
    experts: Numbers
    counts: Numbers  # pairs of each expert
    num_rows: int
    numerics: Numerics
    gate: GateSpec = GateSpec()


class Computed(Message):
    """Buffer: float32 outputs [sum(counts), H] in the order of the pairs, unweighted."""

    compute_s: float  # from the request's arrival to its answer


class Ping(Message):
    wants_resident: bool = False


class Pong(Message):
    resident: Lists | None = None  # as in Welcome


class Hint(Message):
    layer: int
    experts: Numbers  # the likeliest first
    uses: Uses = []


class Release(Message):
    layer: int
    experts: Numbers


class Read(Message):
    """Bytes of a shard from ``offset`` on, a multiple of 4096. Nothing else waits for the answer."""

    layer: int
    expert: int
    offset: Annotated[int, Meta(ge=0)]
    num_bytes: Annotated[int, Meta(ge=1, le=MAX_READ_BYTES)]


class ReadFile(Message):
    """Bytes of one of ``Files``, or of the manifest."""

    name: Text
    offset: Annotated[int, Meta(ge=0)]
    num_bytes: Annotated[int, Meta(ge=1, le=MAX_READ_BYTES)]


class Bytes(Message):
    """Buffer: exactly what was asked for. Shards are not verified before: who puts one together does that."""


class ListFiles(Message):
    """What does this host's store consist of?"""


class FileEntry(Message):
    name: Text  # relative, with "/"
    num_bytes: Annotated[int, Meta(ge=0)]
    xxh3: int  # 64 bits


class Files(Message):
    """``files``: all but the manifest and those of shards; ``present``: the shards that are there, [layer] as runs
    [first, end, first, end, ...] of experts."""

    manifest_bytes: Annotated[int, Meta(ge=1, le=MAX_MANIFEST_BYTES)]
    files: Annotated[list[FileEntry], _MOST]
    present: Lists


class Echo(Message):
    """Measures the way here and back. Buffer: anything."""

    reply_bytes: Annotated[int, Meta(ge=0, le=MAX_ECHO_BYTES)]


class Echoed(Message):
    """Buffer: so many zeros."""


class Refused(Message):
    reason: Literal["hello", "request", "shard", "absent", "failed"]  # "hello": introduce yourself first
    message: Text


MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for group in (
        (Hello, Welcome, Need, Ask, Coming, Compute, Computed, Hint, Release, Ping, Pong, Echo, Echoed, Refused),
        (Read, ReadFile, Bytes, ListFiles, Files),
    )
    for kind in group
}


_ENCODER = Encoder()
_HEADER = Decoder(tuple[int, int, str, Raw])
_FIELDS = {name: Decoder(kind) for name, kind in MESSAGES.items()}


def encode(request_id: int, message: Message) -> bytes:
    return _ENCODER.encode((PROTOCOL_VERSION, request_id, type(message).__name__, message))


def decode(frame: bytes | memoryview) -> tuple[int, Message]:
    """Read a header. Raises ProtocolError for anything but a well-formed message of this version."""
    try:
        version, request_id, kind, fields = _HEADER.decode(frame)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a header is not [version, request id, type, fields]: {error}") from error
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol {version}, this moray speaks {PROTOCOL_VERSION}; upgrade both")
    decoder = _FIELDS.get(kind)
    if decoder is None:
        raise ProtocolError(f"unknown message type {kind[:40]!r}")
    try:
        return request_id, decoder.decode(fields)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a {kind} message is malformed: {error!s:.200}") from error
