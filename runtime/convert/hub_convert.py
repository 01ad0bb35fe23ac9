"""From a hub id to a store: the checkpoint's files are converted as they arrive."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import xxhash

from moray.runtime.convert.adapter import Adapter
from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.converter import Material, Progress, make_store
from moray.runtime.convert.hub import HubFile, HubModel, fetch_description, find_cached, find_model, offline
from moray.runtime.convert.hub_supply import HubSupply, RemoteCheckpoint
from moray.runtime.convert.needs import Needs
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.source_hashes import hash_in_background, weight_files
from moray.runtime.convert.supply import LocalSupply
from moray.runtime.convert.workspace import DOWNLOAD_FOLDER, check_places
from moray.runtime.errors import StoreError
from moray.runtime.model.families import expert_shapes, load_config
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest
from moray.runtime.store.receipt import FileHash


def convert_from_hub(
    name: str,
    store_dir: str | os.PathLike[str],
    recipe: Recipe | str | None = None,
    *,
    lora: Sequence[str | os.PathLike[str]] = (),
    revision: str | None = None,
    stream: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[Needs], None] | None = None,
) -> Manifest:
    """``convert`` for a repository on a model hub, ``name`` as ORG/NAME; continues if an earlier call was stopped.

    ``stream``: files lie in the store's directory and each is deleted when no piece needs it any more, so the disk
    never holds the whole checkpoint; otherwise they stay in huggingface_hub's cache. With HF_HUB_OFFLINE set, what
    is in that cache is converted. Code in the repository is never fetched nor run.

    Raises what ``convert`` raises, and HubError.
    """
    store = Path(store_dir)
    adapters = [Adapter.open(path) for path in lora]
    if offline():
        return _convert_cached(name, store, recipe, adapters, revision, workers, progress, announce)
    with tempfile.TemporaryDirectory(prefix="moray-") as temporary:
        described = Path(temporary) / name.rpartition("/")[2]
        described.mkdir()
        check_places(described, store)
        model = find_model(name, revision)
        weights = fetch_description(model, described)
        config = load_config(described)
        checkpoint = RemoteCheckpoint.open(described).reshaped(expert_shapes(config))
        checkpoint.model = model
        checkpoint.fingerprint = _fingerprint(checkpoint, weights)
        folder = store / DOWNLOAD_FOLDER if stream else _snapshot_folder(model)
        told = (lambda what: progress.advance(0, what)) if progress else (lambda what: None)
        supply = HubSupply(model, weights, folder, store, told, stream=stream)

        def hashes() -> dict[str, FileHash]:
            return {
                file.name: FileHash(file.num_bytes, file.sha256 or supply.hashes.get(file.name)) for file in weights
            }

        origin = _origin(name, model.revision, model.commit)
        material = Material(described, config, checkpoint, adapters, supply, origin, hashes)
        return make_store(material, store, recipe, workers, progress, announce)


def _convert_cached(
    name: str,
    store: Path,
    recipe: Recipe | str | None,
    adapters: Sequence[Adapter],
    revision: str | None,
    workers: int | None,
    progress: Progress | None,
    announce: Callable[[Needs], None] | None,
) -> Manifest:
    folder = find_cached(name, revision)
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder).reshaped(expert_shapes(config))
    check_places(folder, store)
    with hash_in_background(weight_files(checkpoint)) as hashes:
        origin = _origin(name, revision or "main", folder.name)
        material = Material(folder, config, checkpoint, adapters, LocalSupply(), origin, hashes)
        return make_store(material, store, recipe, workers, progress, announce)


def cached_store(
    name: str, recipe: str, revision: str | None, make: Callable[[Path], None], root: Path | None = None
) -> Path:
    """The store of a hub id in moray's cache, made by ``make`` the first time; then the hub is not asked again.

    ``make`` is given the directory, which may hold an unfinished store. Raises StoreError if it made none.
    """
    cache = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moray" / "stores"
    store = cache.joinpath(*name.split("/"), quote(revision or "main", safe=""), quote(recipe, safe=",:="))
    if not (store / MANIFEST_NAME).exists():
        make(store)
    if not (store / MANIFEST_NAME).exists():
        raise StoreError(f"{store} was not finished; run the same command again")
    return store


def _origin(name: str, revision: str, commit: str) -> dict[str, str]:
    return {"checkpoint": name, "revision": revision, "commit": commit}


def _fingerprint(checkpoint: Checkpoint, weights: list[HubFile]) -> str:
    """Headers, and the hub's names for the content: the same before and after files are fetched."""
    parts = [checkpoint.fingerprint, *(f"{file.name}\0{file.num_bytes}\0{file.blob}" for file in weights)]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _snapshot_folder(model: HubModel) -> Path:
    """Where the client's cache shows the commit; it is there, since config.json has been fetched."""
    return find_cached(model.name, model.commit)
