"""The command line: ``moray COMMAND --help`` shows an example for each.

Errors of the user's are one line on stderr and exit code 2; of the cluster's, exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from moray.deploy.cluster_commands import make_cluster_app
from moray.deploy.engine_options import EngineFlags, HostsOption, ThreadsOption, takes_engine
from moray.deploy.hub_commands import stay_offline, store_of_model
from moray.deploy.trace_commands import make_trace_app
from moray.runtime.errors import InputError, MorayError

app = typer.Typer(
    help="Run Mixture-of-Experts language models on Ray, their experts in shared memory beside the compute process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure kernels against this machine's memory, engines, servers.", no_args_is_help=True)
app.add_typer(bench, name="bench")
store_tools = typer.Typer(help="Check, rewrite and compare stores.", no_args_is_help=True)
app.add_typer(store_tools, name="store")
key_tools = typer.Typer(help="API keys of `moray serve`.", no_args_is_help=True)
app.add_typer(key_tools, name="api-keys")
console = Console()
errors = Console(stderr=True, soft_wrap=True)

StoreArgument = Annotated[
    Path | None,
    typer.Argument(help="A store made by `moray convert`; none: the embedded demonstration model."),
]
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
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub; none: main.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def command(
    example: str, name: str | None = None, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors are one line, with an example under its help. ``name``: if not the function's."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                stay_offline(kwargs)
                function(*args, **kwargs)
            except InputError as error:
                _fail(error, 2)
            except MorayError as error:
                _fail(error, 1)
            except KeyboardInterrupt:
                errors.print("stopped")
                raise typer.Exit(130) from None

        group.command(name, epilog=f"Example: {example}")(run)
        return function

    return register


def _fail(error: Exception, code: int) -> None:
    errors.print(f"error: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(code) from None


app.add_typer(make_cluster_app(command, console), name="cluster")
app.add_typer(make_trace_app(command, console, errors), name="trace")


# -------------------------------------------------------------------------------------- stores


@command("moray convert ./Mixtral-8x7B-v0.1 ./mixtral-hqq4 --recipe experts=hqq3,attention=hqq4:64")
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A local Hugging Face checkpoint (safetensors, 16 or 32 bits), or ORG/NAME on the hub."),
    ],
    store: Annotated[Path, typer.Argument(help="The directory to make.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="One scheme for experts and attention, or COMPONENT=SCHEME,... Components: experts, attention, "
            "shared, dense, embeddings. Schemes: none, hqq8, hqq4, hqq3, hqq2, each with :GROUP, all but hqq8 also "
            "with :GROUP:s8 (second-level scales); keep: codes of a pre-quantized checkpoint as published. "
            "Or a whole recipe: paper-4bit, paper-3bit, paper-2bit."
        ),
    ] = "hqq4",
    lora: Annotated[
        list[Path] | None, typer.Option(help="A PEFT LoRA adapter to merge; may be given again, merged in this order.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that quantize; none: one for each core.")] = None,
    revision: RevisionOption = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Of a hub's model: delete each file when it is converted, keep no checkpoint."),
    ] = False,
) -> None:
    """Convert a checkpoint into a store. Run again after an interruption, it resumes."""
    from moray.deploy.store_commands import convert_store

    convert_store(checkpoint, store, recipe, workers, console, lora=lora or [], revision=revision, stream=stream)


@command("moray info ./mixtral-hqq4 --verify")
def info(
    store: StoreArgument = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds."""
    from moray.deploy.store_commands import show_store

    show_store(store, verify=verify, as_json=as_json, console=console)


@command("moray families --json")
def families(as_json: JsonOption = False) -> None:
    """List the model families that can be converted and run, found in the installed transformers."""
    from moray.runtime.model.lean_imports import import_lean

    import_lean()
    from moray.deploy.families import show_families

    show_families(as_json=as_json, console=console)


@command("moray store verify ./mixtral-hqq4", "verify", store_tools)
def store_verify(store: Annotated[Path, typer.Argument(help="A store.")], as_json: JsonOption = False) -> None:
    """Read every byte; say what is damaged and what repairs it. Exits with 2 if anything is."""
    from moray.deploy.store_tools import verify_store

    verify_store(store, console, as_json=as_json)


@command("moray store repack ./mixtral-hqq4 /mnt/mixtral-hqq4 --file-size 4GiB", "repack", store_tools)
def store_repack(
    store: Annotated[Path, typer.Argument(help="A store.")],
    target: Annotated[
        Path | None, typer.Argument(help="A new directory; none: only the format, the receipt and left-over files.")
    ] = None,
    file_size: Annotated[
        str | None, typer.Option(help="Most bytes of a file of experts, e.g. 4GiB; none: one file a MoE layer.")
    ] = None,
) -> None:
    """Write a store in the present format, or into other files. No weight is changed."""
    from moray.deploy.store_tools import repack_store

    repack_store(store, target, file_size, console)


