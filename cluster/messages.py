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

from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moray.runtime.errors import ProtocolError

PROTOCOL_VERSION = 4
MAX_READ_BYTES = 4 << 20
MAX_MANIFEST_BYTES = 256 << 20
MAX_ECHO_BYTES = 16 << 20

Numerics = Literal["int8", "float"]
Use = Annotated[list[int], Field(min_length=1)]  # [layer, expert, expert, ...] a layer call


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Hello(Message):
    """``numerics``: of a client that will have experts computed; the kernels are made ready before the answer."""

    client: str
    token: str
    numerics: Numerics | None = None


class Welcome(Message):
    host_id: str
    store_fingerprint: str
    layout_id: str
    numerics_id: str
    arena_pid: int
    arena_fd: int
    arena_bytes: int
    holds_all: bool  # nothing is ever evicted here, so no use need be told
    experts: list[list[int]]  # [layer]: its experts that live on this host, in the order of the arena's directory
    assigned: list[list[int]]  # [layer]: those that it keeps in memory
    resident: list[list[int]]  # [layer]: those of them that are there now


class Need(Message):
    """They stay in memory until the next Need of this client, or Release."""

    layer: int
    experts: list[int]
    uses: list[Use] = []


class Ask(Message):
    """Need again, from a client that has waited for long, or found a shard marked as failed."""

    layer: int
    experts: list[int]


class Coming(Message):
    """They are in memory, or being loaded."""


class GateSpec(Message):
    """A fused gate: the fields of ``Gate`` in runtime/kernels/gates.py."""

    limit: float | None = None
    alpha: float | None = None
    is_gelu: bool = False
    is_interleaved: bool = False


class Compute(Message):
    """Buffer: the activations of ``num_rows`` tokens, and which of them each pair takes (cluster/activations.py)."""

    layer: int
    experts: list[int]
    counts: list[int]  # pairs of each expert
    num_rows: int
    numerics: Numerics
    gate: GateSpec = GateSpec()


class Computed(Message):
    """Buffer: float32 outputs [sum(counts), H] in the order of the pairs, unweighted."""

    compute_s: float  # from the request's arrival to its answer


class Ping(Message):
    wants_resident: bool = False


class Pong(Message):
    resident: list[list[int]] | None = None  # as in Welcome


class Hint(Message):
    layer: int
    experts: list[int]  # the likeliest first
    uses: list[Use] = []


class Release(Message):
    layer: int
    experts: list[int]


class Read(Message):
    """Bytes of a shard from ``offset`` on, a multiple of 4096. Nothing else waits for the answer."""

    layer: int
    expert: int
    offset: Annotated[int, Field(ge=0)]
    num_bytes: Annotated[int, Field(ge=1, le=MAX_READ_BYTES)]


class ReadFile(Message):
    """Bytes of one of ``Files``, or of the manifest."""

    name: str
    offset: Annotated[int, Field(ge=0)]
    num_bytes: Annotated[int, Field(ge=1, le=MAX_READ_BYTES)]


class Bytes(Message):
    """Buffer: exactly what was asked for. Shards are not verified before: who puts one together does that."""


class ListFiles(Message):
    """What does this host's store consist of?"""


class FileEntry(Message):
    name: str  # relative, with "/"
    num_bytes: Annotated[int, Field(ge=0)]
    xxh3: int  # 64 bits


class Files(Message):
    """``files``: all but the manifest and those of shards; ``present``: the shards that are there, [layer] as runs
    [first, end, first, end, ...] of experts."""

    manifest_bytes: Annotated[int, Field(ge=1, le=MAX_MANIFEST_BYTES)]
    files: list[FileEntry]
    present: list[list[int]]


class Echo(Message):
    """Measures the way here and back. Buffer: anything."""

    reply_bytes: Annotated[int, Field(ge=0, le=MAX_ECHO_BYTES)]


class Echoed(Message):
    """Buffer: so many zeros."""


class Refused(Message):
    reason: Literal["hello", "request", "shard", "absent", "failed"]  # "hello": introduce yourself first
    message: str


MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for group in (
        (Hello, Welcome, Need, Ask, Coming, Compute, Computed, Hint, Release, Ping, Pong, Echo, Echoed, Refused),
        (Read, ReadFile, Bytes, ListFiles, Files),
    )
    for kind in group
}


def encode(request_id: int, message: Message) -> bytes:
    # Fields as they are, with those of messages in them: what ``model_dump`` gives, without its copy.
    packed: bytes = msgpack.packb([PROTOCOL_VERSION, request_id, type(message).__name__, vars(message)], default=vars)
    return packed


def decode(frame: bytes | memoryview) -> tuple[int, Message]:
    """Read a header. Raises ProtocolError for anything but a well-formed message of this version."""
    try:
        header: Any = msgpack.unpackb(frame, max_array_len=1 << 20, max_map_len=64, max_str_len=1 << 16)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as error:
        raise ProtocolError(f"a frame is not msgpack: {error}") from error
    if not isinstance(header, list) or len(header) != 4:
        raise ProtocolError("a header is not [version, request id, type, fields]")
    version, request_id, kind, fields = header
    if not isinstance(version, int) or not isinstance(request_id, int) or not isinstance(kind, str):
        raise ProtocolError("a header is not [version, request id, type, fields]")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol {version}, this moray speaks {PROTOCOL_VERSION}; upgrade both")
    if kind not in MESSAGES:
        raise ProtocolError(f"unknown message type {kind[:40]!r}")
    try:
        return request_id, MESSAGES[kind].model_validate(fields)
    except ValidationError as error:
        raise ProtocolError(f"a {kind} message is malformed: {error.error_count()} wrong fields") from error
