"""``moray serve`` and ``moray api-keys``: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import StoreArgument, command, console
from moray.deploy.engine_options import EngineFlags, takes_engine

top = typer.Typer()
keys = typer.Typer(help="API keys of `moray serve`.", no_args_is_help=True)


@command(top, "moray serve ./mixtral-hqq4 --port 8000")
@takes_engine("address")
def serve(
    store: StoreArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys (moray api-keys); none: this machine only.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name; none: the store's directory.")] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Choices generated or waiting at a time, beyond it callers get 429; none: 48.")
    ] = None,
    request_log: Annotated[
        Path | None, typer.Option(help="Append a line of JSON for each request to this file.")
    ] = None,
    max_body: Annotated[str | None, typer.Option(help="Largest body of a request; none: 4MiB.")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a request is ended; none: 3600.")
    ] = None,
    drain: Annotated[
        float | None, typer.Option(help="Seconds that running requests get to end after Ctrl-C; none: 120.")
    ] = None,
    *,
    engine: EngineFlags,
) -> None:
    """Serve a store through an OpenAI-compatible API, until Ctrl-C."""
    limits = {"max_requests": max_requests, "max_body": max_body, "request_timeout_s": request_timeout}
    values = {"store": store, "api_keys": api_keys, "model_name": model_name, "drain_s": drain}
    values["request_log"] = None if request_log is None else request_log.absolute()
    from moray.deploy.serving.args import make_args
    from moray.deploy.serving.command import run_server

    run_server(make_args(engine.values | limits | values, engine.config), host, port, console)


@command(keys, "moray api-keys add keys.txt alice", "add")
def api_keys_add(
    file: Annotated[Path, typer.Argument(help="File of names and hashes; made if there is none.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
) -> None:
    """Make a key and print it: it is kept nowhere, only its hash is."""
    from moray.deploy.serving.keys import add_key

    console.print(add_key(file, name), highlight=False, soft_wrap=True)


@command(keys, "moray api-keys list keys.txt", "list")
def api_keys_list(file: Annotated[Path, typer.Argument(help="File of names and hashes.")]) -> None:
    """List whose keys there are."""
    from moray.deploy.serving.keys import read_keys

    for name in read_keys(file):
        console.print(name, markup=False, highlight=False)


@command(keys, "moray api-keys remove keys.txt alice", "remove")
def api_keys_remove(
    file: Annotated[Path, typer.Argument(help="File of names and hashes.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
) -> None:
    """Remove a key: running servers refuse it from the next request on."""
    from moray.deploy.serving.keys import remove_key

    remove_key(file, name)
