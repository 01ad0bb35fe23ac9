"""What peer_capped.py measured under one cap, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from capped import Memory
from common import print_table
from peer_report import Phase

from moray.runtime.memory import format_bytes

SIDES = ("moray", "llama.cpp")


@dataclass(frozen=True)
class Request:
    """A measured request: its phase, its first token id, tokens/s, and others' share of the CPU time."""

    phase: str
    first_id: int
    rate: float
    others: float


@dataclass(frozen=True)
class Cold:
    """The first request of a turn."""

    prompt_tokens: int
    start_s: float
    first_s: float


@dataclass(frozen=True)
class Turn:
    """One side from start to end. ``memory``: of llama.cpp, arena is the page cache that it holds."""

    side: str
    cold: Cold
    requests: list[Request]
    memory: Memory
    remarks: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """Everything measured under one cap. ``needed_bytes``: of each turn's cold request."""

    routing: str
    cap: int | None
    phases: tuple[Phase, ...]
    bandwidth: float  # raw, bytes/s
    needed_bytes: list[int]
    turns: list[Turn]

    def of(self, side: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.side == side]

    def rates(self, side: str, phase: str) -> list[float]:
        """In the order of prompts, which is the same for both sides."""
        return [request.rate for turn in self.of(side) for request in turn.requests if request.phase == phase]


def print_outcome(outcome: Outcome) -> None:
    cap = "none" if outcome.cap is None else format_bytes(outcome.cap)
    print(f"\n## cap {cap}, routing {outcome.routing}, raw bandwidth {outcome.bandwidth / 1e9:.2f} GB/s\n")
    _print_rates(outcome)
    print()
    _print_cold(outcome)
    print()
    _print_memory(outcome)
    for side in SIDES:
        for name, value in outcome.of(side)[-1].remarks.items():
            print(f"    {side}, {name}: {value}")


def _print_rates(outcome: Outcome) -> None:
    rows = []
    for phase in outcome.phases:
        ours, theirs = (outcome.rates(side, phase.name) for side in SIDES)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        others = [r.others for turn in outcome.turns for r in turn.requests if r.phase == phase.name]
        cells = [f"{median(ours):.2f}", f"{median(theirs):.2f}", *_ratio(ratios), f"{len(ratios)}"]
        rows.append((phase.name, *cells, f"{median(others):.0%}"))
    print_table(("tokens/s, medians", *SIDES, "moray / llama.cpp", "lowest-highest", "pairs", "others"), rows)


def _print_cold(outcome: Outcome) -> None:
    rows = []
    for tokens in sorted({turn.cold.prompt_tokens for turn in outcome.turns}):
        for side in SIDES:
            pairs = [
                (turn.cold, needed)
                for turn, needed in zip(outcome.of(side), outcome.needed_bytes, strict=True)
                if turn.cold.prompt_tokens == tokens
            ]
            start, first = (median(getattr(cold, name) for cold, _ in pairs) for name in ("start_s", "first_s"))
            needed = median(needed for _, needed in pairs)
            reading = needed / outcome.bandwidth
            cells = [f"{start:.2f}", f"{first:.2f}", f"{start + first:.2f}", format_bytes(needed), f"{reading:.2f}"]
            rows.append((f"{side}, prompt of {tokens}", *cells, f"{1.2 * reading + 5:.2f}"))
    header = ("cold start, s, medians", "start", "first token", "= both", "bytes needed", "/ raw bandwidth")
    print_table((*header, "x 1.2 + 5 s"), rows)


def _print_memory(outcome: Outcome) -> None:
    rows = []
    for side in SIDES:
        memories = [turn.memory for turn in outcome.of(side)]
        sizes = [max(getattr(memory, name) for memory in memories) for name in ("arena", "trunk", "other")]
        weights = max(memory.arena + memory.trunk for memory in memories)
        rows.append((side, *(format_bytes(size) for size in (*sizes[:2], weights, sizes[2]))))
    print_table(("memory at the end, largest", "arena or page cache", "trunk", "= weights", "other"), rows)


def _ratio(ratios: Sequence[float]) -> tuple[str, str]:
    return f"{median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"
