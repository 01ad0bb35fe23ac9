"""The picture of ``moray bench serve``: how long first tokens and tokens took, and when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moray.deploy.bench.serve import ServeReport
from moray.deploy.picture import make_figure, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST, _TOKEN, _ERROR = "#0072B2", "#009E73", "#D55E00"  # Okabe and Ito: told apart by everybody


def plot_report(report: ServeReport, output: Path) -> None:
    """Write a PNG. Raises ConfigError if the file cannot be written."""
    figure = make_figure(11)
    shares, timeline = figure.subplots(1, 2)
    _draw_shares(shares, report)
    _draw_timeline(timeline, report)
    rate = report.output_tokens / report.duration_s
    figure.suptitle(
        f"{report.model}: {report.load.rate:g} requests/s, {len(report.good)} of {len(report.answers)} answered, "
        f"{rate:.1f} tokens/s",
        fontsize=11,
    )
    write_picture(figure, output, "--plot")


def _draw_shares(axes: Axes, report: ServeReport) -> None:
    """Shares of requests, and of gaps between pieces, that took at most so long."""
    good = report.good
    gaps = [gap for answer in good for gap in answer.gaps_s]
    for seconds, color, label in (
        ([answer.first_s for answer in good], _FIRST, "first token, of requests"),
        (gaps, _TOKEN, "gap between pieces, of gaps"),
    ):
        if seconds:
            values = 1e3 * np.sort(seconds)
            axes.step(values, 100 * np.arange(1, len(values) + 1) / len(values), where="post", color=color, label=label)
    axes.set(xlabel="at most, ms", ylabel="share, %", xscale="log", ylim=(0, 101))
    axes.grid(alpha=0.3)
    if good:
        axes.legend(loc="upper left")


def _draw_timeline(axes: Axes, report: ServeReport) -> None:
    """Seconds to the first token and to the end, by arrival: a server that falls behind goes up to the right."""
    start, good = report.start_s, report.good
    arrivals = [answer.arrived_s - start for answer in good]
    axes.plot(arrivals, [answer.first_s for answer in good], ".", color=_FIRST, label="to the first token")
    ends = [answer.ended_s - answer.arrived_s for answer in good]
    axes.plot(arrivals, ends, ".", color=_TOKEN, label="to the end")
    failed = [answer for answer in report.answers if answer.error is not None]
    if failed:
        due, lasted = zip(*((f.arrived_s - start, f.ended_s - f.arrived_s) for f in failed), strict=True)
        axes.plot(due, lasted, "x", color=_ERROR, label="to an error")
    axes.set(xlabel="arrival, s", ylabel="s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
