"""What peer.py measured of one model, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from common import print_table
from geometry import Geometry
from peer_sides import Breakdown, Run
from peer_sizes import ClassSize, total_bits

DISTURBED = 0.1  # a pair, if others took more of the machine's CPU time


@dataclass(frozen=True)
class Phase:
    """What is asked for, and which part of it counts."""

    name: str
    prompt_tokens: int
    count: int

    @property
    def is_decode(self) -> bool:
        return self.count > 1

    @property
    def batch(self) -> int:
        """Tokens in one forward pass."""
        return 1 if self.is_decode else self.prompt_tokens

    def rate(self, run: Run) -> float:
        return (self.count - 1) / run.later_s if self.is_decode else self.prompt_tokens / run.first_s


PHASES = (Phase("decode", 32, 65), Phase("prefill 64", 64, 1), Phase("prefill 512", 512, 1))


@dataclass(frozen=True)
class Pair:
    """Both sides on the same prompt."""

    rates: dict[str, float]  # side -> tokens/s
    idle: dict[str, float]  # side -> CPU time while it waited, of one core
    others: float

    @property
    def ratio(self) -> float:
        """Of moray's rate to llama.cpp's."""
        return self.rates["moray"] / self.rates["llama.cpp"]


@dataclass
class Result:
    """Everything measured of one model."""

    title: str
    geometry: Geometry
    store_sizes: dict[str, ClassSize]
    gguf_sizes: dict[str, ClassSize]
    peer_version: str
    peer_system: str
    peer_log: list[str]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    breakdowns: dict[str, Breakdown] = field(default_factory=dict)
    distinct_tokens: dict[str, float] = field(default_factory=dict)  # side -> share, in decode
    routing: list[tuple[int, float, int]] = field(
        default_factory=list
    )  # layer: least, median, most tokens of an expert


def print_result(result: Result, rounds: int) -> None:
    print(f"\n## {result.title}\n")
    print(f"llama-cpp-python {result.peer_version}; {result.peer_system}")
    print("\n".join(f"    {line}" for line in result.peer_log) + "\n")
    _print_sizes(result)
    print()
    _print_rates(result, rounds)
    print()
    _print_breakdowns(result.breakdowns)
    print("\ndistinct tokens in a greedy decode: " + _join_shares(result.distinct_tokens))
    print("tokens of one expert in a prompt of 512, least/median/most, by layer of moray's: " + _join_routing(result))


def _print_sizes(result: Result) -> None:
    rows = []
    for name, ours in result.store_sizes.items():
        theirs = result.gguf_sizes[name]
        cells = [f"{ours.count:,}"]
        for size in (ours, theirs):
            cells += [size.types, f"{size.num_bytes:,}", f"{size.bits:.3f}"]
        rows.append((name, *cells))
    totals = []
    for sizes in (result.store_sizes, result.gguf_sizes):
        totals += ["", f"{sum(size.num_bytes for size in sizes.values()):,}", f"{total_bits(sizes):.3f}"]
    rows.append(("all", f"{sum(size.count for size in result.store_sizes.values()):,}", *totals))
    print_table(("", "weights", "moray", "bytes", "bits", "llama.cpp", "bytes", "bits"), rows)


def _print_rates(result: Result, rounds: int) -> None:
    rows = []
    for phase in PHASES:
        pairs = result.pairs[phase.name]
        cells = [f"{result.geometry.tokens_per_expert(phase.batch):.3g}"]
        cells += [f"{median(pair.rates[side] for pair in pairs):.2f}" for side in ("moray", "llama.cpp")]
        ratios = [pair.ratio for pair in pairs]
        cells += [f"{median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"]
        cells += [_describe_pairs(pairs, rounds), f"{100 * median(pair.others for pair in pairs):.0f} %"]
        cells += [f"{100 * median(pair.idle[side] for pair in pairs):.0f} %" for side in ("moray", "llama.cpp")]
        rows.append((phase.name, *cells))
    header = ("tokens/s, medians", "tokens per expert", "moray", "llama.cpp", "moray / llama.cpp", "lowest-highest")
    print_table((*header, "pairs", "others", "moray idle", "llama.cpp idle"), rows)


def _describe_pairs(pairs: Sequence[Pair], rounds: int) -> str:
    disturbed = sum(pair.others > DISTURBED for pair in pairs)
    return f"{len(pairs)}, {disturbed} disturbed" if disturbed else str(len(pairs))


def _print_breakdowns(breakdowns: dict[str, Breakdown]) -> None:
    rows = []
    for phase in PHASES:
        found = breakdowns[phase.name]
        parts = (found.kernel, found.grouping, found.lease, found.rest, found.delivery, found.total)
        what = "a token" if phase.is_decode else "a prompt"
        rows.append((f"{phase.name}, {what}", *(f"{part:.2f}" for part in parts), f"{found.kernel / found.total:.0%}"))
    print_table(("moray, ms", "kernel", "grouping", "lease", "rest", "delivery", "= total", "kernel"), rows)


def _join_shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{side} {share:.0%}" for side, share in shares.items())


def _join_routing(result: Result) -> str:
    return ", ".join(f"{least}/{middle:g}/{most}" for least, middle, most in result.routing)
