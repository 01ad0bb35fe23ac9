"""What ``moray eval`` prints: a table with its definitions, or one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moray.runtime.evaluation import NUM_TOP_TOKENS, Evaluation
from moray.runtime.memory import format_bytes
from moray.runtime.store.manifest import Manifest

DEFINITIONS = {
    "window": "texts are cut into windows without overlap, the last of a text may be shorter (at least 2 tokens); each "
    "is one forward pass, its first token is context only, its others are predicted",
    "perplexity": "exp of the mean negative log-likelihood (NLL, nats) of the predicted tokens",
    "standard error": "of the mean NLL, with tokens as independent draws",
    "bits": "a weight, scales, zeros and padding included; of the experts alone, and of the whole store",
    "tokens/s": "of the windows, while evaluating",
}
AGREEMENT_DEFINITIONS = {
    "same top": "share of predicted positions at which store and reference have the same most likely token",
    "KL": f"mean KL(reference || store), nats, over the reference's {NUM_TOP_TOKENS} most likely tokens and one bucket "
    "with the rest",
}


@dataclass(frozen=True)
class Text:
    """A file and how much of it was evaluated."""

    file: Path
    num_tokens: int
    num_evaluated: int


@dataclass(frozen=True)
class StoreResult:
    """One store and what its windows gave."""

    name: str
    path: Path
    manifest: Manifest
    fingerprint: str
    numerics: str  # class
    evaluation: Evaluation
    tokens_per_s: float


@dataclass(frozen=True)
class Report:
    """One run of ``moray eval``."""

    window: int
    max_tokens: int | None
    texts: Sequence[Text]
    num_windows: int
    reference: StoreResult | None
    results: Sequence[StoreResult]

    @property
    def num_evaluated(self) -> int:
        return sum(text.num_evaluated for text in self.texts)

    def change(self, result: StoreResult) -> float:
        """Of perplexity against the first store; 0.01 is one percent more."""
        return result.evaluation.perplexity / self.results[0].evaluation.perplexity - 1

    def definitions(self) -> dict[str, str]:
        return DEFINITIONS | (AGREEMENT_DEFINITIONS if self.reference else {})


def short_names(paths: Sequence[Path]) -> list[str]:
    """Directory names, or the paths as given where two have the same name."""
    names = [path.resolve().name for path in paths]
    unique = len(set(names)) == len({path.resolve() for path in paths})
    return names if unique else [str(path) for path in paths]


def print_report(report: Report, console: Console, *, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(_document(report)))
        return
    lines = _align(table(report))
    if console.is_terminal and len(lines[0]) > console.width:  # too narrow: a column for each store
        lines = _align([list(row) for row in zip(*table(report), strict=True)])
    console.print("\n".join([*lines, "", *notes(report)]), markup=False, highlight=False, soft_wrap=True)


def table(report: Report) -> list[list[str]]:
    """Headers, then a row for each store."""
    rows = [_row(report, result) for result in report.results]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def notes(report: Report) -> list[str]:
    """What was evaluated, and every definition."""
    texts = ", ".join(f"{text.file.name} ({text.num_evaluated:,})" for text in report.texts)
    lines = [
        f"{report.num_evaluated:,} tokens in {report.num_windows:,} windows of at most {report.window}, "
        f"{report.results[0].evaluation.num_predicted:,} predicted: {texts}"
    ]
    if report.reference:
        perplexity = report.reference.evaluation.perplexity
        lines.append(f"reference: {report.reference.path}, perplexity {perplexity:.3f}")
    return lines + [f"{name}: {meaning}" for name, meaning in report.definitions().items()]


def _row(report: Report, result: StoreResult) -> dict[str, str]:
    manifest, evaluation = result.manifest, result.evaluation
    row = {
        "store": result.name,
        "experts": manifest.recipe["experts"],
        "attention": manifest.recipe["attention"],
        "class": result.numerics,
        "bits, experts": f"{manifest.bits_per_expert_weight:.2f}",
        "bits, all": f"{manifest.bits_per_weight:.2f}",
        "size": format_bytes(manifest.expert_bytes + manifest.trunk_bytes),
        "perplexity": f"{evaluation.perplexity:.3f}",
        "mean NLL": f"{evaluation.mean_nll:.4f}",
    }
    if evaluation.nll_standard_error is not None:
        row["mean NLL"] += f" ± {evaluation.nll_standard_error:.4f}"
    if len(report.results) > 1:
        row["vs first"] = f"{100 * report.change(result):+.2f} %"
    if evaluation.same_top_share is not None:
        row["same top"] = f"{100 * evaluation.same_top_share:.2f} %"
    if evaluation.mean_kl is not None:
        row["KL"] = f"{evaluation.mean_kl:.3g}"
    return row | {"tokens/s": f"{result.tokens_per_s:.1f}"}


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _document(report: Report) -> dict[str, Any]:
    return {
        "window": report.window,
        "max_tokens": report.max_tokens,
        "texts": [
            {"file": str(text.file), "tokens": text.num_tokens, "evaluated": text.num_evaluated}
            for text in report.texts
        ],
        "num_windows": report.num_windows,
        "num_tokens": report.num_evaluated,
        "num_predicted": report.results[0].evaluation.num_predicted,
        "num_top_tokens": NUM_TOP_TOKENS if report.reference else None,
        "definitions": report.definitions(),
        "reference": _facts(report.reference) if report.reference else None,
        "stores": [
            _facts(result)
            | {
                "change": _finite(report.change(result)),
                "same_top_share": result.evaluation.same_top_share,
                "mean_kl": _finite(result.evaluation.mean_kl),
            }
            for result in report.results
        ],
    }


def _facts(result: StoreResult) -> dict[str, Any]:
    manifest, evaluation = result.manifest, result.evaluation
    return {
        "store": str(result.path),
        "fingerprint": result.fingerprint,
        "family": manifest.family,
        "recipe": manifest.recipe,
        "numerics": result.numerics,
        "bits_per_expert_weight": manifest.bits_per_expert_weight,
        "bits_per_weight": manifest.bits_per_weight,
        "size_bytes": manifest.expert_bytes + manifest.trunk_bytes,
        "perplexity": _finite(evaluation.perplexity),
        "mean_nll": evaluation.mean_nll,
        "nll_standard_error": evaluation.nll_standard_error,
        "tokens_per_s": result.tokens_per_s,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
