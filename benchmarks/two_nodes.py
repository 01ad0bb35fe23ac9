"""An engine over two nodes of one machine, and what can befall the other node. What faults.py and soak.py use.

The nodes are network namespaces with a link of 1 Gbit/s, or more, between them, made by `moray cluster` (root). This
process is on the left one, with the compute actor; the right one holds all experts that its memory takes, and computes
them.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import psutil
import ray
from fault_injection import PROMPT, Fault, Kill, KillCompute, KillComputeAndHost, KillOrchestrator, pid_of

import moray
from moray.deploy.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.network import Machine, two_machines

SHORT_S = 3.0  # a node that is away for so long stays a member of Ray's cluster
LONG_S = 20.0  # and for so long does not
_POLL_S, _MOST_LOOKS = 0.2, 900  # not seconds: this process may stand still meanwhile, as the others do
_MORAY = (sys.executable, "-m", "moray.deploy.cli")


@dataclass(frozen=True)
class TwoNodes:
    """``gbit``: the link's bandwidth, each way."""

    left: Machine
    right: Machine
    gbit: int

    @property
    def head(self) -> str:
        return f"{self.left.address}:6379"

    def join(self) -> None:
        self.right.run(*_MORAY, "cluster", "join", self.head)

    def remote_processes(self) -> list[int]:
        """Pids of expert hosts on the right node: one, if the engine is well."""
        return [pid for pid in self.right.pids() if _command(pid).startswith("ray::ExpertHost")]

    def launch(self, store: Path | None, host_memory: str, lanes: Any = "remote") -> Engine:
        """``host_memory``: of all arenas of the left node."""
        return moray.launch(store, address=self.head, hosts=2, lanes=lanes, host_memory=host_memory)


@contextmanager
def two_nodes(gbit: int) -> Iterator[TwoNodes]:
    """Make them, and put this process on the left one. Whatever runs there at the end is killed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    source = str(Path(moray.__file__).parents[1])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moray-two-nodes-")))
        left, right = stack.enter_context(two_machines(folder, f"{gbit}gbit", PYTHONPATH=source, HF_HUB_OFFLINE="1"))
        nodes = TwoNodes(left, right, gbit)
        left.run(*_MORAY, "cluster", "keys")
        token = Path(".ray", "auth_token")
        (right.home / token).parent.mkdir(mode=0o700)
        (right.home / token).touch(mode=0o600)
        (right.home / token).write_bytes((left.home / token).read_bytes())
        left.run(*_MORAY, "cluster", "up", "--address", left.address)
        nodes.join()
        stack.enter_context(left.entered())
        yield nodes
        ray.shutdown()  # who is connected when the cluster ends is ended too
        for machine in (right, left):
            machine.run(*_MORAY, "cluster", "down")
            _check_empty(machine)


def _check_empty(machine: Machine) -> None:
    """Nothing runs there any more, but for this process."""
    for _ in range(_MOST_LOOKS):
        commands = [_command(pid) for pid in machine.pids() if pid != os.getpid()]
        names = [command for command in commands if command]  # those of processes that have ended are empty
        if not names:
            return
        sleep(_POLL_S)
    raise SystemExit(f"left at {machine.address}: {'; '.join(names)}")


def _command(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def await_use(engine: Engine, nodes: TwoNodes) -> None:
    """Generate until the other node computes experts, in one process."""
    before: dict[str, int] = {}
    for _ in range(_MOST_LOOKS):
        counts = {host.host_id: host.pairs for host in engine.stats().remote if host.state == "up"}
        if counts and before.keys() == counts.keys() and counts != before and len(nodes.remote_processes()) == 1:
            return
        before = counts
        engine.generate(PROMPT, max_new_tokens=8)
        sleep(_POLL_S)
    raise SystemExit(
        f"the other node is not used again: processes {nodes.remote_processes()} of hosts, {engine.status()}, "
        f"{engine.events()[-20:]}"
    )


class KillRemoteHost(Kill):
    name = "kill the remote host"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return engine.actors.remote_hosts()


class KillAll(Kill):
    name = "kill all hosts of both nodes"

    def victims(self, engine: Engine, random: Random) -> Sequence[Any]:
        return [*engine.actors.hosts, *engine.actors.remote_hosts()]


class Passing:
    """What befalls the other node for ``seconds``."""

    name, seconds = "", SHORT_S

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes

    def begin(self, engine: Engine) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def strike(self, engine: Engine, random: Random) -> None:
        self.begin(engine)
        self._timer = threading.Timer(self.seconds, self.end)
        self._timer.start()

    def heal(self, engine: Engine) -> None:
        self._timer.join()


class StopRemoteHost(Passing):
    name = "stop the remote host"

    def begin(self, engine: Engine) -> None:
        self._pids = [pid_of(host) for host in engine.actors.remote_hosts()]
        _signal(self._pids, signal.SIGSTOP)

    def end(self) -> None:
        _signal(self._pids, signal.SIGCONT)


class StopNode(StopRemoteHost):
    name = "stop the other node"

    def begin(self, engine: Engine) -> None:
        self._pids = self.nodes.right.pids()
        _signal(self._pids, signal.SIGSTOP)


class LinkDown(Passing):
    name = "link down"

    def begin(self, engine: Engine) -> None:
        self.nodes.right.set_link("down")

    def end(self) -> None:
        self.nodes.right.set_link("up")


class LinkDownLong(LinkDown):
    name, seconds = f"link down for {LONG_S:g} s", LONG_S


class SlowLink(Passing):
    name = "link at 1 % of its bandwidth"

    def begin(self, engine: Engine) -> None:
        for machine in (self.nodes.left, self.nodes.right):
            machine.shape(f"{10 * self.nodes.gbit}mbit", burst="16k")

    def end(self) -> None:
        for machine in (self.nodes.left, self.nodes.right):
            machine.shape(f"{self.nodes.gbit}gbit")


class KillNode:
    """kill -9 of everything on the other node, which joins again."""

    name = "kill the other node"

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes

    def strike(self, engine: Engine, random: Random) -> None:
        _signal(self.nodes.right.pids(), signal.SIGKILL)

    def heal(self, engine: Engine) -> None:
        self.nodes.join()


class RestartNode(KillNode):
    """`moray cluster down` and `join` there."""

    name = "restart the other node"

    def strike(self, engine: Engine, random: Random) -> None:
        self.nodes.right.run(*_MORAY, "cluster", "down")


class AndUsedAgain:
    """A fault that is over when the other node computes experts again."""

    def __init__(self, fault: Fault, nodes: TwoNodes) -> None:
        self.name, self._fault, self._nodes = fault.name, fault, nodes

    def strike(self, engine: Engine, random: Random) -> None:
        self._fault.strike(engine, random)

    def heal(self, engine: Engine) -> None:
        self._fault.heal(engine)
        await_use(engine, self._nodes)


def faults_of(nodes: TwoNodes) -> list[Fault]:
    """All that are struck on two nodes."""
    local = [KillRemoteHost(), KillAll(), KillCompute(), KillOrchestrator(), KillComputeAndHost()]
    passing = [kind(nodes) for kind in (StopRemoteHost, StopNode, LinkDown, SlowLink, LinkDownLong)]
    return [AndUsedAgain(fault, nodes) for fault in (*local, *passing, KillNode(nodes), RestartNode(nodes))]


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
