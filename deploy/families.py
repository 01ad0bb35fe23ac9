"""``moray families``: what the installed transformers has that moray runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import transformers
from rich.console import Console
from rich.table import Table

from moray.runtime.model.catalog import FamilyEntry, list_families


def show_families(*, as_json: bool, console: Console) -> None:
    """Print a row for each model type, or one JSON document."""
    entries = list_families()
    if as_json:
        document = {"transformers": transformers.__version__, "families": [asdict(entry) for entry in entries]}
        console.print_json(json.dumps(document))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("model type", "architecture", "experts by", "kernels for", "tested"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        table.add_row(*_row(entry))
    console.print(table, highlight=False)
    console.print(f"transformers {transformers.__version__}: {_count(entries)}", highlight=False)


def _row(entry: FamilyEntry) -> tuple[str, str, str, str, str]:
    architecture = f"{entry.architecture} (text only)" if entry.text_only else entry.architecture
    kernels = " ".join(entry.kernels) or ("general path" if entry.route else "")
    return entry.model_type, architecture, entry.route, kernels, entry.tested


def _count(entries: list[FamilyEntry]) -> str:
    routes = Counter(entry.route for entry in entries)
    exceptions = sum(entry.tested.startswith("exception") for entry in entries)
    return f"{routes['interface']} by interface, {routes['adapter']} by adapter, {exceptions} exceptions"