@command("moray store sync 192.168.1.10:7420 ./mixtral-hqq4 --part 1/2 --keys ./moray.keys", "sync", store_tools)
def store_sync(
    source: Annotated[str, typer.Argument(help="A store's directory, or HOST:PORT of a `moray store serve`.")],
    store: Annotated[Path, typer.Argument(help="The directory to make or to complete.")],
    experts: Annotated[Path | None, typer.Option(help="Only these: a JSON file, a list of [layer, expert].")] = None,
    layers: Annotated[str | None, typer.Option(help="Only those of these MoE layers, e.g. 0-15,20.")] = None,
    part: Annotated[str | None, typer.Option(help="Only i/n of each layer's, e.g. 1/2.")] = None,
    keys: Annotated[Path | None, typer.Option(help="The key file that the serving side has too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and bring nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring what a store lacks or has damaged, all or a part of it. Run again after an interruption, it resumes.

    Every byte is checked, of what comes and of what is there; nothing is deleted. A store with a part of its experts
    works where other hosts have the rest.
    """
    from moray.deploy.store_sync import selection, sync_stores

    wanted = selection(experts, layers, part)
    sync_stores(source, store, wanted, keys, console, dry_run=dry_run, as_json=as_json)


@command("moray store serve ./mixtral-hqq4 --listen 192.168.1.10:7420 --keys ./moray.keys", "serve", store_tools)
def store_serve(
    store: Annotated[Path, typer.Argument(help="A store, whole or a part of one.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT of this machine.")],
    keys: Annotated[Path, typer.Option(help="A key file; who has a copy of it may read the store, encrypted.")],
) -> None:
    """Let other machines copy a store with `moray store sync`, until Ctrl-C."""
    from moray.deploy.store_sync import serve_store

    serve_store(store, listen, keys, console)


@command("moray store diff ./mixtral-hqq4 ./mixtral-none", "diff", store_tools)
def store_diff(
    store: Annotated[Path, typer.Argument(help="A store.")],
    other: Annotated[Path, typer.Argument(help="A store to compare with it.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two stores: what they were made from, and their weights. Exits with 1 if weights differ."""
    from moray.deploy.store_tools import diff_stores

    if not diff_stores(store, other, console, as_json=as_json).is_empty:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------- generation


@command("moray generate 'import os' --max-new-tokens 60")
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


@command("moray chat --store ./mixtral-instruct-hqq4 --temperature 0.7")
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


@command("moray demo --hosts 3")
def demo(hosts: HostsOption = 2, max_new_tokens: MaxTokensOption = 120) -> None:
    """Stream text from the embedded model through real Ray actors, then print one summary."""
    from moray.deploy.config import make_config
    from moray.deploy.terminal import run_demo

    run_demo(make_config({"hosts": hosts}), max_new_tokens, console)


# -------------------------------------------------------------------------------------- serving


@command("moray serve ./mixtral-hqq4 --port 8000")
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


@command("moray api-keys add keys.txt alice", "add", key_tools)
def api_keys_add(
    file: Annotated[Path, typer.Argument(help="File of names and hashes; made if there is none.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
) -> None:
    """Make a key and print it: it is kept nowhere, only its hash is."""
    from moray.deploy.serving.keys import add_key

    console.print(add_key(file, name), highlight=False, soft_wrap=True)


@command("moray api-keys list keys.txt", "list", key_tools)
def api_keys_list(file: Annotated[Path, typer.Argument(help="File of names and hashes.")]) -> None:
    """List whose keys there are."""
    from moray.deploy.serving.keys import read_keys

    for name in read_keys(file):
        console.print(name, markup=False, highlight=False)


@command("moray api-keys remove keys.txt alice", "remove", key_tools)
def api_keys_remove(
    file: Annotated[Path, typer.Argument(help="File of names and hashes.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
) -> None:
    """Remove a key: running servers refuse it from the next request on."""
    from moray.deploy.serving.keys import remove_key

    remove_key(file, name)


# ----------------------------------------------------------------------------------- evaluation


@command("moray eval ./mixtral-hqq4 ./mixtral-q3 --text book.txt --reference ./mixtral-none", "eval")
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


# ------------------------------------------------------------------------------------- machine


@command("moray bench kernels --encodings q4,q4:64:u8 --threads 2", "kernels", bench)
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


@command("moray bench decode ./mixtral-hqq4 --repeat 5", "decode", bench)
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


@command("moray bench serve http://127.0.0.1:8000/v1 --rate 2 --seconds 60 --plot load.png", "serve", bench)
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


@command("moray plan ./mixtral-hqq4 --node desk,memory=28GiB,cores=8 --node den,memory=14GiB --link 1Gbit/0.2ms")
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


@command("moray doctor ./mixtral-hqq4")
def doctor(store: StoreArgument = None, as_json: JsonOption = False) -> None:
    """Check this machine: what is wrong and what to do about it. Exits with 1 if anything is."""
    from moray.deploy.terminal import run_doctor

    if not run_doctor(store, console, as_json=as_json):
        raise typer.Exit(1)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
