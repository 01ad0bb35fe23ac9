"""``moray generate``, ``chat`` and ``demo``: the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import JsonOption, RevisionOption, command, console, errors
from moray.deploy.engine_options import EngineFlags, HostsOption, takes_engine
from moray.deploy.hub_commands import store_of_model

top = typer.Typer()

MaxTokensOption = Annotated[int, typer.Option(help="Most tokens to generate.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")]
TopKOption = Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0: all.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="ORG/NAME on the hub; converted the first time, into ~/.cache/moray/stores."),
]
RecipeOption = Annotated[str, typer.Option(help="For --model, as in `moray convert`.")]


@command(top, "moray generate 'import os' --max-new-tokens 60")
@takes_engine()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    store: Annotated[Path | None, typer.Option(help="A store; none: the embedded demonstration model.")] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    recipe: RecipeOption = "hqq4",
    max_new_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given again.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell hits, misses, loads and prefetch afterwards.")] = False,
    as_json: JsonOption = False,
    *,
    engine: EngineFlags,
) -> None:
    """Continue a text, streaming it."""
    from moray.deploy.terminal import run_generate

    text = sys.stdin.read() if prompt == "-" else prompt
    store = store_of_model(store, model, revision, recipe, errors)
    settings = engine.settings(store)
    options = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    run_generate(settings, text, options | {"max_new_tokens": max_new_tokens}, console, stats=stats, as_json=as_json)


@command(top, "moray chat --store ./mixtral-instruct-hqq4 --temperature 0.7")
@takes_engine()
def chat(
    store: Annotated[Path | None, typer.Option(help="A store; none: the embedded demonstration model.")] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    recipe: RecipeOption = "hqq4",
    max_new_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    *,
    engine: EngineFlags,
) -> None:
    """Talk to a model. Earlier turns are not computed again."""
    from moray.deploy.terminal import run_chat

    store = store_of_model(store, model, revision, recipe, errors)
    settings = engine.settings(store)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    run_chat(settings, system, options | {"max_new_tokens": max_new_tokens}, console)


@command(top, "moray demo --hosts 3")
def demo(hosts: HostsOption = 2, max_new_tokens: MaxTokensOption = 120) -> None:
    """Stream text from the embedded model through real Ray actors, then print one summary."""
    from moray.deploy.config import make_config
    from moray.deploy.terminal import run_demo

    run_demo(make_config({"hosts": hosts}), max_new_tokens, console)
