"""present.msgpack: which shards of a partial store are here. A store without one is whole.

A map: ``format`` 1, ``store`` (the fingerprint of the manifest it goes with), ``layers``: for each MoE layer the runs
of experts that are here, as [first, end, first, end, ...] with ends excluded. It is replaced whole, and only after the
shards that it names are on the disk. Files without any shard that is here may be missing; in the others the place of
a shard that is not here has no meaning (usually a hole).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack

from moray.runtime.errors import StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.receipt import write_aside

PRESENT_NAME = "present.msgpack"
_FORMAT = 1


def read_presence(store: Path, manifest: Manifest) -> frozenset[ExpertKey] | None:
    """The shards that are here; None: all. Raises StoreError if the file is damaged or of another store."""
    file = store / PRESENT_NAME
    try:
        document = msgpack.unpackb(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise StoreError(f"{file} cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise StoreError(f"{file} is not a list of shards of format {_FORMAT}; {_REMEDY}")
    if document.get("store") != manifest.fingerprint:
        raise StoreError(f"{file} goes with another store ({document.get('store')!r:.40}); {_REMEDY}")
    try:
        return keys_of(document["layers"], manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error!r}); {_REMEDY}") from error


def write_presence(store: Path, manifest: Manifest, keys: Iterable[ExpertKey]) -> None:
    """Say that these shards are here, all of them on the disk by now."""
    document = {"format": _FORMAT, "store": manifest.fingerprint, "layers": runs_of(keys, manifest)}
    write_aside(store / PRESENT_NAME, msgpack.packb(document))


_REMEDY = "delete it and run `moray store sync SOURCE` into this store again"


def runs_of(keys: Iterable[ExpertKey], manifest: Manifest) -> list[list[int]]:
    """[layer]: experts as runs, [first, end, first, end, ...]."""
    chosen = set(keys)
    return [
        [edge for edge in range(layer.num_experts + 1) if ((index, edge) in chosen) != ((index, edge - 1) in chosen)]
        for index, layer in enumerate(manifest.layers)
    ]


def keys_of(layers: Any, manifest: Manifest) -> frozenset[ExpertKey]:
    """The reverse of ``runs_of``, for what comes from outside. Raises ValueError or TypeError."""
    keys: set[ExpertKey] = set()
    for layer, (info, runs) in enumerate(zip(manifest.layers, layers, strict=True)):
        if runs != sorted(set(runs)) or len(runs) % 2 or any(type(n) is not int for n in runs):
            raise ValueError(f"runs {runs!r:.40} of layer {layer}")
        if runs and not 0 <= runs[0] < runs[-1] <= info.num_experts:
            raise ValueError(f"runs {runs!r:.40} of layer {layer}")
        for first, end in zip(runs[::2], runs[1::2], strict=True):
            keys.update(ExpertKey(layer, expert) for expert in range(first, end))
    return frozenset(keys)
