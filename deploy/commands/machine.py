"""``moray plan`` and ``moray doctor``: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import JsonOption, StoreArgument, command, console

top = typer.Typer()


@command(top, "moray plan ./mixtral-hqq4 --node desk,memory=28GiB,cores=8 --node den,memory=14GiB --link 1Gbit/0.2ms")
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(help="A store, a checkpoint, or a config.json alone; none: the demonstration model."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Of what is not a store yet; as in `moray convert`.")] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help="NAME,memory=16GiB,cores=4[,compute=30GB/s,prompts=200GB/s,disk=2GB/s]; the first computes."),
    ] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="[NAME=]1Gbit/0.2ms: to that node or to all, and the round trip.")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="YAML file that describes nodes and links.")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a running Ray cluster, to measure.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; none: as many as fit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a cluster, or this machine, for a model: who holds which experts, what fits, tokens a second.

    Nothing is loaded or converted. Without nodes this machine is measured.
    """
    from moray.deploy.plan_report import run_plan

    run_plan(model, recipe, node or [], link or [], cluster, address, context, console, as_json=as_json)


@command(top, "moray doctor ./mixtral-hqq4")
def doctor(store: StoreArgument = None, as_json: JsonOption = False) -> None:
    """Check this machine: what is wrong and what to do about it. Exits with 1 if anything is."""
    from moray.deploy.terminal import run_doctor

    if not run_doctor(store, console, as_json=as_json):
        raise typer.Exit(1)
