"""What ``moray bench decode`` prints: one table with its definitions, or one JSON document."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.deploy.bench.decode import DecodeReport, measure_decode
from moray.deploy.bench.pairs import Spread, busy_warning
from moray.deploy.config import EngineConfig
from moray.runtime.memory import format_bytes

DEFINITIONS = {
    "prompts": "random token ids, new ones for each repeat; one sequence at a time, greedy; the first round of "
    "everything is not counted",
    "decode": "tokens after the first / seconds from the first to the last in the caller's hands; the prompt was "
    "computed by a request before",
    "prefill": "prompt tokens / seconds from the call to the first token in the caller's hands; nothing of the prompt "
    "was in a kept KV cache",
    "time a token": "of the repeat with the median decode rate. Experts: the kernels of all layers; grouping and "
    "leases: the experts function's own clocks; rest: attention and all else of the trunk, sampling, delivery",
    "bytes a token": "experts: the shards that were used; trunk: every other weight but the input embedding, of which "
    "one row is read; KV cache and activations are not counted",
    "bandwidth": "bytes a token x decode rate",
    "reader": "the faster of two programs that only sum the words of a piece of memory, with as many threads, between "
    "the repeats; ratio: bandwidth to the reader's, repeat by repeat",
    "idle": "CPU time of the engine's processes while no request runs, in percent of one core; the calling process is "
    "not counted",
}


def run_decode(
    config: EngineConfig, prompt_tokens: int, new_tokens: int, repeat: int, console: Console, *, as_json: bool
) -> None:
    """Measure and print; progress goes to standard error. Raises MorayError."""
    report = measure_decode(config, prompt_tokens, new_tokens, repeat, Console(stderr=True, quiet=as_json))
    if as_json:
        console.print_json(json.dumps(make_document(report)))
        return
    for line in _heading(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_table(report), highlight=False)
    console.print()
    for name, meaning in DEFINITIONS.items():
        console.print(f"{name}: {meaning}", highlight=False, markup=False, soft_wrap=True)


def make_document(report: DecodeReport) -> dict[str, Any]:
    cost, ratio = report.cost, report.ratio()
    return {
        "machine": report.machine,
        "settings": {
            "store": str(report.config.store_path),
            "hosts": report.config.num_hosts,
            "threads": report.config.num_threads,
            "device": report.device,
            "numerics": report.numerics,
            "prompt_tokens": report.prompt_tokens,
            "new_tokens": report.new_tokens,
            "repeat": len(report.rounds),
        },
        "definitions": DEFINITIONS,
        "recipe": report.recipe,
        "weight_bytes": report.weight_bytes,
        "start_s": report.start_s,
        "decode_tokens_per_s": asdict(report.decode_rate()),
        "prefill_tokens_per_s": {
            str(tokens): asdict(report.prefill_rate(tokens)) for tokens in report.rounds[0].prefill_rates
        },
        "token": asdict(cost) | {"bytes_per_s": cost.bytes_per_s},
        "reader": {"bytes": report.read_bytes, "bytes_per_s": asdict(report.read_rate())},
        "ratio": None if ratio is None else asdict(ratio),
        "idle_cpu": asdict(report.idle),
    }


def _heading(report: DecodeReport) -> list[str]:
    machine, config = report.machine, report.config
    recipe = ", ".join(f"{component}={scheme}" for component, scheme in report.recipe.items() if scheme != "none")
    store = config.store or "embedded model"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, kernels {machine['instruction_set']}; load before: "
        f"{machine['load']}",
        f"{store}: {recipe or 'none'}, {format_bytes(report.weight_bytes)}; class {report.numerics} on "
        f"{report.device}, {config.num_threads} threads, {config.num_hosts} host(s); {report.prompt_tokens} prompt "
        f"tokens, {len(report.rounds)} repeats of {report.new_tokens} new ones",
    ]
    cache = machine["last_level_cache_bytes"]
    if cache and report.weight_bytes < 4 * cache:
        lines.append(f"all weights are less than 4 caches of {format_bytes(cache)}: they need not come from memory")
    return lines + busy_warning(report.read_rate().variation)


def _table(report: DecodeReport) -> Table:
    cost, ratio, reader = report.cost, report.ratio(), report.read_rate()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("start", f"{report.start_s:.1f} s")
    table.add_row("decode", f"{_rate(report.decode_rate())} tokens/s")
    for tokens in report.rounds[0].prefill_rates:
        table.add_row(f"prefill of {tokens}", f"{_rate(report.prefill_rate(tokens))} tokens/s")
    table.add_row("time a token", f"{1e3 * cost.total_s:.2f} ms")
    for name, seconds in (
        ("experts", cost.kernel_s),
        ("grouping", cost.grouping_s),
        ("leases", cost.leases_s),
        ("rest", cost.rest_s),
    ):
        table.add_row(f"  {name}", f"{1e3 * seconds:.2f} ms, {100 * seconds / cost.total_s:.0f} %")
    table.add_row(
        "bytes a token", f"{format_bytes(cost.expert_bytes)} of experts, {format_bytes(cost.trunk_bytes)} of the trunk"
    )
    table.add_row("bandwidth", f"{cost.bytes_per_s / 1e9:.1f} GB/s")
    if ratio is not None:
        table.add_row(
            "reader", f"{_rate(reader, 1e9)} GB/s of {format_bytes(report.read_bytes)}; ratio {_rate(ratio, digits=2)}"
        )
    idle = report.idle
    table.add_row(
        "idle",
        f"{100 * idle.actors:.1f} % the actors, {100 * idle.ray:.1f} % Ray ({idle.num_processes} processes, "
        f"{idle.seconds:.1f} s)",
    )
    return table


def _rate(spread: Spread, unit: float = 1.0, digits: int = 1) -> str:
    median, low, high = (f"{value / unit:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low} to {high})"
