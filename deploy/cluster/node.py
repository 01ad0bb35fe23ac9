"""This machine's node of a Ray cluster: started with `ray start`, recorded, and ended by what was recorded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

import moray
from moray.cluster.node_record import NodeRecord, delete_record, read_record, record_path, token_path, write_record
from moray.deploy.cluster import keeper
from moray.deploy.cluster.keys import check_secret, tls_settings
from moray.runtime.errors import ClusterError, ConfigError
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.store.manifest import NUMERICS_ID

#: What a node tells about itself, for those that join.
VERSION_LABEL, LAYOUT_LABEL, NUMERICS_LABEL = "moray-version", "moray-layout", "moray-numerics"
_OBJECT_STORE_BYTES = 128 << 20  # experts live in arenas
_START_S = 120.0
_STOP_S, _STOP_ALONE_S = 40.0, 3.0  # Ray drains for up to 30 s, also when the head is gone
# A node that is gone is noticed within some seconds, so that it can be used again soon; Ray's defaults take a minute.
# Requests have deadlines of their own, which are shorter.
_HEALTH = {
    "health_check_initial_delay_ms": 3000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


def start_head(
    address: str, port: int, role: str, name: str | None, tls: Path | None, *, has_dashboard: bool = False
) -> NodeRecord:
    """Start a cluster with this machine as its head. Raises ConfigError, ClusterError.

    ``has_dashboard``: Ray's, at 127.0.0.1:8265. `serve deploy` talks to it.
    """
    _refuse_second()
    _check_own(address)
    _check_free(port)
    settings = _settings(tls, address)
    options = [
        "--head",
        f"--port={port}",
        f"--include-dashboard={str(has_dashboard).lower()}",
        f"--system-config={json.dumps(_HEALTH)}",
    ]
    return _start(options, f"{address}:{port}", address, role, name or address, settings)


def start_worker(gcs_address: str, address: str | None, role: str, name: str | None, tls: Path | None) -> NodeRecord:
    """Join this machine to a cluster. Raises ConfigError, ClusterError: also if the head runs other versions."""
    _refuse_second()
    address = address or route_to(gcs_address)
    _check_own(address)
    settings = _settings(tls, address)
    os.environ.update(settings)
    _check_versions(gcs_address)
    return _start([f"--address={gcs_address}"], gcs_address, address, role, name or address, settings)


def stop_node() -> NodeRecord | None:
    """End what was started here, and nothing else. Returns what was recorded; None: nothing was."""
    record = read_record()
    if record is None:
        return None
    first, *others = (_find(pid, created) for pid, created in record.processes)
    if first is not None:
        children = first.children(recursive=True)
        first.terminate()  # it ends Ray's processes, and Ray's end their workers
        psutil.wait_procs([first], _STOP_S if keeper.answers(record.gcs_address) else _STOP_ALONE_S)
        _kill([first, *children])
    _kill([process for process in others if process is not None])
    delete_record()
    return record


def is_alive(record: NodeRecord) -> bool:
    return _find(*record.processes[0]) is not None


def route_to(gcs_address: str) -> str:
    """This machine's address on the way to another. Raises ConfigError."""
    host, _, port = gcs_address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"there is no way to {gcs_address!r} ({error}); give HOST:PORT of the head node") from error


def _start(
    options: Sequence[str], gcs_address: str, address: str, role: str, name: str, settings: dict[str, str]
) -> NodeRecord:
    labels = {
        "role": role,
        VERSION_LABEL: moray.__version__,
        LAYOUT_LABEL: LAYOUT_ID,
        NUMERICS_LABEL: NUMERICS_ID,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    command += [f"--node-ip-address={address}", f"--node-name={name}", "--block", "--disable-usage-stats"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
    command += ["--labels=" + ",".join(f"{key}={value}" for key, value in labels.items())]
    log = record_path().with_name("ray-start.log")
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    if "--head" not in options:  # a node whose head is gone comes back with it
        command = [sys.executable, "-m", keeper.__name__, str(log), gcs_address, *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | quiet | settings,
            start_new_session=True,
        )
    _wait_started(process, log)
    first = psutil.Process(process.pid)
    running = [first, *first.children(recursive=True)]
    processes = tuple((p.pid, p.create_time()) for p in running if p.is_running())
    record = NodeRecord(gcs_address, address, name, role, processes, settings, str(log))
    write_record(record)
    return record


def _wait_started(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if keeper.STARTED in text:
            return
        if process.poll() is not None:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            raise ClusterError(f"Ray did not start here: {lines[-1] if lines else 'it said nothing'}; all of it: {log}")
        time.sleep(0.2)
    process.terminate()
    raise ClusterError(f"Ray did not start here within {_START_S:g} s; what it said: {log}")


def _settings(tls: Path | None, address: str) -> dict[str, str]:
    """Ray's environment on this node. Raises ConfigError for a missing or open token or certificate."""
    token = token_path()
    check_secret(token)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
    return settings | (tls_settings(tls.absolute(), address) if tls is not None else {})


def _check_versions(gcs_address: str) -> None:
    """Raises ClusterError if the head's versions differ from ours, naming both."""
    from moray.cluster import ray_session

    ray_session.prepare_environment(gcs_address)
    nodes = ray_session.nodes_at(gcs_address)
    running = ray_session.versions_at(gcs_address)
    pairs = [("Ray", running["ray"], _ray_version()), ("Python", running["python"], sys.version.split()[0])]
    ours = {VERSION_LABEL: moray.__version__, LAYOUT_LABEL: LAYOUT_ID, NUMERICS_LABEL: NUMERICS_ID}
    for label, here in ours.items():
        for node in nodes:  # plain `ray start` tells nothing: engines check their nodes again
            pairs.append((label.replace("-", " "), node.labels.get(label, here), here))
    for what, theirs, mine in pairs:
        if theirs != mine:
            raise ClusterError(
                f"this machine cannot join {gcs_address}: the cluster runs {what} {theirs}, this machine {mine}; "
                "install the same versions on both (`pip install moray-moe==VERSION` in the same Python)"
            )


def _ray_version() -> str:
    import ray

    return ray.__version__


def _refuse_second() -> None:
    record = read_record()
    if record is not None and is_alive(record):
        raise ConfigError(
            f"this machine is already node {record.name} of the cluster at {record.gcs_address}; "
            "`moray cluster down` ends it"
        )


def _check_own(address: str) -> None:
    """Raises ConfigError: Ray would try for minutes, and name another reason."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise ConfigError(
            f"{address!r} is no IP address of this machine ({error.strerror}); give one that `ip address` shows"
        ) from error


def _check_free(port: int) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            probe.bind(("", port))
    except OSError as error:
        raise ConfigError(
            f"port {port} is not free on this machine ({error.strerror}); give another with --port, "
            "or end what listens there (`ss -ltnp` shows it)"
        ) from error


def _find(pid: int, created: float) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares the time of creation first
    psutil.wait_procs(processes, 5)
