"""Check of a store, and of the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moray.deploy.doctor.check import Check, describe
from moray.deploy.doctor.machine import ENGINE_BYTES
from moray.runtime.errors import StoreError


def check_store(path: Path | None) -> Iterator[Check]:
    from moray.deploy.config import demo_store
    from moray.runtime.memory import available_memory, format_bytes
    from moray.runtime.store.store import Store

    name = "demonstration store" if path is None else str(path)
    try:
        with Store.open(path or demo_store()) as store:
            manifest = store.manifest
    except StoreError as error:
        remedy = "reinstall moray: its demonstration store is part of it" if path is None else ""
        yield Check("store", "problem", describe(error), remedy)
        return
    experts = len(manifest.shards) * manifest.slot_bytes  # as they lie in an arena
    sizes = f"{name}: experts {format_bytes(experts)}, trunk {format_bytes(manifest.trunk_bytes)}"
    yield judge_store_memory(sizes, experts + manifest.trunk_bytes, available_memory())


def judge_store_memory(sizes: str, needed: int, free: int) -> Check:
    from moray.runtime.memory import format_bytes

    found = f"{sizes}; {format_bytes(needed)} needed, {format_bytes(free)} of memory free"
    smaller = "close other programs, convert with a smaller recipe (--recipe), or use a machine with more memory"
    if needed > free:
        return Check("store", "problem", found, smaller)
    if needed + ENGINE_BYTES > free:
        return Check("store", "warning", f"{found}, and an engine takes {format_bytes(ENGINE_BYTES)} more", smaller)
    return Check("store", "ok", found)
