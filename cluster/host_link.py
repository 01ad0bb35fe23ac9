"""One host of this node as the compute process sees it: waited for while it lives, given up at once when it does not.

A host is lost when its process has ended (pidfd), is stopped (/proc), or has not answered a question for a second.
It is asked for nothing from then on, and greeted until it answers; then it is used again.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Literal

from moray.cluster.client import HostClient, refusal
from moray.cluster.messages import Ask, Coming, Hello, Message, Need, Refused, Welcome
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import HostLostError
from moray.runtime.events import Event, HostBack, HostLost, cause_of

_SILENT_S = 1.0  # without an answer to a question, before a host is given up
_GREET_S = 0.1  # between two greetings of a host that is lost

How = Literal["ended", "stopped", "silent"]


class HostLink:
    """Used by one thread. ``report`` is told what happens; it may not wait."""

    def __init__(self, client: HostClient, welcome: Welcome, report: Callable[[Event], None]) -> None:
        self.client, self._report = client, report
        self.arena = Arena.attach(_arena_ref(welcome))
        self.is_lost = False
        self.shards_read = 0  # by this process, since the host was lost
        self._lost_s = self._greeted_s = 0.0
        self._num_losses: dict[int, int] = {}  # by pid
        self._cause = ""
        self._question: tuple[int, float, Ask] | None = None  # its id, when it was sent
        self._follow(welcome.arena_pid)

    def send(self, message: Message) -> None:
        """A message that needs no answer; nothing is queued for a host that is lost."""
        if self.is_lost:
            return
        if isinstance(message, Need):
            self._question = None  # of an earlier layer call, given up: its answer says nothing about this one
        self.client.try_send(message)

    def ask(self, question: Ask) -> None:
        """Ask what became of experts, unless that was asked before and not answered yet."""
        if self._question is None and not self.is_lost and (asked := self.client.try_send(question)) is not None:
            self._question = (asked, perf_counter(), question)

    def check(self) -> None:
        """Look after the host. Sets ``is_lost``. Raises what it says of the experts asked about."""
        self._receive()
        if self.is_lost:
            self._greet()
        elif (how := self._why_lost()) is not None:
            self._lose(how)

    def close(self) -> None:
        os.close(self._pidfd)
        self.arena.close()

    def _receive(self) -> None:
        while (reply := self.client.try_receive()) is not None:
            request_id, message, _ = reply
            is_answer = self._question is not None and request_id == self._question[0]
            if isinstance(message, Welcome):
                self._welcome(message)
            elif isinstance(message, Refused) and message.reason == "hello":
                self._greet_now()  # restarted, before it was missed
                self._question = None
            elif is_answer:
                self._question = None
                if isinstance(message, Refused):
                    raise refusal(self.client.host.host_id, message)
                assert isinstance(message, Coming)

    def _why_lost(self) -> How | None:
        if select.select([self._pidfd], [], [], 0)[0]:
            return "ended"
        if self._is_stopped():
            return "stopped"
        is_silent = self._question is not None and perf_counter() - self._question[1] > _SILENT_S
        return "silent" if is_silent else None

    def _lose(self, how: How) -> None:
        count = self._num_losses.get(self._pid, 0)
        self._num_losses[self._pid] = count + 1
        self._cause = cause_of(self.client.host.host_id, self._pid, count)
        self.is_lost, self._lost_s, self.shards_read, self._question = True, perf_counter(), 0, None
        self._report(HostLost(self._cause, self.client.host.host_id, how))

    def _greet(self) -> None:
        if perf_counter() - self._greeted_s > _GREET_S:
            self._greet_now()

    def _greet_now(self) -> None:
        self._greeted_s = perf_counter()
        self.client.try_send(Hello(client=self.client.name, token=self.client.host.token))

    def _welcome(self, welcome: Welcome) -> None:
        if not self._is_same_arena(welcome):
            raise HostLostError(
                f"expert host {self.client.host.host_id} came back with an arena of its own, which this process does "
                "not map; start the engine again"
            )
        os.close(self._pidfd)
        self._follow(welcome.arena_pid)
        if self.is_lost and self._why_lost() is None:
            self.is_lost = False
            lost_s = perf_counter() - self._lost_s
            self._report(HostBack(self._cause, self.client.host.host_id, lost_s, self.shards_read))

    def _follow(self, pid: int) -> None:
        """Watch the host's process. One that is gone already is as good as one that ends."""
        self._pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd, write_end = os.pipe()
            os.close(write_end)  # readable from now on, as a pidfd is when its process has ended

    def _is_stopped(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def _is_same_arena(self, welcome: Welcome) -> bool:
        with suppress(OSError):
            theirs = os.stat(f"/proc/{welcome.arena_pid}/fd/{welcome.arena_fd}")
            mine = os.stat(f"/proc/self/fd/{self.arena.ref.fd}")
            return (theirs.st_dev, theirs.st_ino) == (mine.st_dev, mine.st_ino)
        return True  # gone again: the next look finds out


def _arena_ref(welcome: Welcome) -> ArenaRef:
    return ArenaRef(welcome.arena_pid, welcome.arena_fd, welcome.arena_bytes)
