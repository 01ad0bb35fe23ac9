"""``moray eval``: perplexity of stores on texts, and how closely they follow a reference store.

Everything that can be refused is refused before the first engine starts: an evaluation may take hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moray.deploy.config import EngineConfig
from moray.deploy.engine import Engine
from moray.deploy.evaluation_report import Report, StoreResult, Text, print_report, short_names
from moray.deploy.memory_plan import plan_engine
from moray.deploy.terminal import running_engine
from moray.runtime.errors import EvaluationError
from moray.runtime.evaluation import Evaluation, TokenScores, cut_windows
from moray.runtime.generation.text import encode_file, require_tokenizer
from moray.runtime.model.families import context_length, load_config
from moray.runtime.store.store import Store


@dataclass(frozen=True)
class _Candidate:
    """A store that may be evaluated."""

    path: Path
    vocabulary_size: int
    context_length: int
    documents: list[tuple[int, ...]]  # the texts as its tokenizer cuts them


def run_eval(
    config: EngineConfig,
    stores: Sequence[Path],
    files: Sequence[Path],
    reference: Path | None,
    window: int,
    max_tokens: int | None,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Evaluate the reference, then the stores, an engine for each; print one table or one JSON document.

    Progress goes to standard error, so that a file of the output holds the result only. Raises MorayError.
    """
    _require_at_least_2("--window", window)
    if max_tokens is not None:
        _require_at_least_2("--max-tokens", max_tokens)
    paths = [*([reference] if reference else []), *stores]
    for path in paths:
        with Store.open(path):  # refuse what is no store before anything starts
            pass
        if config.address is None:
            plan_engine(path, config)
    documents = _check_comparable(paths, files, window)
    texts, windows = _cut(files, documents, window, max_tokens)
    names = dict(zip(paths, short_names(paths), strict=True))
    progress_console = Console(stderr=True)
    kept: list[TokenScores] = []
    baseline = None
    if reference:
        here = config.model_copy(update={"store": reference})
        baseline = _evaluate(here, f"{names[reference]} (reference)", windows, [], kept, progress_console)
    results = [
        _evaluate(config.model_copy(update={"store": path}), names[path], windows, kept, None, progress_console)
        for path in stores
    ]
    print_report(Report(window, max_tokens, texts, len(windows), baseline, results), console, as_json=as_json)


def _require_at_least_2(option: str, value: int) -> None:
    if value < 2:
        raise EvaluationError(f"{option} is {value}, expected at least 2: the first token is context only")


def _check_comparable(paths: Sequence[Path], files: Sequence[Path], window: int) -> list[tuple[int, ...]]:
    """The texts in tokens, the same for all stores. Raises EvaluationError if they are not, StoreError."""
    candidates = [_read_candidate(path, files) for path in dict.fromkeys(paths)]
    first = candidates[0]
    for candidate in candidates:
        if window > candidate.context_length:
            raise EvaluationError(
                f"--window is {window}, the context of {candidate.path} holds {candidate.context_length} tokens; "
                "choose a smaller window"
            )
        if candidate.vocabulary_size != first.vocabulary_size:
            raise EvaluationError(
                f"{candidate.path} has a vocabulary of {candidate.vocabulary_size} tokens, {first.path} one of "
                f"{first.vocabulary_size}; their perplexities do not compare: evaluate them one by one"
            )
        for file, ids, expected in zip(files, candidate.documents, first.documents, strict=True):
            if ids != expected:
                raise EvaluationError(
                    f"the tokenizers of {candidate.path} and {first.path} cut {file} differently ({len(ids)} and "
                    f"{len(expected)} tokens); their perplexities do not compare: evaluate them one by one"
                )
    return first.documents


def _read_candidate(path: Path, files: Sequence[Path]) -> _Candidate:
    tokenizer, model = require_tokenizer(path), load_config(path)
    documents = [encode_file(tokenizer, file) for file in files]
    return _Candidate(path, model.get_text_config().vocab_size, context_length(model), documents)


def _cut(
    files: Sequence[Path], documents: Sequence[tuple[int, ...]], window: int, max_tokens: int | None
) -> tuple[list[Text], list[list[int]]]:
    """The windows of all texts, in order, and how much of each text they hold: the first ``max_tokens`` of all."""
    texts: list[Text] = []
    windows: list[list[int]] = []
    left = max_tokens if max_tokens is not None else sum(len(ids) for ids in documents)
    for file, ids in zip(files, documents, strict=True):
        found = list(cut_windows(ids[:left], window))
        windows += found
        texts.append(Text(file, len(ids), sum(len(w) for w in found)))
        left -= min(left, len(ids))
    return texts, windows


def _evaluate(
    config: EngineConfig,
    name: str,
    windows: Sequence[list[int]],
    reference: Sequence[TokenScores],
    keep: list[TokenScores] | None,
    console: Console,
) -> StoreResult:
    """One store, in an engine of its own. ``reference``: its scores, window by window, or none; ``keep`` gets ours."""
    with running_engine(config, console) as (engine, _), _progress(console) as progress:
        total = sum(len(w) for w in windows)
        task = progress.add_task(name, total=total, perplexity="-")
        evaluation, seconds = Evaluation(), 0.0
        for index, ids in enumerate(windows):
            expected = reference[index] if reference else None
            started = perf_counter()
            scores = engine.score(ids, None if expected is None else expected.top_ids)
            seconds += perf_counter() - started
            evaluation.add(scores, expected)
            if keep is not None:
                keep.append(scores)
            progress.update(task, advance=len(ids), perplexity=f"{evaluation.perplexity:.3f}")
        return _result(config.store_path, name, engine, evaluation, total / seconds)


def _result(path: Path, name: str, engine: Engine, evaluation: Evaluation, tokens_per_s: float) -> StoreResult:
    with Store.open(path) as store:
        numerics = engine.actors.compute_report.numerics
        return StoreResult(name, path, store.manifest, store.fingerprint, numerics, evaluation, tokens_per_s)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TextColumn("perplexity {task.fields[perplexity]}"),
        TextColumn("left:"),
        TimeRemainingColumn(compact=True),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=math.inf,  # one window of a large model may take minutes
    )
