"""What ``moray bench kernels`` prints: three tables with their definitions, or one JSON document."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.deploy.bench.kernels import KernelsReport, Prefill, Streamed, measure_kernels
from moray.deploy.bench.options import Coding, KernelsOptions
from moray.deploy.bench.pairs import busy_warning
from moray.runtime.memory import format_bytes

DEFINITIONS = {
    "bytes": "the packed matrices: codes and meta (scales and zeros); activations and outputs are not counted",
    "working set": "distinct matrices (for layers: experts), visited one after the other, each once a pass",
    "reader": "one of two programs (vectors, streams) that only sum all 64-bit words of the same working set, with "
    "as many threads",
    "pair": "one pass of the kernel and one of each reader, or one product of each kind, in turns, 10 ms apart; "
    "medians over pairs",
    "ratio": "batch 1 and layers: the kernel's bytes a second to the faster reader's in the same pair; prefill: the "
    "kernel's GFLOP/s to dequantizing to bfloat16 and torch's bfloat16 product of the same matrix",
    "to GEMM": "the same to torch's bfloat16 product alone, of a matrix that was dequantized before",
    "GFLOP/s": "2 x tokens x rows x columns / seconds; quantizing activations is part of the kernel",
    "layer": "grouping, gate and up, SwiGLU, down and weighted sum of one token's experts, which are others each time",
}


def run_kernels(options: KernelsOptions, console: Console, *, skip_unsupported: bool, as_json: bool) -> None:
    """Measure and print; progress goes to standard error. Raises InputError."""
    report = measure_kernels(options, Console(stderr=True, quiet=as_json), skip_unsupported=skip_unsupported)
    if as_json:
        console.print_json(json.dumps(make_document(report)))
        return
    for line in _heading(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in (_batch_1_table(report), _prefill_table(report), _layers_table(report)):
        console.print()
        console.print(table, highlight=False)
    console.print()
    for name, meaning in DEFINITIONS.items():
        console.print(f"{name}: {meaning}", highlight=False, markup=False, soft_wrap=True)


def make_document(report: KernelsReport) -> dict[str, Any]:
    options = report.options
    return {
        "machine": report.machine | {"pages": report.pages},
        "settings": {
            "shape": [options.rows, options.columns],
            "threads": options.threads,
            "working_set_bytes": options.working_set_bytes,
            "pairs": options.pairs,
            "numerics": options.numerics,
            "quick": options.quick,
        },
        "definitions": DEFINITIONS,
        "reader_variation": report.reader_variation,
        "skipped": [str(coding) for coding in report.skipped],
        "batch_1": [_streamed(result) for result in report.batch_1],
        "prefill": [_prefill(result) for result in report.prefill],
        "layers": [_streamed(result) for result in report.layers],
    }


def verdict(ratio: float, target: float | None) -> str:
    """The target and whether it was met, in words."""
    return "" if target is None else f"{target:g} {'met' if ratio >= target else 'missed'}"


def _coding(coding: Coding) -> dict[str, Any]:
    return {"encoding": coding.encoding, "group": coding.group, "meta": coding.meta if coding.group else None}


def _judged(ratio: float, target: float | None) -> dict[str, Any]:
    return {"target": target, "met": None if target is None else ratio >= target}


def _streamed(result: Streamed) -> dict[str, Any]:
    layer = {} if result.layer is None else {"layer": asdict(result.layer)}
    return (
        layer
        | _coding(result.coding)
        | {
            "working_set_bytes": result.num_bytes,
            "bytes": result.call_bytes,
            "seconds": result.call_s,
            "bytes_per_s": asdict(result.rate),
            "reader_seconds": result.reader_s,
            "reader_bytes_per_s": {name: asdict(rate) for name, rate in result.reader_rates.items()},
            "ratio": asdict(result.ratio),
        }
        | _judged(result.ratio.median, result.target)
    )


def _prefill(result: Prefill) -> dict[str, Any]:
    return (
        _coding(result.coding)
        | {
            "tokens": result.tokens,
            "flop_per_s": asdict(result.rate),
            "dequantized_flop_per_s": asdict(result.dequantized_rate),
            "gemm_flop_per_s": asdict(result.gemm_rate),
            "ratio": asdict(result.ratio),
            "gemm_ratio": asdict(result.gemm_ratio),
        }
        | _judged(result.ratio.median, result.target)
    )


def _heading(report: KernelsReport) -> list[str]:
    options, machine = report.options, report.machine
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, kernels {machine['instruction_set']}, class {options.numerics}, "
        f"{options.threads} threads; load before: {machine['load']}",
        f"memory: {report.pages}; working set at least {format_bytes(options.working_set_bytes)}, "
        f"{options.pairs} pairs",
    ]
    if report.skipped:
        lines.append(f"left out, the kernels do not compute with it: {', '.join(map(str, report.skipped))}")
    cache = machine["last_level_cache_bytes"]
    if cache and options.working_set_bytes < 4 * cache:
        lines.append(
            f"the working set is less than 4 caches of {format_bytes(cache)}: batch 1 says little about memory"
        )
    return lines + busy_warning(report.reader_variation)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _batch_1_table(report: KernelsReport) -> Table:
    title = f"batch 1, {report.options.rows} x {report.options.columns}"
    table = _table(title, "encoding", "ms", "GB/s", "vectors", "streams", "ratio", "lowest", "highest", "target")
    for result in report.batch_1:
        table.add_row(
            str(result.coding),
            f"{1e3 * result.call_s:.3f}",
            f"{result.rate.median / 1e9:.1f}",
            *(f"{rate.median / 1e9:.1f}" for rate in result.reader_rates.values()),
            *(f"{ratio:.2f}" for ratio in (result.ratio.median, result.ratio.low, result.ratio.high)),
            verdict(result.ratio.median, result.target),
        )
    return table


def _prefill_table(report: KernelsReport) -> Table:
    title = f"prefill, {report.options.rows} x {report.options.columns}"
    table = _table(title, "encoding", "tokens", "GFLOP/s", "dequantized", "GEMM", "ratio", "to GEMM", "target")
    for result in report.prefill:
        table.add_row(
            str(result.coding),
            str(result.tokens),
            *(f"{r.median / 1e9:.0f}" for r in (result.rate, result.dequantized_rate, result.gemm_rate)),
            f"{result.ratio.median:.2f}",
            f"{result.gemm_ratio.median:.2f}",
            verdict(result.ratio.median, result.target),
        )
    return table


def _layers_table(report: KernelsReport) -> Table:
    table = _table("a MoE layer, batch 1", "layer", "encoding", "experts", "MB", "us", "reader's us", "ratio")
    for result in report.layers:
        assert result.layer is not None
        table.add_row(
            result.layer.name,
            str(result.coding),
            f"{result.layer.top_k} of {result.layer.num_experts}",
            f"{result.call_bytes / 1e6:.1f}",
            f"{1e6 * result.call_s:.0f}",
            f"{1e6 * result.reader_s:.0f}",
            f"{result.ratio.median:.2f}",
        )
    return table
