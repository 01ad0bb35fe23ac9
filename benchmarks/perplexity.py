"""Perplexity of stores on text: what a recipe costs in quality.

    python benchmarks/perplexity.py STORE [STORE ...]                        # on files of CPython's own test suite
    python benchmarks/perplexity.py STORE --text a.txt b.txt --window 1024
    python benchmarks/perplexity.py --checkpoint DIR --recipes none hqq8 hqq4 hqq3 hqq2

The last form converts the checkpoint with each recipe into a temporary directory first.

What it measures: each file is tokenized with the store's tokenizer as one document (with its begin token, if the
tokenizer adds one) and its first ``--tokens-per-file`` tokens are cut into windows of ``--window`` tokens without
overlap; a shorter rest is left out. Each window is one forward pass on its own, so its first token is context only.
Perplexity is exp of the mean negative log-likelihood, in nats, of all other tokens: per token, so numbers compare
between stores with the same tokenizer only. *bits* are bytes of the file(s) x 8 / parameters: of the experts alone,
with scales, zeros and padding, and of the whole store.

The default text is deterministic for a Python version: of the files test_*.py in the standard library's test folder
that have at least ``--tokens-per-file`` tokens, sorted by name, ``--files`` evenly spaced ones, the first included.
The demonstration model was trained on other parts of the library, not on this folder.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from common import describe_machine, in_process, print_table, working_directory

from moray.runtime.convert.converter import convert
from moray.runtime.errors import StoreError
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.text import load_tokenizer
from moray.runtime.layout.packed import Numerics
from moray.runtime.memory import format_bytes
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store

Window = list[int]


@dataclass(frozen=True)
class Result:
    """One store in one numerics class."""

    name: str
    manifest: Manifest
    numerics: Numerics
    mean_nll: float
    num_predicted: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)


def default_texts(tokenizer: Any, count: int, min_tokens: int) -> list[Path]:
    """Evenly spaced files of CPython's test suite that are long enough."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    files = [file for file in sorted(folder.glob("test_*.py")) if len(_tokenize(tokenizer, file)) >= min_tokens]
    if len(files) < count:
        raise SystemExit(f"{folder} has {len(files)} long enough files, expected {count}; name texts with --text")
    return [files[i * len(files) // count] for i in range(count)]


def windows_of(tokenizer: Any, files: Sequence[Path], window: int, tokens_per_file: int) -> list[Window]:
    """Windows of exactly ``window`` tokens, in the order of the files."""
    found = []
    for file in files:
        ids = _tokenize(tokenizer, file)[:tokens_per_file]
        found += [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if not found:
        raise SystemExit(f"no text has {window} tokens; choose a smaller --window or longer texts")
    return found


def evaluate(runner: Runner, windows: Sequence[Window]) -> tuple[float, int]:
    """Mean negative log-likelihood in nats, and of how many tokens."""
    total, count = 0.0, 0
    for window in windows:
        logits = runner.logits(window)[:-1]
        targets = torch.tensor(window[1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count, count


def evaluate_store(path: Path, windows: Sequence[Window], numerics: Numerics) -> Result:
    with in_process(path, numerics) as runner, Store.open(path) as store:
        nll, count = evaluate(runner, windows)
        return Result(path.name, store.manifest, numerics, nll, count)


def bits_of_experts(manifest: Manifest) -> float:
    """Bits a weight, of all routed experts."""
    counts = [
        layer.num_experts * sum(t.spec.rows * t.spec.columns if t.spec else t.length for t in layer.layout.tensors)
        for layer in manifest.layers
    ]
    return 8 * manifest.expert_bytes / sum(counts)


def print_results(results: Sequence[Result]) -> None:
    header = ("store", "experts", "attention", "class", "bits, experts", "bits, all", "size", "perplexity", "vs first")
    rows = []
    for result in results:
        manifest = result.manifest
        size = manifest.expert_bytes + manifest.trunk_bytes
        rows.append(
            (
                result.name,
                manifest.recipe["experts"],
                manifest.recipe["attention"],
                result.numerics,
                f"{bits_of_experts(manifest):.2f}",
                f"{8 * size / manifest.num_parameters:.2f}",
                format_bytes(size),
                f"{result.perplexity:.3f}",
                f"{100 * (result.perplexity / results[0].perplexity - 1):+.2f} %",
            )
        )
    print_table(header, rows)


def _tokenize(tokenizer: Any, file: Path) -> list[int]:
    ids: list[int] = tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
    return ids


def _tokenizer(store: Path) -> Any:
    tokenizer = load_tokenizer(store)
    if tokenizer is None:
        raise StoreError(f"{store} has no tokenizer; perplexity on text needs one")
    return tokenizer


@contextmanager
def _stores(arguments: argparse.Namespace) -> Iterator[list[Path]]:
    """The stores named, then those converted here."""
    with ExitStack() as stack:
        stores = list(arguments.stores)
        if arguments.checkpoint:
            size = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
            root = stack.enter_context(working_directory(2 * size * len(arguments.recipes)))
            for recipe in arguments.recipes:
                stores.append(root / recipe.replace(":", "-"))
                convert(arguments.checkpoint, stores[-1], recipe)
        if not stores:
            raise SystemExit("nothing to evaluate; name stores, or --checkpoint with --recipes")
        yield stores


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="*")
    parser.add_argument("--checkpoint", type=Path, help="convert this with --recipes, and evaluate the results")
    parser.add_argument("--recipes", nargs="+", default=["none", "hqq8", "hqq4", "hqq3", "hqq2"])
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; without it, CPython's test suite")
    parser.add_argument("--files", type=int, default=20, help="of the default text (20)")
    parser.add_argument("--tokens-per-file", type=int, default=1024, help="at most (1024)")
    parser.add_argument("--window", type=int, default=512, help="tokens (512)")
    parser.add_argument("--numerics", nargs="+", choices=get_args(Numerics), default=["int8", "float"])
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    with _stores(arguments) as stores:
        tokenizer = _tokenizer(stores[0])
        files = arguments.text or default_texts(tokenizer, arguments.files, arguments.tokens_per_file)
        windows = windows_of(tokenizer, files, arguments.window, arguments.tokens_per_file)
        results = [evaluate_store(store, windows, numerics) for numerics in arguments.numerics for store in stores]
    print(f"{describe_machine()}\n")
    print(f"{len(windows)} windows of {arguments.window} tokens, {results[0].num_predicted:,} tokens predicted, from:")
    print(", ".join(file.name for file in files) + "\n")
    print_results(results)


if __name__ == "__main__":
    main()
