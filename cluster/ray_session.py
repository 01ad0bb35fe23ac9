"""Starting Ray, or joining it. The only file of cluster/ that knows Ray.

A local session is light (docs/architecture.md): no dashboard, a small object store, no workers started ahead.
It has a fresh token of its own, so nothing else on the machine can talk to it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]  # no stubs
from ray.exceptions import AuthenticationError, RpcError

from moray.cluster.grpc_probe import probe
from moray.cluster.node_record import has_token, read_record
from moray.cluster.nodes import NodeInfo
from moray.runtime.errors import ClusterError, ConfigError

OBJECT_STORE_BYTES = 128 << 20  # experts live in arenas; Ray's store carries only messages
NAMESPACE = "moray"
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0
_ALIVE = 0  # GcsNodeInfo.state


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


def check_address(address: str) -> None:
    """Raises ConfigError unless somebody listens at HOST:PORT, ClusterError if it is no Ray that would talk to us."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"the Ray address {address!r} is not HOST:PORT; give the head node's, e.g. 10.0.0.1:6379")
    try:
        problem = probe(host, int(port), _CONNECT_TIMEOUT_S)
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error}); is it up there (`moray cluster up`, `ray start --head`), "
            "and the way not blocked?"
        ) from error
    if problem is not None:
        tls = "on" if os.environ.get("RAY_USE_TLS") == "1" else "off"
        raise ClusterError(
            f"what listens at {address} is no Ray cluster that talks to this process ({problem}; TLS is {tls} here); "
            "TLS must be on for all nodes or for none, with certificates of one CA (`moray cluster keys`)"
        )


def join(address: str) -> RaySession:
    """Connect to a running cluster at HOST:PORT. Raises ConfigError at once if nothing listens there."""
    named, address = address, address.removeprefix("ray://")
    prepare_environment(address)
    check_address(named)
    if ray.is_initialized():
        return RaySession(False)
    nodes_at(address)  # refuses a wrong token at once: ray.init tries for 20 s
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


def prepare_environment(address: str) -> None:
    """Make Ray in this process talk to a cluster as it wants to be talked to.

    The environment wins; then how this machine's node of that cluster was started; then a token, if there is one.
    """
    record = read_record()
    settings = record.settings if record is not None and record.gcs_address == address else {}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not ray.is_initialized():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


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
    """The living nodes of the cluster that this process is in."""
    connected: Any = ray._private.worker.global_worker
    return _nodes(connected.gcs_client)


def nodes_at(address: str) -> list[NodeInfo]:
    """The living nodes of the cluster at HOST:PORT, without joining it.

    Raises ConfigError if nothing answers there, ClusterError if this process is not let in.
    """
    return _nodes(_ask(address))


def _nodes(client: Any) -> list[NodeInfo]:
    return [
        NodeInfo(
            node_id=node_id.hex(),
            labels=dict(node.labels),
            num_gpus=int(node.resources_total.get("GPU", 0)),
            name=node.node_name,
            address=node.node_manager_address,
            started_ms=node.start_time_ms,
            num_cpus=int(node.resources_total.get("CPU", 0)),
            memory_bytes=int(node.resources_total.get("memory", 0)),
        )
        for node_id, node in client.get_all_node_info(timeout=_ANSWER_TIMEOUT_S).items()
        if node.state == _ALIVE
    ]


def versions_at(address: str) -> dict[str, str]:
    """Versions of Ray and Python that a cluster runs, by ``ray`` and ``python``. Raises like ``nodes_at``."""
    stored = _ask(address).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=_ANSWER_TIMEOUT_S)
    found = json.loads(stored) if stored else {}
    return {"ray": found.get("ray_version", "unknown"), "python": found.get("python_version", "unknown")}


def _ask(address: str) -> Any:
    """A connection to a cluster's control store."""
    check_address(address)
    try:
        return GcsClient(address=address)
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise ClusterError(
            f"the Ray cluster at {address} refused this process's token (RAY_AUTH_MODE is {mode}); it must be the "
            "same on every machine: copy the head node's token file (`moray cluster keys` says where it is)"
        ) from error
    except RpcError as error:
        raise ClusterError(f"the Ray cluster at {address} does not answer ({error}); see its logs") from error


def this_node() -> str:
    """The id of the node that this process is connected through."""
    return str(ray.get_runtime_context().get_node_id())
