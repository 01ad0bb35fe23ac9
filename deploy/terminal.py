"""What generation looks like in a terminal: streamed text, one summary, clean interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.deploy.config import EngineConfig
from moray.deploy.engine import Engine
from moray.deploy.first_use import compile_for
from moray.deploy.stats_report import print_stats
from moray.runtime.generation.request import Finished, Message, TokenEvent
from moray.runtime.memory import format_bytes

DEMO_PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def run_generate(
    config: EngineConfig, prompt: str, options: dict[str, Any], console: Console, *, stats: bool, as_json: bool
) -> None:
    with running_engine(config, console, quiet=as_json) as (engine, start_s):
        if as_json:
            completion = engine.generate(prompt, **options)
            document = {"prompt": prompt, "completion": asdict(completion)}
            if stats:
                document["stats"] = asdict(engine.stats())
            console.print_json(json.dumps(document))
            return
        _write(console, prompt, style="dim")
        finished = _stream(engine.stream(prompt, **options), console)
        _summarize(engine, finished, start_s, console)
        if stats:
            print_stats(engine.stats(), console)


def run_demo(config: EngineConfig, max_new_tokens: int, console: Console) -> None:
    with running_engine(config, console) as (engine, start_s):
        _write(console, DEMO_PROMPT, style="dim")
        finished = _stream(engine.stream(DEMO_PROMPT, max_new_tokens=max_new_tokens), console)
        _summarize(engine, finished, start_s, console)


def run_chat(config: EngineConfig, system: str | None, options: dict[str, Any], console: Console) -> None:
    messages = [Message("system", system)] if system else []
    with running_engine(config, console) as (engine, start_s):
        console.print(
            "Empty line, Ctrl-D or Ctrl-C at the prompt: end. Ctrl-C while it answers: stop the answer.",
            highlight=False,
        )
        finished = None
        while line := _read_line(console):
            messages.append(Message("user", line))
            answer: list[TokenEvent] = []
            try:
                finished = _stream(engine.stream(messages, **options), console, answer)
                _report_turn(finished, console)
            except KeyboardInterrupt:
                console.print("\n(stopped)", style="dim", highlight=False)
            text, ids = "".join(event.text for event in answer), tuple(i for event in answer for i in event.token_ids)
            messages.append(Message("assistant", text, ids))
        if finished is not None:
            _summarize(engine, finished, start_s, console)


def run_doctor(store: Path | None, console: Console, *, as_json: bool) -> bool:
    """Print every check as it ends. Returns whether nothing is wrong."""
    from moray.deploy.doctor import run_checks

    checks = []
    for check in run_checks(store):
        checks.append(check)
        if not as_json:
            console.print(f"[{_STYLES[check.status]}]{check.status:8}[/] {check.name:18} ", end="")
            console.print(check.found, markup=False, highlight=False, soft_wrap=True)
            if check.remedy:
                console.print(f"{'':28}-> {check.remedy}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        console.print_json(json.dumps([asdict(check) for check in checks]))
    return all(check.status != "problem" for check in checks)


def run_record(config: EngineConfig, prompts: Sequence[str], max_new_tokens: int, console: Console) -> None:
    """Generate after each prompt, recording every layer call into ``config.trace``."""
    with running_engine(config, console) as (engine, _):
        for prompt in prompts:
            _write(console, prompt, style="dim")
            finished = _stream(engine.stream(prompt, max_new_tokens=max_new_tokens), console)
            _report_turn(finished, console)
    console.print(f"recorded {config.trace}", highlight=False)


@contextmanager
def running_engine(config: EngineConfig, console: Console, quiet: bool = False) -> Iterator[tuple[Engine, float]]:
    """A running engine and the seconds it took to start."""
    started = perf_counter()
    if not quiet and not config.address and config.device != "cuda":
        compile_for(config.store_path, "float" if config.numerics == "float" else "int8", console)
    with console.status(f"Starting Ray and {config.num_hosts} expert host(s)...") if not quiet else nullcontext():
        engine = Engine(config)
    try:
        yield engine, perf_counter() - started
    finally:
        engine.close()


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]you>[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _stream(events: Iterator[TokenEvent], console: Console, seen: list[TokenEvent] | None = None) -> Finished:
    """Write text as it comes; ``seen`` collects the events, even of a stream that is interrupted."""
    finished = None
    for event in events:
        _write(console, event.text)
        if seen is not None:
            seen.append(event)
        finished = event.finished
    console.print()
    assert finished is not None
    return finished


def _write(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _report_turn(finished: Finished, console: Console) -> None:
    usage = finished.usage
    console.print(
        f"({usage.prompt_tokens - usage.cached_tokens} of {usage.prompt_tokens} prompt tokens computed, "
        f"{usage.cached_tokens} kept; {usage.completion_tokens} generated, {finished.reason})",
        style="dim",
        highlight=False,
    )


def _summarize(engine: Engine, finished: Finished, start_s: float, console: Console) -> None:
    usage, timings, actors = finished.usage, finished.timings, engine.actors
    stats = engine.stats()
    experts = stats.experts
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("start", f"{start_s:.1f} s: Ray, {actors.num_actors} actors on {actors.num_nodes} node(s)")
    table.add_row(
        "prefill",
        f"{timings.prefill_rate(usage):.1f} tokens/s, {usage.prompt_tokens - usage.cached_tokens} tokens"
        + (f" ({usage.cached_tokens} more kept from before)" if usage.cached_tokens else ""),
    )
    table.add_row("decode", f"{timings.decode_rate(usage):.1f} tokens/s, {usage.completion_tokens} tokens")
    table.add_row("experts", f"{experts.num_used} of {experts.num_experts} used")
    places = {source.name: source for source in stats.sources}
    for name, num_bytes in experts.bytes_by_source.items():
        place = places[name]
        if not place.num_experts:  # other nodes, of an engine that has none
            continue
        table.add_row(
            f"  {name}",
            f"{format_bytes(num_bytes)} read in place from its {place.tier}, which holds {place.num_experts} experts "
            f"in {format_bytes(place.num_bytes)}",
        )
    console.print()
    console.print(table, highlight=False)
