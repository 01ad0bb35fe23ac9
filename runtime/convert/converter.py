"""From a checkpoint to a store.

Everything that can be refused is refused before the store's directory is made. Then every piece (a shard or
a tensor of the trunk) is made on its own and written to its place, the journal notes it, and the manifest
comes last: a store without one is unfinished, and the same call continues it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import transformers
import xxhash

import moray
from moray.runtime.convert.adapter import Adapter
from moray.runtime.convert.checkpoint import Checkpoint, refuse_gguf
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.journal import JOURNAL_NAME, Journal
from moray.runtime.convert.plan import Plan, make_plan
from moray.runtime.convert.quantize import QUANTIZER_ID
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.trunk import PARTIAL_TRUNK_NAME
from moray.runtime.convert.workers import Workshop, make_pieces, write_at
from moray.runtime.convert.workspace import (
    check_places,
    check_space,
    explain_full_disk,
    files_to_copy,
    make_files,
    open_journal,
    sync,
    verified_checksum,
)
from moray.runtime.cpu import usable_cores
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.model.families import expert_shapes, load_config
from moray.runtime.store.manifest import FORMAT_VERSION, MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry
from moray.runtime.store.store import checksum_file

_SMALL_MODEL = 64_000_000  # expert parameters: below, starting processes costs more than it saves


class Progress(Protocol):
    """Told how a conversion goes, in bytes of the store."""

    def start(self, total_bytes: int) -> None: ...

    def advance(self, num_bytes: int, what: str) -> None: ...


def convert(
    checkpoint_dir: str | os.PathLike[str],
    store_dir: str | os.PathLike[str],
    recipe: Recipe | str | None = None,
    *,
    lora: Sequence[str | os.PathLike[str]] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Convert a local Hugging Face checkpoint to a store; continues if an earlier call was stopped.

    ``recipe``: see ``Recipe.parse``; None is the default one. ``lora``: directories of PEFT adapters, merged in this
    order, in float32 and before quantization. ``workers``: processes, None for one per
    usable core (a small model is converted in this process); each holds about one expert in memory, as
    float32. Workers are spawned: a script that calls this needs the ``if __name__ == "__main__"`` guard.

    Raises CheckpointError, UnsupportedModelError and RecipeError for what was given, StoreError if the
    directory cannot take the store, ResourceError if the disk is too small. These checks come first and
    leave nothing behind. Afterwards a failure (disk full, NaN in a tensor, an interrupt) leaves an
    unfinished store that the same call resumes.
    """
    source, store = Path(checkpoint_dir), Path(store_dir)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.parse() if recipe is None else Recipe.parse(recipe)
    refuse_gguf(source)
    config = load_config(source)
    checkpoint = Checkpoint.open(source).reshaped(expert_shapes(config))
    check_places(source, store)
    adapters = [Adapter.open(path) for path in lora]
    plan = make_plan(config, checkpoint, recipe, adapters)
    copied = files_to_copy(source)
    check_space(store, plan.files, copied)
    fingerprint = _fingerprint(checkpoint, recipe, adapters)
    with explain_full_disk(store, plan.files), open_journal(store, fingerprint) as journal:
        checksums = _write_pieces(plan, Workshop(checkpoint, plan.shapes, store), journal, workers, progress)
        _finish_files(store, plan, copied)
        manifest = _describe(config.model_type, source, store, recipe, plan, checksums, adapters)
        _write_manifest(store, manifest)
        journal.path.unlink()
    return manifest


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe, adapters: Sequence[Adapter]) -> str:
    """Of everything that decides a store's bytes."""
    parts = [checkpoint.fingerprint, checkpoint.path.joinpath("config.json").read_text(), str(recipe), LAYOUT_ID]
    parts += [str(FORMAT_VERSION), QUANTIZER_ID, version("hqq"), transformers.__version__]
    parts += [adapter.fingerprint for adapter in adapters]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _write_pieces(
    plan: Plan, workshop: Workshop, journal: Journal, workers: int | None, progress: Progress | None
) -> dict[str, int]:
    """Make every piece that is not there yet. Returns the checksum of each, by name."""
    make_files(workshop.store, plan.files)
    write_at(workshop.store / PARTIAL_TRUNK_NAME, 0, memoryview(plan.trunk.header))
    if progress:
        progress.start(sum(piece.num_bytes for piece in plan.pieces))
    checksums: dict[str, int] = {}

    def done(piece: Piece, checksum: int) -> None:
        checksums[piece.name] = checksum
        if progress:
            progress.advance(piece.num_bytes, piece.label)

    def written(piece: Piece, checksum: int) -> None:
        journal.append(piece.name, checksum)
        done(piece, checksum)

    missing = []
    for piece in plan.pieces:
        checksum = verified_checksum(workshop.store, piece, journal)
        if checksum is None:
            missing.append(piece)
        else:
            done(piece, checksum)
    make_pieces(workshop, missing, _choose_workers(workers, plan, len(missing)), written)
    return checksums


def _choose_workers(workers: int | None, plan: Plan, num_pieces: int) -> int:
    if workers is None:
        small = plan.num_expert_parameters < _SMALL_MODEL
        workers = 1 if small else usable_cores()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return max(1, min(workers, num_pieces))


def _finish_files(store: Path, plan: Plan, copied: list[Path]) -> None:
    """Copy the checkpoint's own files, give the trunk its name, and wait for the disk."""
    for path in copied:
        if path.is_dir():
            shutil.copytree(path, store / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, store / path.name)
    for path in store.rglob("*"):
        if path.is_file() and path.name != JOURNAL_NAME:
            sync(path)
    (store / PARTIAL_TRUNK_NAME).replace(store / TRUNK_NAME)


def _describe(
    family: str,
    source: Path,
    store: Path,
    recipe: Recipe,
    plan: Plan,
    checksums: dict[str, int],
    adapters: Sequence[Adapter],
) -> Manifest:
    return Manifest(
        family=family,
        recipe=recipe.to_dict(),
        layers=plan.layers,
        shards={
            key: ShardEntry(piece.file, piece.offset, piece.num_bytes, checksums[piece.name])
            for key, piece in plan.shards.items()
        },
        trunk_bytes=plan.trunk.num_bytes,
        trunk_checksum=checksum_file(store / TRUNK_NAME),
        packed_trunk=plan.trunk.packed,
        source={
            "checkpoint": source.resolve().name,
            "converted": datetime.now(UTC).isoformat(timespec="seconds"),
            "moray": moray.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "hqq": version("hqq"),
        }
        | _describe_adapters(adapters),
        num_parameters=plan.num_parameters,
        notes=plan.notes,
    )


def _describe_adapters(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Path and sha256 of each, for people: "adapter", "adapter 2", ..."""
    names = ("adapter" if number == 0 else f"adapter {number + 1}" for number in range(len(adapters)))
    return {name: f"{adapter.path} (sha256 {adapter.sha256})" for name, adapter in zip(names, adapters, strict=True)}


def _write_manifest(store: Path, manifest: Manifest) -> None:
    partial = store / f"{MANIFEST_NAME}.partial"
    partial.write_bytes(manifest.encode())
    sync(partial)
    partial.rename(store / MANIFEST_NAME)
    sync(store)
