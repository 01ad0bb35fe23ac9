"""``moray serve``: Ray, the engine and the server on this machine, until told to stop."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from moray.actors.calls import call
from moray.actors.guard import Owner
from moray.actors.spawn import find_kept, keep
from moray.cluster import ray_session
from moray.deploy.first_use import compile_for
from moray.deploy.serving.args import ServeArgs
from moray.deploy.serving.keeper import KEEPER, EngineKeeper
from moray.deploy.serving.keys import KeyFile
from moray.deploy.serving.observer import open_log
from moray.runtime.errors import ClusterError, ConfigError

_APPLICATION = "moray"


def run_server(args: ServeArgs, host: str, port: int, console: Console) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for requests that run. Raises MorayError."""
    _check_arguments(args, host, port)
    open_log(args.request_log)
    if args.device != "cuda":
        compile_for(args.engine.store_path, "float" if args.numerics == "float" else "int8", console)
    with serving(args, host, port, console):
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        console.print(f"serving {args.served_name} at {url}; Ctrl-C ends it", highlight=False, soft_wrap=True)
        console.print(f"metrics at {_metrics_url()}", highlight=False, soft_wrap=True)
        _wait_for_signal()
        console.print("ending: no new requests, running ones may end", highlight=False)


@contextmanager
def serving(args: ServeArgs, host: str, port: int, console: Console) -> Iterator[None]:
    """A server that answers, on a Ray of its own if this process has none; nothing of it is left afterwards."""
    with console.status("Starting Ray, the engine and the server..."):
        session = ray_session.start_local(args.engine.num_threads, with_agents=True)
    try:
        with console.status("Starting the engine and the server..."):
            owner = Owner(os.getpid(), session.processes) if session.started_here else None
            keeper = keep(EngineKeeper, KEEPER, args.linger_s, owner)
            call(keeper.ensure, args.engine, args.linger_s)  # first, and from here: its errors are ours
            _start(args, host, port)
        yield
    finally:
        _stop(whole_serve=not session.started_here)
        ray_session.leave(session)


def _start(args: ServeArgs, host: str, port: int) -> None:
    from ray import serve

    from moray.deploy.app import build

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import has set another
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        serve.run(build(args), name=_APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(f"Ray Serve did not start the server ({first}); run `moray doctor`") from error


def _stop(*, whole_serve: bool) -> None:
    """Let running requests end, then end the engine. ``whole_serve``: and Serve, in a Ray that lives on."""
    from ray import serve

    serve.delete(_APPLICATION)
    if whole_serve:
        serve.shutdown()
    keeper = find_kept(KEEPER)
    if keeper is not None:
        call(keeper.stop)


def _metrics_url() -> str:
    """Where Ray's agent of this node exports metrics."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == own)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _check_arguments(args: ServeArgs, host: str, port: int) -> None:
    """What would be found out only after the engine has started. Raises ConfigError."""
    if args.nodes:
        raise ConfigError("nodes are of a cluster, and `moray serve` has none; use `serve run` there (README, Serving)")
    if args.api_keys is not None:
        KeyFile(args.api_keys)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"nothing can listen at {host}:{port} ({error.strerror}); give another --port") from error
    if args.api_keys is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"--host is {host}, which other machines reach, and there are no API keys; make some with `moray api-keys "
            "add FILE NAME` and give --api-keys FILE, or listen on 127.0.0.1"
        )


def _wait_for_signal() -> None:
    """Until the first SIGINT or SIGTERM. The next one interrupts what follows."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    told.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
