"""Perplexity of stores on text: what a recipe costs in quality, in one process, without Ray.

    python benchmarks/perplexity.py STORE [STORE ...]                        # on files of CPython's own test suite
    python benchmarks/perplexity.py STORE --text a.txt b.txt --window 1024
    python benchmarks/perplexity.py --checkpoint DIR --recipes none hqq8 hqq4 hqq3 hqq2

The last form converts the checkpoint with each recipe into a temporary directory first. What it adds to `moray eval`:
that, several numerics classes in one table, and a default text.

What it measures is defined in moray/runtime/evaluation.py and printed below the table. Of each file the first
``--tokens-per-file`` tokens count.

The default text is deterministic for a Python version: of the files test_*.py in the standard library's test folder
that have at least ``--tokens-per-file`` tokens, sorted by name, ``--files`` evenly spaced ones, the first included.
The demonstration model was trained on other parts of the library, not on this folder.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from common import describe_machine, in_process, print_table, working_directory

from moray.deploy.evaluation_report import Report, StoreResult, Text, notes, table
from moray.runtime.convert.converter import convert
from moray.runtime.evaluation import Evaluation, cut_windows
from moray.runtime.generation.text import encode_file, encode_prompt, require_tokenizer
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

Window = list[int]


def default_texts(tokenizer: Any, count: int, min_tokens: int) -> list[Path]:
    """Evenly spaced files of CPython's test suite that are long enough."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    files = [file for file in sorted(folder.glob("test_*.py")) if _num_tokens(tokenizer, file) >= min_tokens]
    if len(files) < count:
        raise SystemExit(f"{folder} has {len(files)} long enough files, expected {count}; name texts with --text")
    return [files[i * len(files) // count] for i in range(count)]


def cut_texts(
    tokenizer: Any, files: Sequence[Path], window: int, tokens_per_file: int
) -> tuple[list[Text], list[Window]]:
    """What is evaluated of each file, and the windows of all."""
    texts: list[Text] = []
    windows: list[Window] = []
    for file in files:
        ids = encode_file(tokenizer, file)
        found = list(cut_windows(ids[:tokens_per_file], window))
        windows += found
        texts.append(Text(file, len(ids), sum(len(w) for w in found)))
    return texts, windows


def evaluate_store(path: Path, windows: Sequence[Window], numerics: Numerics) -> StoreResult:
    with in_process(path, numerics) as runner, Store.open(path) as store:
        evaluation, started = Evaluation(), perf_counter()
        for window in windows:
            evaluation.add(runner.score(window))
        rate = sum(len(window) for window in windows) / (perf_counter() - started)
        return StoreResult(path.name, path, store.manifest, store.fingerprint, numerics, evaluation, rate)


def _num_tokens(tokenizer: Any, file: Path) -> int:
    return len(encode_prompt(tokenizer, file.read_text(encoding="utf-8", errors="replace")))  # not all are UTF-8


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
        tokenizer = require_tokenizer(stores[0])
        files = arguments.text or default_texts(tokenizer, arguments.files, arguments.tokens_per_file)
        texts, windows = cut_texts(tokenizer, files, arguments.window, arguments.tokens_per_file)
        results = [evaluate_store(store, windows, numerics) for numerics in arguments.numerics for store in stores]
    report = Report(arguments.window, None, texts, len(windows), None, results)
    print(f"{describe_machine()}\n")
    header, *rows = table(report)
    print_table(header, rows)
    print("\n" + "\n".join(notes(report)))


if __name__ == "__main__":
    main()
