"""Write a store of a random model directly, without a checkpoint and without quantizing: for speed, not for quality.

    python benchmarks/make_store.py /tmp/store --preset mixtral-layer --recipe experts=hqq4:64,attention=hqq4:64
    python benchmarks/make_store.py /tmp/store --preset qwen3-30b-a3b --layers 4

The store is what `moray convert` plans for such a model's checkpoint in bf16, byte range by byte range, but codes are
uniformly random. The zero of every group is the middle code, so that weights have mean 0 (else every token routes to
the same experts), and the scale gives them std 0.02 (embeddings: 1); routers and plain weights are normal with that
std, norms are ones. One shard, or one tensor of the trunk, is held in memory at a time, and files are written past the
page cache.

--routing trace:FILE,... or --routing random plants experts to choose for each token id, and makes a greedy generation
walk from id t to t + 1 (replay.py, planted.py). What the tokens choose is then in STORE.replay.npz, and what was
predicted for them in STORE.predictions.npz. make_gguf.py with the same --routing, --seed and sizes plants the same.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from direct_file import DirectWriter
from geometry import WEIGHT_STD, Geometry, add_geometry, config_of, geometry_of, std_of, tensors_of
from make_checkpoint import Noise
from planted import HEAD_UNIT, UNIT, Levels, Planted, RowsOf, role_of
from replay import Replay
from routing import add_routing, replay_of

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.plan import Plan, make_plan
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.convert.tensors import TensorEntry
from moray.runtime.layout.packed import (
    ROWS,
    SCALE_FACTOR,
    Bytes,
    PackedSpec,
    Quantized,
    pack_plain,
    pack_quantized,
)
from moray.runtime.layout.shard import ExpertKey, build_shard
from moray.runtime.memory import reuse_freed_memory
from moray.runtime.model.families import load_config
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry
from moray.runtime.store.store import checksum_file

_BLOCK_BYTES = 16 << 20
_ONE = 0x3F80  # 1.0 in bf16
_ROWS_AT_ONCE = 1024  # of a matrix with planted values


class RandomWeights:
    """The bytes of random tensors."""

    def __init__(self, seed: int) -> None:
        self._noise = Noise(seed)
        self._random = np.random.default_rng(seed)
        self._bytes = self._random.integers(0, 256, _BLOCK_BYTES, dtype=np.uint8)
        self._metas: dict[tuple[PackedSpec, float], Bytes] = {}

    def pack(self, spec: PackedSpec, std: float, *, zero_rows: int = 0) -> Bytes:
        """uint8 [num_bytes]. Quantized (any codes are valid codes) or bf16. The first ``zero_rows`` rows are zero."""
        assert zero_rows % ROWS == 0
        if not spec.is_quantized:
            assert spec.encoding == "bf16"
            data = self.plain(spec.num_bytes // 2, std).copy()
            data[: zero_rows // ROWS * spec.block_bytes] = 0
            return data
        packed = np.empty((spec.num_blocks, spec.block_bytes), dtype=np.uint8)
        for block in packed:
            start = int(self._random.integers(0, _BLOCK_BYTES - spec.code_bytes))
            block[: spec.code_bytes] = self._bytes[start : start + spec.code_bytes]
        packed[:, spec.code_bytes :] = self._meta(spec, std)
        packed[: zero_rows // ROWS] = 0  # zero scales
        return packed.reshape(-1)

    def pack_planted(self, spec: PackedSpec, rows_of: RowsOf, unit: float, std: float) -> Bytes:
        """uint8 [num_bytes]. First columns of each row: levels times ``unit``, others random, or 0 (std 0)."""
        if spec.is_quantized and (spec.bits < 4 or spec.meta != "f16"):
            raise SystemExit(f"{spec.encoding} with meta {spec.meta} cannot hold planted rows; embeddings=hqq4:64 can")
        parts = []
        for first in range(0, spec.rows, _ROWS_AT_ONCE):
            part = replace(spec, rows=min(_ROWS_AT_ONCE, spec.rows - first))
            levels = rows_of(first, part.rows)
            pack = self._planted_codes if spec.is_quantized else self._planted_halves
            parts.append(pack(part, levels, unit, std))
        return np.concatenate(parts)

    def _planted_codes(self, spec: PackedSpec, levels: Levels, unit: float, std: float) -> Bytes:
        planted, middle = levels.shape[1], 2 ** (spec.bits - 1)
        groups = planted // spec.group
        assert planted % spec.group == 0
        codes = np.full((spec.rows, spec.columns), middle, dtype=np.uint8)
        scales = np.full((spec.rows, spec.num_groups), unit, dtype=np.float32)
        zeros = np.full_like(scales, middle)
        codes[:, :planted] = levels + np.int16(middle)
        if std:
            codes[:, planted:] = self._random.integers(0, 2 * middle, codes[:, planted:].shape, dtype=np.uint8)
            scales[:, groups:] = _scale(spec.bits, std)
            zeros[:, groups:] = middle - 0.5
        return pack_quantized(Quantized(codes, scales, zeros), spec)

    def _planted_halves(self, spec: PackedSpec, levels: Levels, unit: float, std: float) -> Bytes:
        values = np.zeros((spec.rows, spec.columns), dtype=np.uint16)
        if std:
            values[:] = self.plain(values.size, std).view(np.uint16).reshape(values.shape)
        values[:, : levels.shape[1]] = (levels * np.float32(unit)).view(np.uint32) >> 16
        return pack_plain(values, spec)

    def plain(self, count: int, std: float) -> Bytes:
        """So many bf16 values."""
        return np.concatenate(list(self._noise.slices(count, std))).view(np.uint8)

    def _meta(self, spec: PackedSpec, std: float) -> Bytes:
        """Scales and zeros of a row block: the middle code, and what gives uniform codes the wanted spread."""
        if (spec, std) not in self._metas:
            scales = np.full((ROWS, spec.num_groups), _scale(spec.bits, std), dtype=np.float32)
            codes = np.zeros((ROWS, spec.columns), dtype=np.uint8)
            block = PackedSpec(ROWS, spec.columns, spec.encoding, spec.group, spec.meta)
            packed = pack_quantized(Quantized(codes, scales, np.full_like(scales, (2**spec.bits - 1) / 2)), block)
            self._metas[spec, std] = packed[spec.code_bytes :]
        return self._metas[spec, std]


def _scale(bits: int, std: float) -> float:
    """What gives uniform codes this spread; any kind of meta can hold it."""
    return float(np.float16(std / np.sqrt((4**bits - 1) / 12) / SCALE_FACTOR)) * SCALE_FACTOR


def write_store(
    directory: Path, geometry: Geometry, recipe: Recipe, *, seed: int = 0, replay: Replay | None = None
) -> Path:
    """Write a store into a new directory, and beside it what is replayed. Returns it."""
    planted = Planted(replay, geometry.hidden) if replay else None
    if planted:
        planted.check()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    plan = make_plan(load_config(directory), _imaginary_checkpoint(directory, geometry), recipe)
    weights = RandomWeights(seed)
    _write_trunk(directory / TRUNK_NAME, plan, weights, planted)
    manifest = Manifest(
        family=geometry.family,
        recipe=recipe.to_dict(),
        layers=plan.layers,
        shards=_write_shards(directory, plan.shards, weights, planted.num_dims if planted else 0),
        trunk_bytes=plan.trunk.num_bytes,
        trunk_checksum=checksum_file(directory / TRUNK_NAME),
        packed_trunk=plan.trunk.packed,
        source={"checkpoint": "random weights of benchmarks/make_store.py"},
        num_parameters=plan.num_parameters,
        notes=plan.notes,
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.encode())
    if replay:
        replay.save(directory)
    return directory


def _imaginary_checkpoint(directory: Path, geometry: Geometry) -> Checkpoint:
    """Names, shapes and types of a checkpoint, which is all that a plan reads."""
    entries = {t.name: TensorEntry("", "BF16", t.shape, 0, t.num_bytes) for t in tensors_of(geometry)}
    return Checkpoint(directory, entries, "")


def _write_shards(
    directory: Path, pieces: dict[ExpertKey, Piece], weights: RandomWeights, reserved: int
) -> dict[ExpertKey, ShardEntry]:
    entries, files = {}, {}
    with ExitStack() as stack:
        for key, piece in pieces.items():
            assert piece.shard is not None
            tensors = {
                plan.name: weights.pack(plan.spec, WEIGHT_STD, zero_rows=reserved if plan.name == "down_proj" else 0)
                for plan in piece.tensors
                if plan.spec
            }
            shard = build_shard(*piece.shard, tensors)
            if piece.file not in files:
                stack.pop_all().close()  # files come one after the other
                files[piece.file] = stack.enter_context(DirectWriter(directory / piece.file))
            assert files[piece.file].tell() == piece.offset
            files[piece.file].write(shard)
            entries[key] = ShardEntry(piece.file, piece.offset, piece.num_bytes, xxhash.xxh3_64_intdigest(shard.data))
    return entries


def _write_trunk(path: Path, plan: Plan, weights: RandomWeights, planted: Planted | None) -> None:
    with DirectWriter(path) as file:
        file.write(plan.trunk.header)
        for piece in plan.trunk.pieces:
            assert file.tell() == piece.offset
            file.write(_trunk_tensor(piece, weights, planted))


def _trunk_tensor(piece: Piece, weights: RandomWeights, planted: Planted | None) -> Bytes:
    (tensor,) = piece.tensors
    std = std_of(tensor.name)
    role, layer = role_of(tensor.name) if planted else ("", 0)
    if planted and tensor.spec and role == "embedding":
        return weights.pack_planted(tensor.spec, planted.embedding, UNIT, std)
    if planted and tensor.spec and role == "head":
        return weights.pack_planted(tensor.spec, planted.head, HEAD_UNIT, 0)
    if planted and role == "router":
        return (planted.router(layer).view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    if tensor.spec is not None:
        return weights.pack(tensor.spec, std, zero_rows=planted.num_dims if planted and role == "output" else 0)
    if tensor.name.endswith("norm.weight"):
        return np.full(piece.num_bytes // 2, _ONE, dtype=np.uint16).view(np.uint8)
    return weights.plain(piece.num_bytes // 2, std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"as moray convert's ({DEFAULT_RECIPE})")
    parser.add_argument("--seed", type=int, default=0)
    add_geometry(parser, "mixtral-layer")
    add_routing(parser)
    arguments = parser.parse_args()
    geometry = geometry_of(arguments)
    reuse_freed_memory()
    replay = replay_of(arguments.routing, geometry, seed=arguments.seed)
    write_store(arguments.directory, geometry, Recipe.parse(arguments.recipe), seed=arguments.seed, replay=replay)
    size = sum(file.stat().st_size for file in arguments.directory.iterdir())
    print(f"{arguments.directory}: {geometry.num_parameters:,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
