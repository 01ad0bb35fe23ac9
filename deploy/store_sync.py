"""``moray store sync`` and ``moray store serve``."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moray.runtime.errors import ConfigError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import format_bytes
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.selection import experts_of_file, experts_of_layers, experts_of_part
from moray.runtime.store.shelf import Shelf, SyncSource
from moray.runtime.store.store import Store
from moray.runtime.store.sync import SyncPlan, sync_store

_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


class _Bar:
    """A ``Told`` on the terminal: one bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None)

    def start(self, total_bytes: int, what: str) -> None:
        self._progress.reset(self._task, total=total_bytes, description=what)

    def advance(self, num_bytes: int, what: str) -> None:
        self._progress.update(self._task, advance=num_bytes, description=what)


def selection(
    experts: Path | None, layers: str | None, part: str | None
) -> Callable[[Manifest], Collection[ExpertKey]] | None:
    """What of a store is asked for; None: all. Raises ConfigError if several say it."""
    chosen = [
        (lambda manifest: experts_of_file(manifest, experts)) if experts is not None else None,
        (lambda manifest: experts_of_layers(manifest, layers)) if layers is not None else None,
        (lambda manifest: experts_of_part(manifest, part)) if part is not None else None,
    ]
    given = [choice for choice in chosen if choice is not None]
    if len(given) > 1:
        raise ConfigError("--experts, --layers and --part exclude each other; give one")
    return given[0] if given else None


def sync_stores(
    source: str,
    store: Path,
    wanted: Callable[[Manifest], Collection[ExpertKey]] | None,
    keys: Path | None,
    console: Console,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        _opened(source, keys) as opened,
        Progress(*columns, console=console, disable=as_json, transient=True) as progress,
    ):
        plan = sync_store(opened, store, _Bar(progress), wanted, dry_run=dry_run)
    if as_json:
        console.print_json(json.dumps(_document(plan, source, store, dry_run)))
    else:
        console.print(_in_words(plan, store, dry_run), highlight=False, soft_wrap=True, markup=False)


def serve_store(path: Path, address: str, keys: Path, console: Console) -> None:
    """Serve until a signal comes."""
    from moray.cluster.keys import read_keys
    from moray.cluster.store_server import serving_store

    if not _ADDRESS.fullmatch(address):
        raise ConfigError(f"--listen is {address!r:.80}, expected HOST:PORT such as 192.168.1.10:7420")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Store.open(path) as store, serving_store(store, address, read_keys(keys)) as server:
        where = server.address.removeprefix("tcp://")
        console.print(
            f"serving {len(store.present)} of {len(store.manifest.shards)} experts of {path} at {where}; copy with: "
            f"moray store sync {where} STORE --keys KEYS",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        stop.wait()
    console.print(f"{format_bytes(server.stats.read_bytes)} were read", highlight=False)


@contextmanager
def _opened(source: str, keys: Path | None) -> Iterator[SyncSource]:
    if Path(source).is_dir():
        with Store.open(source) as store:
            yield Shelf(store)
        return
    if not _ADDRESS.fullmatch(source):
        raise StoreError(f"{source} is neither a directory nor HOST:PORT of a `moray store serve`")
    if keys is None:
        raise ConfigError(f"reading from {source} needs --keys, the file that `moray store serve` there was given")
    from moray.cluster.keys import read_keys
    from moray.cluster.peers import RemoteStore
    from moray.cluster.store_server import store_address

    pair = read_keys(keys)
    remote = RemoteStore(store_address(source, pair), pair)
    try:
        yield remote
    finally:
        remote.close()


def _document(plan: SyncPlan, source: str, store: Path, dry_run: bool) -> dict[str, object]:
    return {
        "source": source,
        "store": str(store),
        "experts": {
            "asked for": plan.num_wanted,
            "brought": len(plan.missing),
            "of these damaged before": len(plan.damaged),
            "here": len(plan.here),
            "of": len(plan.manifest.shards),
        },
        "files": [file.name for file in plan.files],
        "bytes": plan.num_bytes,
        "dry run": dry_run,
    }


def _in_words(plan: SyncPlan, store: Path, dry_run: bool) -> str:
    repaired = f" ({len(plan.damaged)} of them damaged before)" if plan.damaged else ""
    verb = "would bring" if dry_run else "brought"
    done = f"{verb} {len(plan.missing)} experts{repaired} and {len(plan.files)} files, {format_bytes(plan.num_bytes)}"
    all_here = len(plan.here) == len(plan.manifest.shards)
    state = "it is whole" if all_here else f"{len(plan.here)} of {len(plan.manifest.shards)} experts are here"
    return f"{store}: {done}; {state}{' now' if plan.num_bytes and not dry_run else ''}"
