"""``moray trace plot``: hit rate against budget, and recall of prefetch: Figure 2 of arXiv 2312.17238 on any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from moray.deploy.picture import check_picture, make_figure, write_picture
from moray.deploy.trace_report import ALL_POLICIES, read_traces
from moray.runtime.memory import format_bytes
from moray.runtime.trace.format import Trace
from moray.runtime.trace.recall import recall_by_distance
from moray.runtime.trace.simulate import BELADY, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 16  # of each curve
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: told apart by everybody
_GREY = "#555555"


def run_plot(paths: Sequence[Path], output: Path, console: Console, errors: Console) -> None:
    """Raises TraceError, ConfigError, and InputError without matplotlib."""
    check_picture(output, "-o")
    traces = read_traces(paths, errors)
    recalls = {
        path.stem: recall for path, trace in zip(paths, traces, strict=True) if (recall := recall_by_distance(trace))
    }
    figure = make_figure(11 if recalls else 6.5)
    axes = figure.subplots(1, 2 if recalls else 1, squeeze=False)[0]
    _draw_hits(axes[0], traces)
    if recalls:
        _draw_recall(axes[1], recalls)
    header = traces[0].header
    uses = sum(len(trace.experts_U) for trace in traces)
    figure.suptitle(
        f"{header.family}: {len(header.num_experts)} layers, {sum(header.num_experts)} experts of "
        f"{format_bytes(max(header.shard_bytes))}; {sum(trace.num_steps for trace in traces)} steps, {uses} uses",
        fontsize=11,
    )
    write_picture(figure, output, "-o")
    console.print(f"wrote {output}", highlight=False)


def _draw_hits(axes: Axes, traces: Sequence[Trace]) -> None:
    total = sum(traces[0].header.num_experts)
    slots = sorted({max(1, round(total * point / _POINTS)) for point in range(1, _POINTS + 1)})
    shares = [100 * count / total for count in slots]
    colors = dict(zip(ALL_POLICIES, _COLORS, strict=False)) | {BELADY: _GREY}
    for policy in ALL_POLICIES:
        rates = [100 * simulate(traces, policy, count, bytes_per_s=1.0).hit_rate for count in slots]
        line = "--" if policy == BELADY else "-"
        axes.plot(shares, rates, line, marker="o", markersize=3, color=colors[policy], label=policy)
    axes.set(xlabel="budget, % of all experts", ylabel="hit rate, %", xlim=(0, 101), ylim=(0, 101))
    axes.set_title("Cache", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _draw_recall(axes: Axes, recalls: dict[str, dict[int, float]]) -> None:
    for (name, recall), color in zip(recalls.items(), _COLORS * len(recalls), strict=False):
        percent = [100 * value for value in recall.values()]
        axes.plot(list(recall), percent, marker="o", color=color, label=name)
    distances = sorted({distance for recall in recalls.values() for distance in recall})
    axes.set(xlabel="layers ahead", ylabel="recall, % of used experts", ylim=(0, 101), xticks=distances)
    axes.set_title("Prefetch from the next layers' routers", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
