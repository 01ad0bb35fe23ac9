"""What two stores of one architecture differ in: what they say of themselves, and the weights they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import safe_open

from moray.runtime.arrays import Bytes, Floats
from moray.runtime.convert.quantize import dequantize_rows
from moray.runtime.errors import StoreError
from moray.runtime.layout.packed import PackedSpec, unpack_plain, unpack_quantized
from moray.runtime.layout.shard import ExpertKey, ShardLayout
from moray.runtime.store.store import Store

_PACKED = ".packed"


@dataclass(slots=True)
class TensorDifference:
    """Tensors of one name, layers and experts folded. ``error``: norm(b - a) / norm(a) over all of them."""

    name: str
    num_tensors: int = 0
    num_different: int = 0  # in value
    squared_error: float = 0.0
    squared_norm: float = 0.0
    largest: float = 0.0  # absolute difference

    @property
    def error(self) -> float:
        if self.squared_error == 0:
            return 0.0
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm else float("inf")

    def add(self, a: Floats, b: Floats) -> None:
        self.num_tensors += 1
        difference = b.astype(np.float64) - a
        largest = float(np.abs(difference).max(initial=0.0))
        self.num_different += largest > 0
        self.squared_error += float(np.square(difference).sum())
        self.squared_norm += float(np.square(a, dtype=np.float64).sum())
        self.largest = max(self.largest, largest)


@dataclass(slots=True)
class Difference:
    """``facts``: name -> what each store says, where they do not say the same. ``same``: parts equal bit for bit."""

    facts: dict[str, tuple[str, str]]
    tensors: dict[str, TensorDifference] = field(default_factory=dict)
    num_same: int = 0
    num_parts: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the weights are the same."""
        return all(tensor.num_different == 0 for tensor in self.tensors.values())


def compare(a: Store, b: Store, difference: Difference) -> Iterator[str]:
    """Fill ``difference``, yielding the name of each part as it is done; shards and trunk that are equal in bytes and
    layout are not unpacked. Holds one expert of each in memory. Raises StoreError if they are of other architectures.
    """
    _require_comparable(a, b)
    for key, entry in a.manifest.shards.items():
        other = b.manifest.shards[key]
        layouts = a.manifest.layers[key.layer].layout, b.manifest.layers[key.layer].layout
        difference.num_parts += 1
        if entry.checksum == other.checksum and layouts[0] == layouts[1]:
            difference.num_same += 1
        else:
            _compare_shards(a, b, key, layouts, difference)
        yield f"expert {key.expert} of MoE layer {key.layer}"
    difference.num_parts += 1
    if a.manifest.trunk_checksum == b.manifest.trunk_checksum:
        difference.num_same += 1
    else:
        yield from _compare_trunks(a, b, difference)
    yield "trunk"


def describe(a: Store, b: Store) -> Difference:
    """What the manifests say that is not the same."""
    ours, theirs = _facts(a), _facts(b)
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return Difference({name: (ours.get(name, ""), theirs.get(name, "")) for name in names})


def _facts(store: Store) -> dict[str, str]:
    manifest = store.manifest
    facts = {"family": manifest.family, "layout": manifest.layout_id, "numerics": manifest.numerics_id}
    facts |= {f"recipe, {component}": scheme for component, scheme in manifest.recipe.items()}
    facts |= {f"source, {name}": value for name, value in manifest.source.items()}
    facts |= {f"version of {name}": value for name, value in manifest.versions.items()}
    return facts | {"notes": "; ".join(manifest.notes)}


def _require_comparable(a: Store, b: Store) -> None:
    shapes = [
        (store.manifest.family, [(layer.module, layer.num_experts) for layer in store.manifest.layers])
        for store in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise StoreError(
            f"{a.path} ({a.manifest.family}) and {b.path} ({b.manifest.family}) are of different architectures; "
            "only stores with the same layers and experts can be compared"
        )


def _compare_shards(
    a: Store, b: Store, key: ExpertKey, layouts: tuple[ShardLayout, ShardLayout], difference: Difference
) -> None:
    shards = a.read_shard(key), b.read_shard(key)
    path = f"{_fold(a.manifest.layers[key.layer].module)}.*"
    for tensor in layouts[0].tensors:
        other = layouts[1][tensor.name]
        values = [
            _unpack(shard[t.offset : t.offset + t.num_bytes], t.spec)
            for shard, t in zip(shards, (tensor, other), strict=True)
        ]
        _add(difference, f"{path}.{tensor.name}", values[0], values[1])


def _compare_trunks(a: Store, b: Store, difference: Difference) -> Iterator[str]:
    with safe_open(a.trunk_path, "pt") as ours, safe_open(b.trunk_path, "pt") as theirs:
        names = [_names(list(file.keys())) for file in (ours, theirs)]
        only = sorted(names[0].keys() ^ names[1].keys())
        if only:
            raise StoreError(f"only one of {a.path} and {b.path} has a tensor {only[0]}; they are of different models")
        for name in sorted(names[0]):
            values = [
                _trunk_values(store, name, file.get_tensor(keys[name]))
                for store, file, keys in ((a, ours, names[0]), (b, theirs, names[1]))
            ]
            _add(difference, _fold(name), values[0], values[1])
            yield name


def _names(keys: list[str]) -> dict[str, str]:
    """Keys by the module whose weight they are, packed or not; others by themselves."""
    return {key.removesuffix(_PACKED).removesuffix(".weight"): key for key in keys}


def _trunk_values(store: Store, name: str, tensor: torch.Tensor) -> Floats:
    spec = store.manifest.packed_trunk.get(name)
    values: Floats = tensor.float().numpy() if spec is None else _unpack(tensor.numpy(), spec)
    return values


def _unpack(data: Bytes, spec: PackedSpec | None) -> Floats:
    if spec is None:
        return data.view(np.float32)
    if spec.is_quantized:
        values: Floats = dequantize_rows(unpack_quantized(data, spec)).numpy()
        return values
    plain = unpack_plain(data, spec)
    if spec.encoding == "bf16":
        return (plain.astype(np.uint32) << 16).view(np.float32)
    return plain.astype(np.float32)


def _add(difference: Difference, name: str, a: Floats, b: Floats) -> None:
    if a.shape != b.shape:
        raise StoreError(f"{name} has shape {list(a.shape)} in one store and {list(b.shape)} in the other")
    difference.tensors.setdefault(name, TensorDifference(name)).add(a, b)


def _fold(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", name)
