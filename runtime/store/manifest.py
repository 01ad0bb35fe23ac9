"""The manifest: what a store holds, written last, so that a store without one is incomplete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import xxhash

from moray.runtime.errors import StoreError
from moray.runtime.layout.packed import LAYOUT_ID, PackedSpec
from moray.runtime.layout.shard import (
    ALIGNMENT,
    ExpertKey,
    ShardLayout,
    decode_spec,
    decode_tensor,
    encode_spec,
    encode_tensor,
)
from moray.runtime.paths import is_outside
from moray.runtime.store.migrations import FORMAT_VERSION, MIGRATIONS, migrate

MANIFEST_NAME = "manifest.msgpack"
TRUNK_NAME = "trunk.safetensors"
NUMERICS_ID = "int8-v2"  # the rules of class int8 (docs/format.md); another rule is another id


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Where one shard lies on disk."""

    file: str
    offset: int  # bytes, a multiple of 4096
    num_bytes: int
    checksum: int  # xxh3-64 of all its bytes


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """One MoE layer: the path of its experts module in the model, and how its shards are laid out.

    ``activation`` is "swiglu" if an expert is down(silu(gate) * up), which the kernels compute by themselves;
    "module" if it takes the code of the family's experts module in transformers.
    """

    module: str
    num_experts: int
    layout: ShardLayout
    activation: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known about a store without reading its weights."""

    family: str  # transformers model_type
    recipe: dict[str, str]  # component -> scheme, e.g. {"experts": "hqq4:64"}
    layers: tuple[ExpertsLayer, ...]
    shards: dict[ExpertKey, ShardEntry]
    trunk_bytes: int
    trunk_checksum: int  # xxh3-64 of trunk.safetensors
    packed_trunk: dict[str, PackedSpec]  # module path -> its packed weight
    source: dict[str, str]  # name, revision, time of conversion: for people, never interpreted
    versions: dict[str, str] = field(default_factory=dict)  # of what converted it, likewise
    format_version: int = FORMAT_VERSION
    layout_id: str = LAYOUT_ID
    numerics_id: str = NUMERICS_ID
    num_parameters: int = 0
    notes: list[str] = field(default_factory=list)  # per-tensor fallbacks, in words

    @property
    def fingerprint(self) -> str:
        """Names this exact content: two stores with one fingerprint hold the same weights."""
        content = replace(self, source={}, versions={})  # not when and by what it was converted
        return xxhash.xxh3_128_hexdigest(content.encode())

    @property
    def expert_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.shards.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest shard: what an arena slot must hold."""
        return max(entry.num_bytes for entry in self.shards.values())

    @property
    def num_expert_parameters(self) -> int:
        """Weights and biases of all routed experts."""
        return sum(
            layer.num_experts * sum(t.spec.rows * t.spec.columns if t.spec else t.length for t in layer.layout.tensors)
            for layer in self.layers
        )

    @property
    def bits_per_expert_weight(self) -> float:
        """With scales, zeros and padding."""
        return 8 * self.expert_bytes / self.num_expert_parameters

    @property
    def bits_per_weight(self) -> float:
        """Of the whole store, with scales, zeros and padding."""
        return 8 * (self.expert_bytes + self.trunk_bytes) / self.num_parameters

    def validate(self) -> None:
        """Raises ValueError or TypeError unless every value has its type, and every range lies where it can."""
        texts = [self.family, self.numerics_id, *self.packed_trunk, *(text for pair in self._words for text in pair)]
        texts += [*self.notes, *(text for x in self.layers for text in (x.module, x.activation))]
        if not isinstance(self.notes, list) or any(
            not isinstance(text, str) or not text.isprintable() for text in texts
        ):
            raise TypeError("text that is none")
        sizes = [self.trunk_bytes, self.trunk_checksum, self.num_parameters, *(x.num_experts for x in self.layers)]
        if any(type(n) is not int or n < 0 for n in sizes) or not self.shards:
            raise ValueError("a size that is none")
        for layer in self.layers:
            layer.layout.validate()
        for key, entry in self.shards.items():
            numbers = (entry.offset, entry.num_bytes, entry.checksum)
            if any(type(n) is not int or n < 0 for n in numbers) or entry.offset % ALIGNMENT:
                raise ValueError(f"shard of expert {tuple(key)} at {numbers}")
            if entry.num_bytes != self.layers[key.layer].layout.num_bytes:
                raise ValueError(f"shard of expert {tuple(key)} has {entry.num_bytes} bytes")
            if not isinstance(entry.file, str) or not entry.file.isprintable() or is_outside(entry.file):
                raise ValueError(f"a shard in the file {entry.file!r:.80}")

    @property
    def _words(self) -> list[tuple[Any, Any]]:
        return [*self.recipe.items(), *self.source.items()]

    def encode(self) -> bytes:
        layouts = list(dict.fromkeys(layer.layout for layer in self.layers))
        document = {
            "format": self.format_version,
            "layout": self.layout_id,
            "numerics": self.numerics_id,
            "family": self.family,
            "recipe": self.recipe,
            "layouts": [{"bytes": x.num_bytes, "tensors": [encode_tensor(t) for t in x.tensors]} for x in layouts],
            "layers": [
                {
                    "module": x.module,
                    "experts": x.num_experts,
                    "layout": layouts.index(x.layout),
                    "activation": x.activation,
                }
                for x in self.layers
            ],
            "shards": [[*k, e.file, e.offset, e.num_bytes, e.checksum] for k, e in self.shards.items()],
            "trunk": {
                "bytes": self.trunk_bytes,
                "xxh3": self.trunk_checksum,
                "packed": {name: encode_spec(spec) for name, spec in self.packed_trunk.items()},
            },
            "source": self.source,
            "versions": self.versions,
            "parameters": self.num_parameters,
            "notes": self.notes,
        }
        packed: bytes = msgpack.packb(document)
        return packed


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest. ``where`` names it in errors. Raises StoreError."""
    try:
        document = msgpack.unpackb(data)
        version = document["format"]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise StoreError(f"{where} is not a manifest ({error}); convert the checkpoint again") from error
    if type(version) is not int or version not in {FORMAT_VERSION, *MIGRATIONS}:
        raise StoreError(
            f"{where} has store format {version!r:.40}, this moray reads formats up to {FORMAT_VERSION}; "
            + ("upgrade moray" if isinstance(version, int) and version > FORMAT_VERSION else "convert again")
        )
    if document.get("layout") != LAYOUT_ID:
        raise StoreError(f"{where} has layout {document.get('layout')!r:.40}, expected {LAYOUT_ID}; convert again")
    try:
        return _decode(migrate(document))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StoreError(f"{where} is damaged ({error!r}); convert the checkpoint again") from error


def _decode(document: Mapping[str, Any]) -> Manifest:
    layouts = [ShardLayout(tuple(decode_tensor(t) for t in x["tensors"]), x["bytes"]) for x in document["layouts"]]
    layers = tuple(
        ExpertsLayer(x["module"], x["experts"], layouts[x["layout"]], x["activation"]) for x in document["layers"]
    )
    shards = {ExpertKey(x[0], x[1]): ShardEntry(x[2], x[3], x[4], x[5]) for x in document["shards"]}
    expected = {ExpertKey(i, e) for i, layer in enumerate(layers) for e in range(layer.num_experts)}
    if shards.keys() != expected:
        raise ValueError(f"{len(shards)} shards listed, {len(expected)} expected")
    trunk = document["trunk"]
    manifest = Manifest(
        family=document["family"],
        recipe=document["recipe"],
        layers=layers,
        shards=shards,
        trunk_bytes=trunk["bytes"],
        trunk_checksum=trunk["xxh3"],
        packed_trunk={name: decode_spec(entry) for name, entry in trunk["packed"].items()},
        source=document["source"],
        versions=document["versions"],
        numerics_id=document["numerics"],
        num_parameters=document["parameters"],
        notes=document["notes"],
    )
    manifest.validate()
    return manifest
