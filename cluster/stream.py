"""A non-blocking socket as a stream of bytes, plain or through TLS. Not thread-safe: Wire's lock is."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable

_RAW_BYTES = 128 << 10  # read at once
NOTHING = memoryview(b"")


class PlainStream:
    """A socket as it is."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def shake_hands(self, wait: Callable[[int], None]) -> None:
        """Nothing to do."""

    def recv_into(self, view: memoryview) -> int:
        """Some bytes; 0: the other side has closed. Raises BlockingIOError if nothing is here, OSError."""
        return self._sock.recv_into(view)

    def send(self, data: memoryview) -> int:
        """How many bytes were taken. Raises BlockingIOError if none can be now, OSError."""
        return self._sock.send(data)

    def flush(self) -> None:
        """Send what was taken and not sent. Raises BlockingIOError if something is left, OSError."""


class TlsStream:
    """TLS in memory between a socket and its user: one system call moves many records. Methods as ``PlainStream``."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=is_server)
        self._raw = memoryview(bytearray(_RAW_BYTES))
        self._unsent = NOTHING  # encrypted

    def shake_hands(self, wait: Callable[[int], None]) -> None:
        """Show keys to each other. ``wait(event)``: until the socket is ready for it; may raise.

        Raises ssl.SSLCertVerificationError if the other side's key is not known here, OSError.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush_waiting(wait)
                self._receive_waiting(wait)
            except ssl.SSLError:
                self._flush_waiting(wait)  # it tells the other side why
                raise
            else:
                return self._flush_waiting(wait)

    def recv_into(self, view: memoryview) -> int:
        """All that is here already, as far as there is room: a record is 16 KiB at most."""
        count = 0
        while count < len(view):
            try:
                if not self._received.pending and not self._tls.pending():
                    if count:
                        return count
                    if not self._receive():
                        return 0
                count += self._tls.read(len(view) - count, view[count:])  # type: ignore[operator]  # it returns int
            except ssl.SSLWantReadError:  # a part of a record
                if count:
                    return count
                if not self._receive():
                    return 0
            except ssl.SSLZeroReturnError:
                return count
        return count

    def send(self, data: memoryview) -> int:
        self.flush()
        self._tls.write(data)
        self._unsent = memoryview(self._to_send.read())
        self._push()
        return len(data)

    def flush(self) -> None:
        if len(self._unsent):
            self._push()
        if len(self._unsent):
            raise BlockingIOError

    def _push(self) -> None:
        try:
            while len(self._unsent):
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass

    def _receive(self) -> bool:
        """False: the other side has closed."""
        count = self._sock.recv_into(self._raw)
        self._received.write(self._raw[:count])
        return count > 0

    def _flush_waiting(self, wait: Callable[[int], None]) -> None:
        self._unsent = memoryview(self._to_send.read())
        while True:
            try:
                return self.flush()
            except BlockingIOError:
                wait(select.POLLOUT)

    def _receive_waiting(self, wait: Callable[[int], None]) -> None:
        while True:
            try:
                if self._receive():
                    return
                raise ConnectionError("the other side has closed the connection")
            except BlockingIOError:
                wait(select.POLLIN)


Stream = PlainStream | TlsStream


def make_stream(sock: socket.socket, context: ssl.SSLContext | None, *, is_server: bool) -> Stream:
    return PlainStream(sock) if context is None else TlsStream(sock, context, is_server=is_server)
