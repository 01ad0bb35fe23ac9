"""``moray trace``: what recorded expert choices say about caches and prefetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moray.deploy.commands.registry import JsonOption, command, console, errors
from moray.deploy.engine_options import EngineFlags, takes_engine
from moray.runtime.errors import ConfigError

TracesArgument = Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Traces of one model.")]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(help="Memory for experts: 3GiB, 40% of all experts, or '12 slots'; may be given again."),
]
PolicyOption = Annotated[
    list[str] | None, typer.Option(help="lru, layer-lru, lfu or belady; may be given again; none: all.")
]
BandwidthOption = Annotated[str, typer.Option(help="What the disk gives a second.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The PNG to write; replaced if it is there.")]


group = typer.Typer(help="Replay and plot recorded expert choices.", no_args_is_help=True)


@command(group, "moray trace record ./mixtral-hqq4 --text book.txt -o book.trace")
@takes_engine("address")
def record(
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write; replaced if it is there.")],
    store: Annotated[Path | None, typer.Argument(help="A store; none: the embedded demonstration model.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file with a prompt; may be given again.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.")] = 256,
    *,
    engine: EngineFlags,
) -> None:
    """Generate after prompts, recording which experts every layer call used, missed and predicted."""
    from moray.deploy.terminal import run_record

    prompts = [*(prompt or []), *(read_text(path) for path in text or [])]
    if not prompts:
        raise ConfigError("there is nothing to record; give a prompt with --prompt or --text")
    run_record(engine.settings(store, trace=output), prompts, max_new_tokens, console)


@command(group, "moray trace replay chat.trace --budget 3GiB --budget 40%")
def replay(
    traces: TracesArgument,
    budget: BudgetOption = None,
    policy: PolicyOption = None,
    bandwidth: BandwidthOption = "2GB",
    as_json: JsonOption = False,
) -> None:
    """Hit rate, bytes and time of every cache policy, and Belady's bound, at budgets of your choice.

    Without --budget: 25, 40, 60 and 80 % of the experts.
    """
    from moray.deploy.trace_report import run_replay

    run_replay(traces, budget or [], policy or [], bandwidth, console, errors, as_json=as_json)


@command(group, "moray trace plot chat.trace -o chat.png")
def plot(traces: TracesArgument, output: OutputOption) -> None:
    """Draw hit rate against budget for every policy, and the recall of prefetch n layers ahead."""
    from moray.deploy.trace_plot import run_plot

    run_plot(traces, output, console, errors)


def read_text(path: Path) -> str:
    """Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
