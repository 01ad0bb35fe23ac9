"""Faults of a running engine, and a generation that one of them strikes. What faults.py, soak.py and tests share.

A fault is a ``Fault``: ``strike`` does it, and may return before its effect is over; ``heal`` undoes what does not pass
by itself and waits until the engine is whole again. ``FAULTS`` are those of one node; two_nodes.py has those of two.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter, sleep
from typing import Any, Protocol

from moray.actors.streams import await_actor
from moray.deploy.engine import Engine

PROMPT = "import os\n"
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 1})  # the demonstration model goes on long
STOP_S = 3.0  # a stopped host
_POLL_S = 0.02


class Fault(Protocol):
    name: str

    def strike(self, engine: Engine, random: Random) -> None: ...

    def heal(self, engine: Engine) -> None: ...


def pid_of(actor: Any) -> int:
    """The process that is this actor now; waits for one that is being restarted."""
    pid: int = await_actor(actor).pid
    return pid


class Kill:
    """kill -9 of the chosen actors' processes."""

    name = ""

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        raise NotImplementedError

    def strike(self, engine: Engine, random: Random) -> None:
        self._killed = [(actor, pid_of(actor)) for actor in self.victims(engine, random)]
        for _, pid in self._killed:
            os.kill(pid, signal.SIGKILL)

    def heal(self, engine: Engine) -> None:
        for actor, pid in self._killed:
            while pid_of(actor) == pid:
                sleep(_POLL_S)


class KillHost(Kill):
    name = "kill a host"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return [random.choice(engine.actors.hosts)]


class KillAllHosts(Kill):
    name = "kill all hosts"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return engine.actors.hosts


class KillCompute(Kill):
    name = "kill the compute actor"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return [engine.actors.compute]


class KillOrchestrator(Kill):
    name = "kill the orchestrator"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return [engine.actors.orchestrator]


class KillComputeAndHost(Kill):
    name = "kill compute and a host"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return [engine.actors.compute, random.choice(engine.actors.hosts)]


class StopHost:
    """SIGSTOP of a host, for ``STOP_S`` seconds."""

    name = "stop a host"

    def strike(self, engine: Engine, random: Random) -> None:
        self._pid = pid_of(random.choice(engine.actors.hosts))
        os.kill(self._pid, signal.SIGSTOP)
        self._timer = threading.Timer(STOP_S, os.kill, (self._pid, signal.SIGCONT))
        self._timer.start()

    def heal(self, engine: Engine) -> None:
        self._timer.join()


FAULTS: tuple[type[Fault], ...] = (
    KillHost,
    KillAllHosts,
    StopHost,
    KillCompute,
    KillOrchestrator,
    KillComputeAndHost,
)


@dataclass(frozen=True)
class Struck:
    """A generation that a fault struck."""

    fault: str
    token_ids: tuple[int, ...]
    text: str
    at_s: float  # from the request to the fault
    stall_s: float  # longest time between two events, from the fault on
    whole_s: float  # from the fault until the engine was whole again, or the answer at its end


def generate_struck(engine: Engine, fault: Fault, random: Random, max_new_tokens: int, **options: Any) -> Struck:
    """Stream an answer, struck by the fault after a random one of its tokens; heal it."""
    errors: list[BaseException] = []

    def strike() -> None:
        try:
            fault.strike(engine, random)
        except BaseException as error:
            errors.append(error)

    after, striking = random.randrange(max_new_tokens), threading.Thread(target=strike)
    token_ids, text, stall_s, started = [], "", 0.0, perf_counter()
    stream, last, struck_s = engine.stream(PROMPT, max_new_tokens=max_new_tokens, **options), started, 0.0
    while True:
        if not struck_s and len(token_ids) >= after:
            struck_s = last = perf_counter()
            striking.start()
        event = next(stream, None)
        if event is None:
            break
        now = perf_counter()
        stall_s = max(stall_s, now - last) if struck_s else 0.0
        token_ids += event.token_ids
        text, last = text + event.text, now
    striking.join()
    for error in errors:
        raise error
    fault.heal(engine)
    return Struck(fault.name, tuple(token_ids), text, struck_s - started, stall_s, perf_counter() - struck_s)
