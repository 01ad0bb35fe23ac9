"""``moray bench`` and ``moray eval``: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moray.deploy.commands.registry import JsonOption, StoreArgument, command, console
from moray.deploy.engine_options import EngineFlags, ThreadsOption, takes_engine

top = typer.Typer()
bench = typer.Typer(help="Measure kernels against this machine's memory, engines, servers.", no_args_is_help=True)


@command(top, "moray eval ./mixtral-hqq4 ./mixtral-q3 --text book.txt --reference ./mixtral-none", "eval")
@takes_engine()
def evaluate(
    text: Annotated[list[Path], typer.Option(help="A file of UTF-8 text; may be given again.")],
    stores: Annotated[
        list[Path] | None,
        typer.Argument(metavar="STORE", help="Stores to evaluate; none: the embedded demonstration model."),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="A store to compare with, such as one of recipe none.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Evaluate only so many first tokens of all texts.")] = None,
    as_json: JsonOption = False,
    *,
    engine: EngineFlags,
) -> None:
    """Measure perplexity on text, and agreement with a reference store.

    Texts are cut into windows without overlap; a shorter last window counts if it has at least 2 tokens.

    Each window is one forward pass of its own; its first token is context only, its others are predicted.

    Perplexity: exp of the mean negative log-likelihood (NLL, nats) of the predicted tokens.

    Same top: the share of predicted positions whose most likely token is the reference's.

    KL: mean KL(reference || store) in nats, over the reference's 64 most likely tokens and one bucket for the rest.

    All stores must have one tokenizer. They are evaluated one after the other, the reference first.
    """
    from moray.deploy.evaluate import run_eval

    settings = engine.settings(None)
    paths = stores or [settings.store_path]
    run_eval(settings, paths, text, reference, window, max_tokens, console, as_json=as_json)


@command(bench, "moray bench kernels --encodings q4,q4:64:u8 --threads 2", "kernels")
def bench_kernels(
    encodings: Annotated[
        str | None,
        typer.Option(
            help="ENCODING:GROUP:META,... (docs/format.md), e.g. q8,q4:32,q3:64:u8,bf16; none: the usual ones."
        ),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Of one matrix, ROWSxCOLUMNS; none: 14336x4096.")] = None,
    threads: ThreadsOption = None,
    working_set: Annotated[
        str | None, typer.Option(help="At least so much memory is read in turn, e.g. 1GiB; none: 512MB.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="How often everything is measured, in turns; none: 5.")] = None,
    numerics: Annotated[str, typer.Option(help="int8 or float (docs/format.md).")] = "int8",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run? Its numbers mean nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the kernels against the bandwidth of this machine's memory and against torch."""
    from moray.deploy.bench.options import DEFAULT_ENCODINGS, make_options
    from moray.runtime.cpu import usable_cores

    num_threads = usable_cores() if threads is None else threads
    options = make_options(encodings or DEFAULT_ENCODINGS, shape, num_threads, working_set, pairs, numerics, quick)
    from moray.deploy.bench.kernels_report import run_kernels

    run_kernels(options, console, skip_unsupported=encodings is None, as_json=as_json)


@command(bench, "moray bench decode ./mixtral-hqq4 --repeat 5", "decode")
@takes_engine("address")
def bench_decode(
    store: StoreArgument = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens before those that are decoded.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode in each repeat.")] = 64,
    repeat: Annotated[int, typer.Option(help="How often everything is measured, in turns.")] = 5,
    as_json: JsonOption = False,
    *,
    engine: EngineFlags,
) -> None:
    """Measure an engine on a store: tokens a second, time by part, bytes against the memory's bandwidth, idle CPU."""
    settings = engine.settings(store)
    from moray.deploy.bench.decode_report import run_decode

    run_decode(settings, prompt_tokens, new_tokens, repeat, console, as_json=as_json)


@command(bench, "moray bench serve http://127.0.0.1:8000/v1 --rate 2 --seconds 60 --plot load.png", "serve")
def bench_serve(
    url: Annotated[str, typer.Argument(help="Of any OpenAI-compatible server; without a path: /v1.")],
    rate: Annotated[float, typer.Option(help="Requests a second, in the mean.")] = 1.0,
    requests: Annotated[int | None, typer.Option(help="How many requests; or give --seconds.")] = None,
    seconds: Annotated[float | None, typer.Option(help="For how long requests arrive.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt, about.")] = 256,
    output_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Ask chat/completions, not completions.")] = False,
    model: Annotated[str | None, typer.Option(help="The model's name there; none: the first it lists.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is an error.")] = 600.0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG) to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an OpenAI-compatible server under load: tokens a second, first-token and per-token times, errors.

    Requests arrive at random times, whether or not the server has answered those before.
    """
    from moray.deploy.bench.serve import Load
    from moray.deploy.bench.serve_report import run_serve

    api: Literal["chat", "completions"] = "chat" if chat else "completions"
    load = Load(url, api, model, rate, requests, seconds, prompt_tokens, output_tokens, seed, timeout)
    run_serve(load, api_key, plot, console, as_json=as_json)
