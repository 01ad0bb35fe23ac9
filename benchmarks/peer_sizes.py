"""Bytes and bits of a store and of a GGUF file, by class of tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gguf_file import read_tensors
from gguf_model import class_of, group_tensors

from moray.runtime.layout.packed import PackedSpec
from moray.runtime.store.manifest import Manifest

CLASSES = ("experts", "attention", "head", "embedding", "norms, routers")


@dataclass
class ClassSize:
    """One class of one model."""

    num_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # type -> weights

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def bits(self) -> float:
        return 8 * self.num_bytes / self.count if self.count else 0.0

    @property
    def types(self) -> str:
        """With their shares of the weights, if there are several."""
        if len(self.counts) == 1:
            return next(iter(self.counts))
        return " ".join(f"{kind} {count / self.count:.0%}" for kind, count in self.counts.items())

    def add(self, kind: str, num_bytes: int, count: int) -> None:
        self.num_bytes += num_bytes
        self.counts[kind] = self.counts.get(kind, 0) + count


def store_sizes(manifest: Manifest) -> dict[str, ClassSize]:
    """Experts with their padding. Norms and routers are what is left of the trunk's file, with its header."""
    sizes = {name: ClassSize() for name in CLASSES}
    for layer in manifest.layers:
        for spec in (tensor.spec for tensor in layer.layout.tensors if tensor.spec):
            sizes["experts"].add(_name(spec), 0, layer.num_experts * spec.rows * spec.columns)
    sizes["experts"].num_bytes = manifest.expert_bytes
    for path, spec in manifest.packed_trunk.items():
        (name,) = group_tensors([f"{path}.weight"])
        sizes[class_of(name)].add(_name(spec), spec.num_bytes, spec.rows * spec.columns)
    packed_bytes = sum(spec.num_bytes for spec in manifest.packed_trunk.values())
    left = manifest.num_parameters - sum(size.count for size in sizes.values())
    sizes["norms, routers"].add("16 bits", manifest.trunk_bytes - packed_bytes, left)
    return sizes


def gguf_sizes(path: Path) -> dict[str, ClassSize]:
    sizes = {name: ClassSize() for name in CLASSES}
    for tensor in read_tensors(path):
        sizes[class_of(tensor.name)].add(tensor.type, tensor.num_bytes, tensor.count)
    return sizes


def total_bits(sizes: dict[str, ClassSize]) -> float:
    """Bits a weight, of the whole model."""
    return 8 * sum(size.num_bytes for size in sizes.values()) / sum(size.count for size in sizes.values())


def _name(spec: PackedSpec) -> str:
    return spec.encoding if not spec.is_quantized else f"{spec.encoding}:{spec.group}"
