"""What ``moray bench serve`` prints: one table with its definitions, or one JSON document."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.deploy.bench.serve import PERCENTILES, Load, ServeReport, measure_server
from moray.deploy.bench.serve_plot import plot_report
from moray.deploy.picture import check_picture
from moray.runtime.errors import ClusterError

DEFINITIONS = {
    "load": "requests arrive as a Poisson process of the given rate, whether or not others have ended; prompts are "
    "random words, as many as make the given tokens by the server's own count; greedy, streamed",
    "answered": "requests with HTTP 200, at least one piece of text, and an end of the stream; all figures but late "
    "are of these. Errors are counted by kind",
    "tokens": "as the server's usage says; if it sends none, each piece of text counts as one and prompts as 0",
    "throughput": "tokens of answered requests / seconds from the first arrival to the end of the last answer",
    "first token": "seconds from when the request was due to its first piece of text",
    "gap": "seconds between one piece of text and the next, of all answers",
    "per token": "of one answer: seconds from its first piece to its last / (output tokens - 1)",
    "whole": "seconds from when the request was due to the end of its answer",
    "late": "seconds from when the request was due to when this program sent it: if they matter, it is this program "
    "that is too slow",
}
_ROWS = {
    "first_token_s": "first token",
    "gap_s": "gap",
    "per_token_s": "per token",
    "whole_s": "whole",
    "late_s": "late",
}


def run_serve(load: Load, key: str | None, plot: Path | None, console: Console, *, as_json: bool) -> None:
    """Measure, print, draw. Raises MorayError; ClusterError also if nothing was answered."""
    load.validate()
    if plot is not None:
        check_picture(plot, "--plot")
    progress = Console(stderr=True, quiet=as_json)
    with progress.status(f"asking {load.base_url}"):
        report = asyncio.run(measure_server(load, key))
    if as_json:
        console.print_json(json.dumps(make_document(report)))
    else:
        _print(report, console)
    if plot is not None:
        plot_report(report, plot)
        progress.print(f"wrote {plot}", highlight=False)
    if not report.good:
        detail = next(answer.detail for answer in report.answers if answer.error is not None)
        raise ClusterError(f"none of {len(report.answers)} requests was answered; the first said: {detail}")


def make_document(report: ServeReport) -> dict[str, Any]:
    return {
        "settings": asdict(report.load) | {"url": report.load.base_url, "model": report.model},
        "definitions": DEFINITIONS,
        "requests": len(report.answers),
        "answered": len(report.good),
        "errors": report.errors,
        "seconds": report.duration_s,
        "prompt_tokens": report.prompt_tokens,
        "cached_tokens": report.cached_tokens,
        "output_tokens": report.output_tokens,
        "requests_per_s": len(report.good) / report.duration_s,
        "output_tokens_per_s": report.output_tokens / report.duration_s,
        **{
            name: None if found is None else _distribution(asdict(found))
            for name, found in report.distributions().items()
        },
    }


def _distribution(found: dict[str, Any]) -> dict[str, Any]:
    return {"count": found["count"], "mean": found["mean"]} | {f"p{p}": found["percentiles"][p] for p in PERCENTILES}


def _print(report: ServeReport, console: Console) -> None:
    load, num_good = report.load, len(report.good)
    console.print(
        f"{report.model} at {load.base_url}: {load.rate:g} requests/s of {load.prompt_tokens} prompt and up to "
        f"{load.output_tokens} output tokens, seed {load.seed}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    summary.add_row("answered", f"{num_good} of {len(report.answers)} requests in {report.duration_s:.1f} s")
    for kind, count in report.errors.items():
        summary.add_row("errors", f"{count} x {kind}")
    if num_good:
        summary.add_row(
            "tokens",
            f"{report.prompt_tokens / num_good:.0f} of the prompt ({report.cached_tokens / num_good:.0f} cached) and "
            f"{report.output_tokens / num_good:.0f} of the answer, in the mean",
        )
    summary.add_row(
        "throughput",
        f"{report.output_tokens / report.duration_s:.1f} tokens/s, {num_good / report.duration_s:.2f} requests/s",
    )
    console.print(summary, highlight=False)
    times = Table("ms", "mean", *(f"p{p}" for p in PERCENTILES), box=None, padding=(0, 2, 0, 0))
    for name, found in report.distributions().items():
        if found is not None:
            values = (found.mean, *found.percentiles.values())
            times.add_row(_ROWS[name], *(f"{1e3 * value:.1f}" for value in values))
    console.print(times, highlight=False)
    console.print()
    for name, meaning in DEFINITIONS.items():
        console.print(f"{name}: {meaning}", highlight=False, markup=False, soft_wrap=True)
