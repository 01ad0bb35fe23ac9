"""What ``moray trace replay`` prints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.runtime.errors import ConfigError
from moray.runtime.memory import format_bytes
from moray.runtime.planning.sizes import parse_bytes
from moray.runtime.residency.policies import POLICIES
from moray.runtime.trace.format import Trace, TraceHeader, read_trace
from moray.runtime.trace.recall import recall_by_distance
from moray.runtime.trace.simulate import BELADY, Outcome, check_alike, simulate

DEFAULT_BUDGETS = ("25%", "40%", "60%", "80%")
ALL_POLICIES = (*POLICIES, BELADY)
NOTES = (
    "hit rate: of all uses of an expert by a layer call, the share that found it in memory; memory is empty at first",
    "belady: the bound of all policies: it evicts what the trace needs again last",
    "foreseen: of the misses, the share that the layer before predicted: a prefetch hides no more of the disk's time; "
    "needless: what it would read in vain for that, of all that it would read",
    "time: sum over layer calls of the larger of loading (bytes / disk bandwidth) and the recorded computing of "
    "experts, to the sum of both; without what else a model computes",
)


def run_replay(
    paths: Sequence[Path],
    budgets: Sequence[str],
    policies: Sequence[str],
    bandwidth: str,
    console: Console,
    errors: Console,
    *,
    as_json: bool,
) -> None:
    """Raises TraceError, ConfigError."""
    traces = read_traces(paths, errors)
    header, bytes_per_s = traces[0].header, parse_bytes(bandwidth, option="--bandwidth")
    texts = list(budgets or DEFAULT_BUDGETS)
    slots = [parse_budget(text, header) for text in texts]
    if unknown := set(policies) - set(ALL_POLICIES):
        raise ConfigError(f"--policy is {unknown.pop()!r}, expected one of {', '.join(ALL_POLICIES)}")
    outcomes = [
        (text, simulate(traces, policy, num_slots, bytes_per_s))
        for text, num_slots in zip(texts, slots, strict=True)
        for policy in policies or ALL_POLICIES
    ]
    if as_json:
        console.print_json(json.dumps(_document(paths, traces, outcomes, bytes_per_s)))
    else:
        _print(paths, traces, outcomes, bytes_per_s, console)


def read_traces(paths: Sequence[Path], errors: Console) -> list[Trace]:
    """Traces of one model; what is missing at the end of a file is said. Raises TraceError."""
    traces = [read_trace(path) for path in paths]
    check_alike(traces)
    for path, trace in zip(paths, traces, strict=True):
        if trace.torn_bytes:
            errors.print(
                f"{path}: the last {trace.torn_bytes} bytes are of a record that was not written whole; left out",
                highlight=False,
            )
    return traces


def parse_budget(text: str, header: TraceHeader) -> int:
    """``3GiB``, ``40%`` or ``12 slots`` in slots, no more than there are experts. Raises ConfigError."""
    num_experts, slot_bytes = sum(header.num_experts), max(header.shard_bytes)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) *%", text.strip(), re.ASCII):
        slots = int(float(match[1]) / 100 * num_experts)
    elif match := re.fullmatch(r"(\d+) *slots?", text.strip(), re.ASCII):
        slots = int(match[1])
    else:
        slots = parse_bytes(text, option="--budget") // max(slot_bytes, 1)
    if not slots:
        raise ConfigError(
            f"--budget {text} holds no expert; one takes {format_bytes(slot_bytes)}, "
            f"all {num_experts} take {format_bytes(num_experts * slot_bytes)}"
        )
    return min(slots, num_experts)


def recorded_hit_rate(trace: Trace) -> float:
    """As it was when the trace was recorded."""
    return 1 - float(trace.missed_U.mean()) if len(trace.missed_U) else 0.0


def _document(
    paths: Sequence[Path], traces: Sequence[Trace], outcomes: Sequence[tuple[str, Outcome]], bytes_per_s: int
) -> dict[str, Any]:
    return {
        "traces": [
            {
                "path": str(path),
                **{key: value for key, value in trace.header.encode().items() if key not in ("kind", "format")},
                "steps": trace.num_steps,
                "layer_calls": len(trace.layers_C),
                "uses": len(trace.experts_U),
                "recorded_hit_rate": recorded_hit_rate(trace),
                "recall_by_distance": recall_by_distance(trace),
                "torn_bytes": trace.torn_bytes,
            }
            for path, trace in zip(paths, traces, strict=True)
        ],
        "bytes_per_s": bytes_per_s,
        "outcomes": [{"budget": text, **asdict(outcome), "hit_rate": outcome.hit_rate} for text, outcome in outcomes],
        "notes": NOTES,
    }


def _print(
    paths: Sequence[Path],
    traces: Sequence[Trace],
    outcomes: Sequence[tuple[str, Outcome]],
    bytes_per_s: int,
    console: Console,
) -> None:
    for path, trace in zip(paths, traces, strict=True):
        console.print(_describe(path, trace), highlight=False, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("budget", "policy", "hit rate", "loaded", "foreseen", "needless", "time, s"):
        table.add_column(title, justify="left" if title in ("budget", "policy") else "right", no_wrap=True)
    shown = ""
    for text, outcome in outcomes:
        budget = f"{text} ({outcome.num_slots} slots)" if not text.endswith("slots") else text
        times = f"{outcome.overlapped_s:.2f}-{outcome.serial_s:.2f}"
        rate, loaded = f"{100 * outcome.hit_rate:.1f} %", format_bytes(outcome.loaded_bytes)
        missed, ahead = outcome.num_uses - outcome.num_hits, outcome.num_foreseen + outcome.num_needless
        shares = [
            f"{100 * part / whole:.0f} %" if ahead and whole else "-"
            for part, whole in ((outcome.num_foreseen, missed), (outcome.num_needless, ahead))
        ]
        table.add_row("" if budget == shown else budget, outcome.policy, rate, loaded, *shares, times)
        shown = budget
    console.print(table, highlight=False)
    for path, trace in zip(paths, traces, strict=True):
        if recall := recall_by_distance(trace):
            values = ", ".join(f"{distance}: {100 * value:.1f} %" for distance, value in recall.items())
            console.print(f"{path.stem}: recall of prefetch by layers ahead {values}", highlight=False, markup=False)
    console.print(f"disk bandwidth: {format_bytes(bytes_per_s)}/s\n" + "\n".join(NOTES), highlight=False)


def _describe(path: Path, trace: Trace) -> str:
    header = trace.header
    prefill = int(trace.is_prefill_C.sum())
    how = (
        "everything resident"
        if header.num_slots is None
        else f"{header.num_slots} slots and policy {header.policy}: {100 * recorded_hit_rate(trace):.1f} % hits"
    )
    return (
        f"{path}: {header.family}, {sum(header.num_experts)} experts in {len(header.num_experts)} layers; "
        f"{trace.num_steps} steps, {len(trace.layers_C)} layer calls ({prefill} of prefill), "
        f"{len(trace.experts_U)} uses; recorded with {how}"
    )
