"""Messages over a stream socket, TLS or not: a header and a buffer each, which may be empty.

    u32 bytes of the header | u32 bytes of the buffer | header | buffer          (little endian)

Plain sockets: a reply wakes nobody but the thread that waits for it.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from moray.cluster.stream import NOTHING, make_stream
from moray.runtime.errors import ConfigError, ProtocolError

MAX_HEADER_BYTES = 16 << 20
MAX_BUFFER_BYTES = 1 << 30
_PREFIX = struct.Struct("<II")
_CHUNK_BYTES = 64 << 10  # looked at, and sent, at once
_ALIGNMENT = 16  # of buffers, as of all memory

Frames = tuple[memoryview, memoryview]  # a header and its buffer, which may be empty


class Wire:
    """One connection. One thread may send, another receive, and any flush. Begins with ``shake_hands``."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None, *, is_server: bool = False) -> None:
        """``context``: of TLS; None: without."""
        self._sock, self._stream = sock, make_stream(sock, context, is_server=is_server)
        self.max_header_bytes, self.max_buffer_bytes = MAX_HEADER_BYTES, MAX_BUFFER_BYTES  # of what is received
        self.has_received = False
        self._lock = threading.Lock()  # of the stream
        self._unsent: deque[memoryview] = deque()
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._start = self._end = 0  # of what was read and not looked at
        self._message: memoryview | None = None  # that is being read
        self._filled = self._header_at = self._buffer_at = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def shake_hands(self, wait: Callable[[int], None]) -> None:
        """Show keys to each other, if there are any. ``wait(event)``: until the socket is ready for it; may raise.

        Raises ssl.SSLCertVerificationError if the other side's key is not known here, OSError.
        """
        self._stream.shake_hands(wait)

    # ---------------------------------------------------------------------------------- receiving

    def try_receive(self) -> Frames | None:
        """The next message, or None if it is not here yet.

        Raises ConnectionError if the connection has ended, ProtocolError if what comes is too large.
        """
        while (message := self._next()) is None:
            if not self._read():
                return None
        self.has_received = True
        return message

    def receive(self, awake_s: float = 0.0) -> Frames:
        """The next message; the first ``awake_s`` of each wait awake. Raises like ``try_receive``."""
        while (message := self.try_receive()) is None:
            self.wait(None, awake_s)
        return message

    def wait(self, timeout_ms: float | None, awake_s: float = 0.0) -> bool:
        """Until something can be read, or the connection has ended. What was received before must have been taken."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return look_out(poll, awake_s) or bool(poll.poll(timeout_ms))

    def _next(self) -> Frames | None:
        """A message out of what was read."""
        if self._message is None:
            if self._end - self._start < _PREFIX.size:
                return None
            self._begin(*_PREFIX.unpack_from(self._chunk, self._start))
        message = self._message
        assert message is not None
        taken = min(len(message) - self._filled, self._end - self._start)
        if taken:
            message[self._filled : self._filled + taken] = self._chunk[self._start : self._start + taken]
            self._start += taken
            self._filled += taken
        if self._filled < len(message):
            return None
        self._message = None
        return message[self._header_at : self._buffer_at], message[self._buffer_at :]

    def _begin(self, header_bytes: int, buffer_bytes: int) -> None:
        if header_bytes > self.max_header_bytes or buffer_bytes > self.max_buffer_bytes:
            raise ProtocolError(
                f"a message announces {header_bytes} + {buffer_bytes} bytes, expected at most "
                f"{self.max_header_bytes} + {self.max_buffer_bytes}"
            )
        self._start += _PREFIX.size
        self._filled = self._header_at = -header_bytes % _ALIGNMENT  # so that the buffer begins at a multiple
        self._buffer_at = self._header_at + header_bytes
        self._message = np.empty(self._buffer_at + buffer_bytes, dtype=np.uint8).data

    def _read(self) -> bool:
        """Read what is here. False: nothing."""
        message = self._message
        if message is None:
            left = self._end - self._start
            if left:
                self._chunk[:left] = bytes(self._chunk[self._start : self._end])
            self._start, self._end = 0, left
            room = self._chunk[left:]
        else:  # all of the chunk is in it already
            self._start = self._end = 0
            room = message[self._filled :]
        try:
            with self._lock:
                count = self._stream.recv_into(room)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not count:
            raise ConnectionError("the other side has closed the connection")
        if message is None:
            self._end += count
        else:
            self._filled += count
        return True

    # ------------------------------------------------------------------------------------ sending

    @property
    def unsent_bytes(self) -> int:
        with self._lock:  # another thread may be flushing
            return sum(map(len, self._unsent))

    def send(self, header: bytes, buffer: memoryview = NOTHING) -> bool:
        """Send what the socket takes now, and keep the rest for ``flush``. True: nothing is left.

        The buffer may not change before it is sent. Raises ConnectionError.
        """
        buffer = buffer.cast("B")
        start = _PREFIX.pack(len(header), len(buffer)) + header
        if len(start) + len(buffer) <= _CHUNK_BYTES:
            parts = [memoryview(start + buffer)]
        else:
            parts = [view[i : i + _CHUNK_BYTES] for view in (memoryview(start), buffer)
                     for i in range(0, len(view), _CHUNK_BYTES)]  # fmt: skip
        with self._lock:
            self._unsent.extend(parts)
            return self._flush()

    def flush(self) -> bool:
        """Send more of what is left. True: nothing is left any more. Raises ConnectionError."""
        with self._lock:
            return self._flush()

    def wait_sent(self, stall_s: float) -> None:
        """Until everything is sent. Raises ConnectionError also if the other side takes nothing for so long."""
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while not self.flush():
            if not poll.poll(1000 * stall_s):
                raise ConnectionError(f"the other side took nothing for {stall_s:g} s")

    def _flush(self) -> bool:
        try:
            while self._unsent:
                part = self._unsent[0]
                sent = self._stream.send(part)
                if sent == len(part):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = part[sent:]
            self._stream.flush()
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionError(str(error)) from error
        return True

    # ------------------------------------------------------------------------------------- ending

    def shut(self) -> None:
        """End the connection, from any thread: who waits for it wakes."""
        with suppress(OSError):  # it has ended
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody may use it any more."""
        self._sock.close()


def look_out(poll: select.poll, seconds: float) -> bool:
    """Wait awake: being woken takes as long as a part of a message's way itself. Whether something came."""
    deadline = monotonic() + seconds if seconds > 0 else 0.0
    while monotonic() < deadline:
        if poll.poll(0):
            return True
    return False


def is_local(address: str) -> bool:
    """Whether an address is of this machine alone: ipc://, which needs no keys."""
    return address.startswith("ipc://")


def new_socket(address: str) -> tuple[socket.socket, Any]:
    """A socket for ipc://PATH, ipc://@NAME (abstract) or tcp://IP:PORT, and what to bind it or connect it to.

    Raises ConfigError if it is none of these, OSError if the name is not known.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        return socket.socket(socket.AF_UNIX), "\0" + rest[1:] if rest.startswith("@") else rest
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"found the address {address!r:.80}, expected tcp://IP:PORT or ipc://NAME")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family, _, _, _, where = found[0]
    made = socket.socket(family)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made, where


def end_when_silent(sock: socket.socket, seconds: float) -> None:
    """Have a TCP connection end when the other machine has confirmed nothing, or had no room, for so long.

    Connections that ``sock`` accepts do the same.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # whether anything is under way or not
    for option, value in (
        (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_USER_TIMEOUT, int(1000 * seconds)),
    ):  # fmt: skip
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
