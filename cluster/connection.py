"""A client's connection to one address, made again whenever it breaks. A thread makes it and sends what did not fit."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from moray.cluster.wire import Wire, end_when_silent, is_local, new_socket
from moray.runtime.errors import MorayError

_DIAL_S = 2.0  # for a connection, and again for the keys to be shown
_SILENT_S = 10.0  # the host's machine, before the connection is given up; a host may be busy for some seconds
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0  # between attempts
_LOCAL_PAUSE_S = 0.05  # of the same machine: asking costs nothing


class Connection:
    """``wire`` is the connection there is, or None. One thread uses it; who finds that it has ended says ``lost``."""

    def __init__(self, address: str, make_context: Callable[[], ssl.SSLContext] | None) -> None:
        self._address, self._make_context = address, make_context
        self.wire: Wire | None = None
        self.why = ""  # there is none
        self._longest_pause_s = _LOCAL_PAUSE_S if is_local(address) else _LONGEST_PAUSE_S
        self._changed = threading.Condition()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lost: Wire | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="moray-connection", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> Wire | None:
        """The connection, as soon as there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self.wire is not None, timeout_s)
            return self.wire

    def lost(self, wire: Wire, why: str) -> None:
        """It has ended; it is not used any more."""
        with self._changed:
            self.wire, self._lost, self.why = None, wire, why
        os.eventfd_write(self._event, 1)

    def flush_later(self) -> None:
        """Something is left to be sent."""
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        self._is_closed = True
        os.eventfd_write(self._event, 1)
        self._thread.join()
        os.close(self._event)

    # ------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._is_closed:
            wire = self._dial()
            if wire is not None:
                self._tend(wire)
                if wire.has_received:
                    pause_s = _FIRST_PAUSE_S
                wire.close()
            self._rest(pause_s)
            pause_s = min(2 * pause_s, self._longest_pause_s)

    def _tend(self, wire: Wire) -> None:
        """Until it is lost, or this is closed."""
        with self._changed:
            self.wire = wire
            self._changed.notify_all()
        while True:
            is_sent = True
            try:
                is_sent = wire.flush()
            except ConnectionError:
                wire.shut()  # who receives finds out
            self._poll(wire, 0 if is_sent else select.POLLOUT, None)
            if self._is_closed or self._lost is wire:
                self.wire = self._lost = None
                return

    def _rest(self, pause_s: float) -> None:
        deadline = monotonic() + pause_s
        while not self._is_closed and (left_s := deadline - monotonic()) > 0:
            self._poll(None, 0, left_s)

    def _dial(self) -> Wire | None:
        sock: socket.socket | None = None
        try:
            sock, where = new_socket(self._address)
            self._connect(sock, where)
            wire = Wire(sock, self._make_context() if self._make_context is not None else None)
            deadline = monotonic() + _DIAL_S
            wire.shake_hands(lambda event: self._await(sock, event, deadline))
            return wire
        except (OSError, MorayError) as error:
            self.why = str(error)
            if sock is not None:
                sock.close()
            return None

    def _connect(self, sock: socket.socket, where: Any) -> None:
        if sock.family == socket.AF_UNIX:  # there at once, or not at all
            sock.settimeout(_DIAL_S)
            return sock.connect(where)
        end_when_silent(sock, _SILENT_S)
        sock.setblocking(False)
        try:
            sock.connect(where)
        except BlockingIOError:
            self._await(sock, select.POLLOUT, monotonic() + _DIAL_S)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error)) from None

    def _await(self, sock: socket.socket, event: int, deadline: float) -> None:
        """Raises TimeoutError, also when this is closed."""
        while not self._poll(sock, event, max(0.0, deadline - monotonic())):
            if self._is_closed or monotonic() >= deadline:
                raise TimeoutError(f"no answer within {_DIAL_S:g} s")

    def _poll(self, sock: socket.socket | Wire | None, event: int, timeout_s: float | None) -> bool:
        """Until then, or somebody calls. Whether the socket is ready."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        if sock is not None and event:
            poll.register(sock.fileno(), event)
        if self._is_closed:  # the call may have been heard before
            timeout_s = 0.0
        ready = dict(poll.poll(None if timeout_s is None else 1000 * timeout_s))
        if ready.pop(self._event, 0):
            os.eventfd_read(self._event)
        return bool(ready)
