"""Starting Ray, or joining it. The only file of cluster/ that knows Ray.

A local session is light (docs/architecture.md): no dashboard, a small object store, as many workers started ahead as
there will be actors. It has a fresh token of its own, so nothing else on the machine can talk to it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import services
from ray._private.node import Node
from ray._raylet import (  # type: ignore[attr-defined]  # no stubs
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    GcsClient,
    persist_port,
)
from ray.exceptions import AuthenticationError, RpcError

from moray.cluster.grpc_probe import probe
from moray.cluster.node_record import has_token, read_record
from moray.cluster.nodes import NodeInfo
from moray.runtime.errors import ClusterError, ConfigError

OBJECT_STORE_BYTES = 128 << 20  # experts live in arenas; Ray's store carries only messages
NAMESPACE = "moray"
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 20.0
_ALIVE = 0  # GcsNodeInfo.state
_RAYLET = "raylet"  # a type of Ray's processes
_AT_ONCE = 4  # workers that a raylet starts side by side
_PORTS_OF_AGENTS = {  # -1: serves nothing; runtime environments must have some port
    METRICS_AGENT_PORT_NAME: -1,
    METRICS_EXPORT_PORT_NAME: -1,
    DASHBOARD_AGENT_LISTEN_PORT_NAME: -1,
    RUNTIME_ENV_AGENT_PORT_NAME: 1,
}


@dataclass(frozen=True, slots=True)
class RaySession:
    """What this process did to have Ray."""

    started_here: bool  # we started it, so we stop it
    processes: tuple[tuple[int, float], ...] = ()  # what was started: pid and time of creation


def start_local(num_cpus: int, num_actors: int = 0, *, with_agents: bool = False) -> RaySession:
    """Start Ray on this machine for this process alone. Raises ClusterError.

    ``num_actors``: workers that are started at once, for actors to come. ``with_agents``: metrics are exported, and
    there may be runtime environments; without, that is a second or two of the start and 130 MB.
    """
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
        with _light_node(num_actors, with_agents):
            ray.init(
                address="local",  # never join what RAY_ADDRESS or another user's session offers
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=NAMESPACE,
                _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": num_actors > 0},
            )
    except Exception as error:
        raise ClusterError(f"Ray did not start on this machine ({error}); run `moray doctor`") from error
    _keep_off_the_terminal()
    return RaySession(True, tuple(_children() - before))


@contextmanager
def _light_node(num_actors: int, with_agents: bool) -> Iterator[None]:
    """While Ray starts: without those of its processes that an engine has no use for, for which it has no options.

    Each is 60 MB or more, takes a second of a core to start, which ``ray.init`` waits for, and wakes all the time.
    They follow logs to drivers, scale clusters and serve the dashboard; without agents: export metrics, and make
    runtime environments.
    """
    start_process = services.start_ray_process

    class LightNode(Node):
        def __init__(self, ray_params: Any, *args: Any, **kwargs: Any) -> None:
            ray_params.update_if_absent(setup_worker_path=_script("ray_worker.py"))
            super().__init__(ray_params, *args, **kwargs)

        def start_monitor(self) -> None: ...

        def start_log_monitor(self) -> None: ...

        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = ""

        def start_raylet(self, *args: Any, **kwargs: Any) -> None:
            folder: str = self.get_session_dir_path()  # type: ignore[no-untyped-call]
            for name, port in {} if with_agents else _PORTS_OF_AGENTS.items():
                persist_port(folder, self.node_id, name, port)
            super().start_raylet(*args, **kwargs)

    def start(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == _RAYLET:
            command = _raylet_command(command, num_actors, with_agents)
        return start_process(command, process_type, *args, **kwargs)

    module: Any = ray._private.node
    module.Node, services.start_ray_process = LightNode, start
    try:
        yield
    finally:
        module.Node, services.start_ray_process = Node, start_process


def _raylet_command(command: Sequence[str], num_actors: int, with_agents: bool) -> list[str]:
    """Ray's command of a raylet, for a light session."""
    replaced = {"--num_prestart_python_workers": str(num_actors), "--maximum_startup_concurrency": str(_AT_ONCE)}
    if not with_agents:
        idle = subprocess.list2cmdline([sys.executable, "-I", "-S", _script("ray_idle.py")])
        replaced |= {"--dashboard_agent_command": idle, "--runtime_env_agent_command": idle}
    split = [word.partition("=") for word in command]
    return [f"{name}={replaced.get(name, value)}" if equals else name for name, equals, value in split]


def _script(name: str) -> str:
    return str(Path(__file__).with_name(name))


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
    """Stop Ray if it was started here, and wait until its processes are gone: only then is their memory free."""
    if session.started_here and ray.is_initialized():
        ending = _family(session)
        ray.shutdown()
        _, lasting = psutil.wait_procs(ending, timeout=_END_TIMEOUT_S)
        for process in lasting:  # without Ray's control service they would try to reach it for a minute
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _family(session: RaySession) -> list[psutil.Process]:
    """What ``session`` started and all below it, workers that are ending already included."""
    found = []
    for pid, created in session.processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                found += [process, *process.children(recursive=True)]
    return found


def _children() -> set[tuple[int, float]]:
    """Ray's processes below this one, without workers, which end with their raylet.

    Not all children: a program may have others, which are not ours to end.
    """
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            is_ray = any(f"{os.sep}ray{os.sep}" in word or word.startswith("ray::") for word in words)
            if is_ray and not any(word == "ray::IDLE" or word.endswith("default_worker.py") for word in words):
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
