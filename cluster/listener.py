"""Who connects to an address: each gets a thread of its own once it has shown a key that is admitted."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep

from moray.cluster.keys import Admission
from moray.cluster.wire import Wire, end_when_silent, is_local, new_socket
from moray.runtime.errors import ConfigError

TAKEN_S = 30.0  # a client that takes nothing of what it asked for is given up after this
_HANDSHAKE_S = 5.0  # a connection that has not shown its key by then is closed
_MOST_STRANGERS = 64  # connections that have not shown their key; more are closed at once
_MOST_CONNECTIONS = 512
_SHORT_OF_FILES_S = 0.1


@dataclass(slots=True)
class ServerStats:
    """Counts since the start. Written with ``lock`` held."""

    connections: int = 0  # those beyond ``admitted`` spoke no TLS, had a wrong key or none, or were too many
    admitted: int = 0
    clients_refused: int = 0  # whose own key is not known here
    pairs_computed: int = 0

    reads: int = 0  # answers to who reads the store
    read_bytes: int = 0
    requests: int = 0
    rejected: int = 0  # answered with Refused, for whatever reason, or too large to be looked at
    hints: int = 0
    clients: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, name: str, more: int = 1) -> None:
        with self.lock:
            setattr(self, name, getattr(self, name) + more)


class Listener:
    """Calls ``serve`` with every connection that is admitted, in a thread of its own, until ``close``."""

    def __init__(
        self, address: str, admission: Admission | None, stats: ServerStats, serve: Callable[[Wire], None]
    ) -> None:
        """``admission``: None for ipc://, where those of the same user are admitted. Raises ConfigError."""
        self._admission, self._stats, self._serve = admission, stats, serve
        self._socket = _listen(address)
        self.address = address if is_local(address) else _address_of(self._socket)
        self._open: dict[Wire, threading.Thread] = {}
        self._strangers = 0
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._accept, name="moray-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        with self._lock:
            threads = list(self._open.values())
            for wire in self._open:
                wire.shut()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while all(fd != self._stop for fd, _ in poll.poll()):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionError):
                continue  # it has gone again
            except OSError:  # no more files may be open: others may close some
                sleep(_SHORT_OF_FILES_S)
                continue
            self._stats.count("connections")
            with self._lock:
                if self._strangers < _MOST_STRANGERS and len(self._open) < _MOST_CONNECTIONS:
                    self._greet(sock)
                else:
                    sock.close()
        self._socket.close()

    def _greet(self, sock: socket.socket) -> None:
        """Begin to find out who it is."""
        wire = Wire(sock, self._admission.context if self._admission is not None else None, is_server=True)
        thread = threading.Thread(target=self._run, args=(sock, wire), name="moray-data-plane", daemon=True)
        self._strangers += 1
        self._open[wire] = thread
        thread.start()

    def _run(self, sock: socket.socket, wire: Wire) -> None:
        try:
            is_admitted = self._is_admitted(sock, wire)
            with self._lock:
                self._strangers -= 1
            if is_admitted:
                self._stats.count("admitted")
                self._serve(wire)
        except ConnectionError:
            pass  # it ended, as connections do
        finally:
            wire.close()
            with self._lock:
                del self._open[wire]

    def _is_admitted(self, sock: socket.socket, wire: Wire) -> bool:
        if self._admission is None:
            size = struct.calcsize("3i")
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            return uid in (0, os.geteuid())
        deadline = monotonic() + _HANDSHAKE_S

        def wait(event: int) -> None:
            poll = select.poll()
            poll.register(sock, event)
            if not poll.poll(max(0.0, 1000 * (deadline - monotonic()))):
                raise TimeoutError

        try:
            wire.shake_hands(wait)
        except ssl.SSLCertVerificationError:
            self._stats.count("clients_refused")
            return False
        except OSError:
            return False  # no TLS, or it went away
        return True


def _listen(address: str) -> socket.socket:
    """Raises ConfigError."""
    made: socket.socket | None = None
    try:
        made, where = new_socket(address)
        if not is_local(address):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end_when_silent(made, TAKEN_S)
        made.bind(where)
        made.listen(_MOST_STRANGERS)
        made.setblocking(False)
        return made
    except OSError as error:
        if made is not None:
            made.close()
        raise ConfigError(f"cannot listen at {address} ({error.strerror}); is it this machine's, and free?") from error


def _address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
