"""``moray store verify``, ``repack`` and ``diff``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from moray.runtime.errors import StoreError
from moray.runtime.planning.sizes import parse_bytes
from moray.runtime.store.diff import Difference, compare, describe
from moray.runtime.store.inspection import Checked, inspect, read_manifest, repair_command
from moray.runtime.store.presence import read_presence
from moray.runtime.store.receipt import RECEIPT_NAME
from moray.runtime.store.repack import repack, repack_in_place, stored_format
from moray.runtime.store.store import Store

_LISTED = 10  # damaged parts that are named


@contextmanager
def _progress(console: Console, total_bytes: int, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        yield progress, progress.add_task("", total=total_bytes)


def verify_store(path: Path, console: Console, *, as_json: bool) -> None:
    """Raises StoreError if anything is damaged; all of it has been printed then."""
    manifest = read_manifest(path)
    present = read_presence(path, manifest)
    is_part = "" if present is None else f" of the {len(present)} of {len(manifest.shards)} experts that are here"
    damaged: list[Checked] = []
    num_parts = 0
    with _progress(console, manifest.expert_bytes + manifest.trunk_bytes, as_json) as (progress, task):
        for part in inspect(path, manifest):
            num_parts += 1
            progress.update(task, advance=part.num_bytes, description="verifying")
            damaged += [part] if part.reason else []
    version, has_receipt = stored_format(path), (path / RECEIPT_NAME).exists()
    if as_json:
        parts = [{"part": part.name, "reason": part.reason} for part in damaged]
        facts = {"store": str(path), "parts": num_parts, "format": version, "receipt": has_receipt, "damaged": parts}
        facts |= {} if present is None else {"partial": f"{len(present)} of {len(manifest.shards)} experts are here"}
        console.print_json(json.dumps(facts))
    else:
        for part in damaged[:_LISTED]:
            console.print(f"{part.name}: {part.reason}", markup=False, highlight=False, soft_wrap=True)
    if damaged:
        num_experts = sum(part.key is not None for part in damaged)
        others = f" and {len(damaged) - num_experts} other parts" if len(damaged) > num_experts else ""
        raise StoreError(
            f"{path}: {num_experts} of {len(manifest.shards)} experts{others} are damaged or missing; bring them with "
            f"`moray store sync SOURCE {path}`, or make only these again from the checkpoint: "
            f"{repair_command(path, manifest)}"
        )
    if not as_json:
        older = version != manifest.format_version or not has_receipt
        hint = f"; format {version}, `moray store repack {path}` makes it {manifest.format_version}" if older else ""
        console.print(f"{path}: all {num_parts} parts{is_part} are whole{hint}", highlight=False, soft_wrap=True)


def repack_store(path: Path, target: Path | None, file_size: str | None, console: Console) -> None:
    if target is None:
        if file_size is not None:
            raise StoreError("--file-size needs a TARGET: shards are moved into files of a new store")
        done = repack_in_place(path)
        console.print(f"{path}: {', '.join(done) or 'nothing to do'}", highlight=False, soft_wrap=True)
        return
    file_bytes = parse_bytes(file_size, option="--file-size") if file_size is not None else None
    manifest = read_manifest(path)
    with _progress(console, manifest.expert_bytes + manifest.trunk_bytes, False) as (progress, task):
        repacked = repack(
            path, target, file_bytes, lambda size, what: progress.update(task, advance=size, description=what)
        )
    num_files = len({entry.file for entry in repacked.shards.values()})
    console.print(
        f"{target} is complete: {len(repacked.shards)} experts in {num_files} files, format {repacked.format_version}",
        highlight=False,
        soft_wrap=True,
    )


def diff_stores(a: Path, b: Path, console: Console, *, as_json: bool) -> Difference:
    with Store.open(a) as ours, Store.open(b) as theirs:
        difference = describe(ours, theirs)
        with _progress(console, len(ours.manifest.shards) + 1, True) as (progress, task):
            for name in compare(ours, theirs, difference):
                progress.update(task, advance=1, description=name)
    if as_json:
        console.print_json(json.dumps(_document(difference)))
    else:
        _print(difference, a, b, console)
    return difference


def _document(difference: Difference) -> dict[str, object]:
    tensors = {
        name: {"tensors": t.num_tensors, "different": t.num_different, "error": t.error, "largest": t.largest}
        for name, t in difference.tensors.items()
    }
    parts = {"all": difference.num_parts, "same": difference.num_same}
    return {"same weights": difference.is_empty, "facts": difference.facts, "parts": parts, "tensors": tensors}


def _print(difference: Difference, a: Path, b: Path, console: Console) -> None:
    if difference.facts:
        table = Table("", str(a), str(b), box=None)
        for name, (ours, theirs) in difference.facts.items():
            table.add_row(name, ours, theirs)
        console.print(table, highlight=False)
    console.print(
        f"{difference.num_same} of {difference.num_parts} parts (experts, trunk) are equal bit for bit", highlight=False
    )
    if difference.is_empty:
        console.print("the weights are the same", highlight=False)
        return
    table = Table("tensor", "different", "relative error", "largest difference", box=None)
    for tensor in difference.tensors.values():
        if tensor.num_different:
            count = f"{tensor.num_different} of {tensor.num_tensors}"
            table.add_row(tensor.name, count, f"{tensor.error:.2e}", f"{tensor.largest:.2e}")
    console.print(table, highlight=False)
