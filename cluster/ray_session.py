"""Starting Ray, or joining it. The only file of cluster/ that knows Ray.

A local session is light (docs/architecture.md): no dashboard, a small object store, no workers started ahead.
It has a fresh token of its own, so nothing else on the machine can talk to it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, no stubs

from moray.cluster.nodes import NodeInfo
from moray.runtime.errors import ClusterError, ConfigError

OBJECT_STORE_BYTES = 128 << 20  # experts live in arenas; Ray's store carries only messages
NAMESPACE = "moray"
_CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class RaySession:
    """What this process did to have Ray."""

    started_here: bool  # we started it, so we stop it
    processes: tuple[tuple[int, float], ...] = ()  # what was started: pid and time of creation


def start_local(num_cpus: int) -> RaySession:
    """Start Ray on this machine for this process alone. Raises ClusterError."""
    if ray.is_initialized():
        return RaySession(False)
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode not in ("token", "disabled"):  # Ray would take any other word for "disabled", silently
        raise ConfigError(f"RAY_AUTH_MODE is {mode!r}, expected token or disabled")
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    # Ray's processes inherit these. They stay set: Ray keeps the first token it has seen for the process's life.
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    Config.initialize("")  # Ray read these when it was imported; this is how its own code makes it read them again
    before = _children()
    try:
        ray.init(
            address="local",  # never join what RAY_ADDRESS or another user's session offers
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=NAMESPACE,
            _system_config={"prestart_worker_first_driver": False},
        )
    except Exception as error:
        raise ClusterError(f"Ray did not start on this machine ({error}); run `moray doctor`") from error
    _end_unused()
    _keep_off_the_terminal()
    return RaySession(True, tuple(_children() - before))


def _end_unused() -> None:
    """End those of Ray's processes that an engine has no use for: each is 60 MB or more, and wakes all the time.

    They follow logs to drivers, scale clusters and serve the dashboard, all of which this session does without.
    """
    node: Any = ray._private.worker._global_node
    for end in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):
        end(check_alive=False)


def join(address: str) -> RaySession:
    """Connect to a running cluster at HOST:PORT. Raises ConfigError at once if nothing listens there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"the Ray address {address!r} is not HOST:PORT; give the head node's, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error}); start one there with `ray start --head --port={port}`, "
            "or leave out the address to run on this machine alone"
        ) from error
    if ray.is_initialized():
        return RaySession(False)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at {address} refused this process ({error}); RAY_AUTH_MODE and the token must be the "
            "same on every machine"
        ) from error
    _keep_off_the_terminal()
    return RaySession(False)


def _keep_off_the_terminal() -> None:
    """Ray prints paragraphs on a lost worker among the text that is generated, and has no option against it.

    With ``log_to_driver=False`` nothing else is printed there; our events tell of the loss in a line.
    """
    worker: Any = ray._private.worker
    worker.print_to_stdstream = lambda data, ignore_prefix: None


def leave(session: RaySession) -> None:
    """Stop Ray if it was started here."""
    if session.started_here and ray.is_initialized():
        ray.shutdown()


def _children() -> set[tuple[int, float]]:
    """Ray's processes below this one. Not all children: a program may have others, which are not ours to end."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(f"{os.sep}ray{os.sep}" in word or word.startswith("ray::") for word in child.cmdline()):
                found.add((child.pid, child.create_time()))
    return found


def living_nodes() -> list[NodeInfo]:
    """The cluster's living nodes."""
    return [
        NodeInfo(node["NodeID"], node.get("Labels") or {}, int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]


def this_node() -> str:
    """The id of the node that this process is connected through."""
    return str(ray.get_runtime_context().get_node_id())
