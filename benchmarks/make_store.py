"""Write a store of a random model directly, without a checkpoint and without quantizing: for speed, not for quality.

    python benchmarks/make_store.py /tmp/store --preset mixtral-layer --recipe experts=hqq4:64,attention=hqq4:64
    python benchmarks/make_store.py /tmp/store --preset qwen3-30b-a3b --layers 4

The store is what `moray convert` plans for such a model's checkpoint in bf16, byte range by byte range, but codes are
uniformly random. The zero of every group is the middle code, so that weights have mean 0 (else every token routes to
the same experts), and the scale gives them std 0.02 (embeddings: 1); routers and plain weights are normal with that
std, norms are ones. One shard, or one tensor of the trunk, is held in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import xxhash
from geometry import WEIGHT_STD, Geometry, add_geometry, config_of, geometry_of, std_of, tensors_of
from make_checkpoint import Noise

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.plan import Plan, make_plan
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.convert.tensors import TensorEntry
from moray.runtime.layout.packed import ROWS, SCALE_FACTOR, Bytes, PackedSpec, Quantized, pack_quantized
from moray.runtime.layout.shard import ExpertKey, build_shard
from moray.runtime.model.families import load_config
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry
from moray.runtime.store.store import checksum_file

_BLOCK_BYTES = 16 << 20
_ONE = 0x3F80  # 1.0 in bf16


class RandomWeights:
    """The bytes of random tensors."""

    def __init__(self, seed: int) -> None:
        self._noise = Noise(seed)
        self._random = np.random.default_rng(seed)
        self._bytes = self._random.integers(0, 256, _BLOCK_BYTES, dtype=np.uint8)
        self._metas: dict[tuple[PackedSpec, float], Bytes] = {}

    def pack(self, spec: PackedSpec, std: float) -> Bytes:
        """uint8 [num_bytes]. Quantized (any codes are valid codes) or bf16."""
        if not spec.is_quantized:
            assert spec.encoding == "bf16"
            return self.plain(spec.num_bytes // 2, std)
        packed = np.empty((spec.num_blocks, spec.block_bytes), dtype=np.uint8)
        for block in packed:
            start = int(self._random.integers(0, _BLOCK_BYTES - spec.code_bytes))
            block[: spec.code_bytes] = self._bytes[start : start + spec.code_bytes]
        packed[:, spec.code_bytes :] = self._meta(spec, std)
        return packed.reshape(-1)

    def plain(self, count: int, std: float) -> Bytes:
        """So many bf16 values."""
        return np.concatenate(list(self._noise.slices(count, std))).view(np.uint8)

    def _meta(self, spec: PackedSpec, std: float) -> Bytes:
        """Scales and zeros of a row block: the middle code, and what gives uniform codes the wanted spread."""
        if (spec, std) not in self._metas:
            levels = 2**spec.bits
            half = np.float16(std / np.sqrt((levels**2 - 1) / 12) / SCALE_FACTOR)  # any kind of meta can hold it
            scales = np.full((ROWS, spec.num_groups), float(half) * SCALE_FACTOR, dtype=np.float32)
            codes = np.zeros((ROWS, spec.columns), dtype=np.uint8)
            block = PackedSpec(ROWS, spec.columns, spec.encoding, spec.group, spec.meta)
            packed = pack_quantized(Quantized(codes, scales, np.full_like(scales, (levels - 1) / 2)), block)
            self._metas[spec, std] = packed[spec.code_bytes :]
        return self._metas[spec, std]


def write_store(directory: Path, geometry: Geometry, recipe: Recipe, *, seed: int = 0) -> Path:
    """Write a store into a new directory. Returns it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    plan = make_plan(load_config(directory), _imaginary_checkpoint(directory, geometry), recipe)
    weights = RandomWeights(seed)
    _write_trunk(directory / TRUNK_NAME, plan, weights)
    manifest = Manifest(
        family=geometry.family,
        recipe=recipe.to_dict(),
        layers=plan.layers,
        shards=_write_shards(directory, plan.shards, weights),
        trunk_bytes=plan.trunk.num_bytes,
        trunk_checksum=checksum_file(directory / TRUNK_NAME),
        packed_trunk=plan.trunk.packed,
        source={"checkpoint": "random weights of benchmarks/make_store.py"},
        num_parameters=plan.num_parameters,
        notes=plan.notes,
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.encode())
    return directory


def _imaginary_checkpoint(directory: Path, geometry: Geometry) -> Checkpoint:
    """Names, shapes and types of a checkpoint, which is all that a plan reads."""
    entries = {t.name: TensorEntry("", "BF16", t.shape, 0, t.num_bytes) for t in tensors_of(geometry)}
    return Checkpoint(directory, entries, "")


def _write_shards(
    directory: Path, pieces: dict[ExpertKey, Piece], weights: RandomWeights
) -> dict[ExpertKey, ShardEntry]:
    entries = {}
    for key, piece in pieces.items():
        assert piece.shard is not None
        tensors = {plan.name: weights.pack(plan.spec, WEIGHT_STD) for plan in piece.tensors if plan.spec}
        shard = build_shard(*piece.shard, tensors)
        with (directory / piece.file).open("ab") as file:
            assert file.tell() == piece.offset
            file.write(shard.data)
        entries[key] = ShardEntry(piece.file, piece.offset, piece.num_bytes, xxhash.xxh3_64_intdigest(shard.data))
    return entries


def _write_trunk(path: Path, plan: Plan, weights: RandomWeights) -> None:
    with path.open("wb") as file:
        file.write(plan.trunk.header)
        for piece in plan.trunk.pieces:
            assert file.tell() == piece.offset
            file.write(_trunk_tensor(piece, weights).data)


def _trunk_tensor(piece: Piece, weights: RandomWeights) -> Bytes:
    (tensor,) = piece.tensors
    if tensor.spec is not None:
        return weights.pack(tensor.spec, std_of(tensor.name))
    if tensor.name.endswith("norm.weight"):
        return np.full(piece.num_bytes // 2, _ONE, dtype=np.uint16).view(np.uint8)
    return weights.plain(piece.num_bytes // 2, std_of(tensor.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"as moray convert's ({DEFAULT_RECIPE})")
    parser.add_argument("--seed", type=int, default=0)
    add_geometry(parser, "mixtral-layer")
    arguments = parser.parse_args()
    geometry = geometry_of(arguments)
    write_store(arguments.directory, geometry, Recipe.parse(arguments.recipe), seed=arguments.seed)
    size = sum(file.stat().st_size for file in arguments.directory.iterdir())
    print(f"{arguments.directory}: {geometry.num_parameters:,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
