"""From a checkpoint to a store.

Everything that can be refused is refused before the store's directory is made. Then every piece (a shard or
a tensor of the trunk) is made on its own and written to its place, the journal notes it, and the manifest
comes last: a store without one is unfinished, and the same call continues it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import transformers
import xxhash
from transformers import PreTrainedConfig

import moray
from moray.runtime.convert.adapter import Adapter
from moray.runtime.convert.checkpoint import Checkpoint, refuse_gguf
from moray.runtime.convert.complete import finish, make_missing, manifest_path, opened_for_completion
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.journal import JOURNAL_NAME, Journal
from moray.runtime.convert.needs import Needs, estimate_needs
from moray.runtime.convert.plan import Plan, make_plan
from moray.runtime.convert.quantize import QUANTIZER_ID
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.source_hashes import hash_in_background, weight_files
from moray.runtime.convert.supply import LocalSupply, Supply
from moray.runtime.convert.trunk import PARTIAL_TRUNK_NAME
from moray.runtime.convert.workers import Workshop, make_pieces, write_at
from moray.runtime.convert.workspace import (
    DOWNLOAD_FOLDER,
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
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry
from moray.runtime.store.migrations import FORMAT_VERSION
from moray.runtime.store.receipt import RECEIPT_NAME, FileHash, make_receipt, write_aside
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
    announce: Callable[[Needs], None] | None = None,
) -> Manifest:
    """Convert a local Hugging Face checkpoint to a store; continues if an earlier call was stopped.

    ``recipe``: see ``Recipe.parse``; None is the default one. ``lora``: directories of PEFT adapters, merged in this
    order, in float32 and before quantization. ``workers``: processes, None for one per
    usable core (a small model is converted in this process); each holds about one expert in memory, as
    float32. Workers are spawned: a script that calls this needs the ``if __name__ == "__main__"`` guard.
    ``announce`` is told what it takes before anything is written. Into a store that is there already, of the same
    checkpoint and recipe, only what is missing or damaged is made, and the rest is verified.

    Raises CheckpointError, UnsupportedModelError and RecipeError for what was given, StoreError if the
    directory cannot take the store, ResourceError if the disk is too small. These checks come first and
    leave nothing behind. Afterwards a failure (disk full, NaN in a tensor, an interrupt) leaves an
    unfinished store that the same call resumes.
    """
    source = Path(checkpoint_dir)
    refuse_gguf(source)
    config = load_config(source)
    checkpoint = Checkpoint.open(source).reshaped(expert_shapes(config))
    check_places(source, Path(store_dir))
    adapters = [Adapter.open(path) for path in lora]
    with hash_in_background(weight_files(checkpoint)) as hashes:
        origin = {"checkpoint": source.resolve().name}
        material = Material(source, config, checkpoint, adapters, LocalSupply(), origin, hashes)
        return make_store(material, Path(store_dir), recipe, workers, progress, announce)


@dataclass(frozen=True, slots=True)
class Material:
    """What a store is made of. ``folder`` has configuration and tokenizer, ``checkpoint`` is planned with, ``adapters``
    are merged.

    ``origin`` names the source in manifest and receipt; ``hashes`` is asked at the end for the sha256 of weight files.
    """

    folder: Path
    config: PreTrainedConfig
    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    supply: Supply
    origin: dict[str, str]
    hashes: Callable[[], dict[str, FileHash]]


def make_store(
    material: Material,
    store: Path,
    recipe: Recipe | str | None,
    workers: int | None,
    progress: Progress | None,
    announce: Callable[[Needs], None] | None,
) -> Manifest:
    """``convert``, for any material whose places have been checked."""
    if not isinstance(recipe, Recipe):
        recipe = Recipe.parse() if recipe is None else Recipe.parse(recipe)
    plan = make_plan(material.config, material.checkpoint, recipe, material.adapters)
    copied = files_to_copy(material.folder)
    checkpoint = material.supply.readable(material.checkpoint)
    room = material.supply.room_bytes(plan.pieces)
    workers = _choose_workers(workers, plan, len(plan.pieces))
    if manifest_path(store) is not None:
        workshop = Workshop(checkpoint, plan.shapes, store)
        return _complete(material, workshop, plan, recipe, copied, workers, progress)
    check_space(store, plan.files, copied, room)
    if announce:
        announce(estimate_needs(plan, material.checkpoint, copied, material.supply, workers))
    workshop = Workshop(checkpoint, plan.shapes, store)
    fingerprint = _fingerprint(material, recipe)
    with explain_full_disk(store, plan.files), open_journal(store, fingerprint) as journal:
        checksums = _write_pieces(plan, workshop, material.supply, journal, workers, progress)
        _finish_files(store, plan, copied)
        manifest = _describe(material, store, recipe, plan, checksums)
        data = manifest.encode()
        receipt = make_receipt(manifest, data, store, [path.name for path in copied], material.hashes())
        write_aside(store / RECEIPT_NAME, receipt)
        write_aside(store / MANIFEST_NAME, data)
        journal.path.unlink()
    return manifest


def _complete(
    material: Material,
    workshop: Workshop,
    plan: Plan,
    recipe: Recipe,
    copied: list[Path],
    workers: int,
    progress: Progress | None,
) -> Manifest:
    """Fill in what a store lacks, and verify the rest."""
    with opened_for_completion(workshop.store, plan, recipe.to_dict(), progress or _Silent()) as work:
        if work.missing:
            make_missing(work, workshop, material.supply, workers, plan.trunk.header, progress or _Silent())
        return finish(work, copied, material.hashes())


class _Silent:
    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int, what: str) -> None:
        pass


def _fingerprint(material: Material, recipe: Recipe) -> str:
    """Of everything that decides a store's bytes."""
    config = material.folder.joinpath("config.json").read_text()
    parts = [material.checkpoint.fingerprint, config, str(recipe), LAYOUT_ID]
    parts += [str(FORMAT_VERSION), QUANTIZER_ID, version("hqq"), transformers.__version__]
    parts += [adapter.fingerprint for adapter in material.adapters]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _write_pieces(
    plan: Plan, workshop: Workshop, supply: Supply, journal: Journal, workers: int, progress: Progress | None
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

    missing = []
    for piece in plan.pieces:
        checksum = verified_checksum(workshop.store, piece, journal)
        if checksum is None:
            missing.append(piece)
        else:
            done(piece, checksum)
    with supply.open(missing) as feed:

        def written(piece: Piece, checksum: int) -> None:
            journal.append(piece.name, checksum)
            feed.done(piece)
            done(piece, checksum)

        make_pieces(workshop, feed, max(1, min(workers, len(missing))), written)
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
    shutil.rmtree(store / DOWNLOAD_FOLDER, ignore_errors=True)
    for path in copied:
        if path.is_dir():
            shutil.copytree(path, store / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, store / path.name)
    for path in store.rglob("*"):
        if path.is_file() and path.name != JOURNAL_NAME:
            sync(path)
    (store / PARTIAL_TRUNK_NAME).replace(store / TRUNK_NAME)


def _describe(material: Material, store: Path, recipe: Recipe, plan: Plan, checksums: dict[str, int]) -> Manifest:
    return Manifest(
        family=material.config.model_type,
        recipe=recipe.to_dict(),
        layers=plan.layers,
        shards={
            key: ShardEntry(piece.file, piece.offset, piece.num_bytes, checksums[piece.name])
            for key, piece in plan.shards.items()
        },
        trunk_bytes=plan.trunk.num_bytes,
        trunk_checksum=checksum_file(store / TRUNK_NAME),
        packed_trunk=plan.trunk.packed,
        source=material.origin
        | _describe_adapters(material.adapters)
        | {"converted": datetime.now(UTC).isoformat(timespec="seconds")},
        versions={
            "moray": moray.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "hqq": version("hqq"),
        },
        num_parameters=plan.num_parameters,
        notes=plan.notes,
    )


def _describe_adapters(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Folder's name and sha256 of each, for people: "adapter", "adapter 2", ..."""
    names = ("adapter" if number == 0 else f"adapter {number + 1}" for number in range(len(adapters)))
    return {
        name: f"{adapter.path.resolve().name} (sha256 {adapter.sha256})"
        for name, adapter in zip(names, adapters, strict=True)
    }
