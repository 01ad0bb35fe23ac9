"""Write a store of a random Mixtral directly, without a checkpoint and without quantizing: for speed, not for quality.

    python benchmarks/make_store.py /tmp/store --preset mixtral-layer --recipe experts=hqq4:64,attention=hqq4:64

Shards and packed weights are laid out as `moray convert` lays out such a model's, but codes are uniformly random. The
zero of every group is the middle code, so that weights have mean 0 (else every token routes to the same experts), and
the scale gives them std 0.02. One shard is held in memory at a time; the trunk as a whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import xxhash
from make_checkpoint import WEIGHT_STD, Geometry, Noise, add_geometry, config_of, geometry_of, tensors_of
from safetensors.torch import save_file

from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe, Scheme
from moray.runtime.layout.packed import ROWS, SCALE_FACTOR, VECTOR_BYTES, Bytes, PackedSpec, choose_group
from moray.runtime.layout.shard import ExpertKey, ShardLayout, build_shard, plan_layout
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, ExpertsLayer, Manifest, ShardEntry
from moray.runtime.store.store import checksum_file

_BLOCK_BYTES = 16 << 20


class RandomWeights:
    """Packed matrices of random weights."""

    def __init__(self, seed: int) -> None:
        self._noise = Noise(seed)
        self._random = np.random.default_rng(seed)
        self._bytes = self._random.integers(0, 256, _BLOCK_BYTES, dtype=np.uint8)

    def pack(self, spec: PackedSpec) -> Bytes:
        """uint8 [num_bytes]. Quantized (any codes are valid codes) or bf16."""
        if not spec.is_quantized:
            return np.concatenate(list(self._noise.slices(spec.num_bytes // 2))).view(np.uint8)
        packed = np.empty((spec.num_blocks, spec.block_bytes), dtype=np.uint8)
        for block in packed:
            start = int(self._random.integers(0, _BLOCK_BYTES - spec.code_bytes))
            block[: spec.code_bytes] = self._bytes[start : start + spec.code_bytes]
        packed[:, spec.code_bytes :] = np.tile(_meta_vector(spec), spec.num_groups)
        return packed.reshape(-1)

    def plain(self, shape: tuple[int, ...]) -> torch.Tensor:
        """bf16 weights that are not packed: routers."""
        count = int(np.prod(shape))
        values = np.concatenate(list(self._noise.slices(count)))
        return torch.from_numpy(values.copy()).view(torch.bfloat16).reshape(shape)


def _meta_vector(spec: PackedSpec) -> Bytes:
    """16 scales and 16 zeros: the middle code, and what gives uniform codes the wanted spread."""
    levels = 2**spec.bits
    scale = WEIGHT_STD / np.sqrt((levels**2 - 1) / 12) / SCALE_FACTOR
    meta = np.repeat(np.array([scale, (levels - 1) / 2], dtype=np.float16), ROWS).view(np.uint8)
    assert meta.nbytes == VECTOR_BYTES
    return meta


def write_store(directory: Path, geometry: Geometry, recipe: Recipe, *, seed: int = 0) -> Path:
    """Write a store into a new directory. Returns it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    weights = RandomWeights(seed)
    layout = _plan_experts(geometry, recipe)
    shards: dict[ExpertKey, ShardEntry] = {}
    for layer in range(geometry.layers):
        shards |= _write_layer(directory, layer, geometry, layout, weights)
    packed_trunk = _write_trunk(directory, geometry, recipe, weights)
    manifest = Manifest(
        family="mixtral",
        recipe=recipe.to_dict(),
        layers=tuple(
            ExpertsLayer(f"model.layers.{i}.mlp.experts", geometry.experts, layout, "swiglu")
            for i in range(geometry.layers)
        ),
        shards=shards,
        trunk_bytes=(directory / TRUNK_NAME).stat().st_size,
        trunk_checksum=checksum_file(directory / TRUNK_NAME),
        packed_trunk=packed_trunk,
        source={"checkpoint": "random weights of benchmarks/make_store.py"},
        num_parameters=geometry.num_parameters,
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.encode())
    return directory


def _plan_experts(geometry: Geometry, recipe: Recipe) -> ShardLayout:
    gate_up = _spec(2 * geometry.intermediate, geometry.hidden, recipe["experts"])
    down = _spec(geometry.hidden, geometry.intermediate, recipe["experts"])
    return plan_layout([("gate_up_proj", gate_up), ("down_proj", down)])


def _spec(rows: int, columns: int, scheme: Scheme) -> PackedSpec:
    group = choose_group(scheme.group, columns, scheme.bits) if scheme.bits else 0
    return PackedSpec(rows, columns, scheme.encoding, group) if group else PackedSpec(rows, columns, "bf16")


def _write_layer(
    directory: Path, layer: int, geometry: Geometry, layout: ShardLayout, weights: RandomWeights
) -> dict[ExpertKey, ShardEntry]:
    name = f"experts-{layer:05d}.bin"
    entries = {}
    with (directory / name).open("wb") as file:
        for expert in range(geometry.experts):
            key, offset = ExpertKey(layer, expert), file.tell()
            tensors = {tensor.name: weights.pack(tensor.spec) for tensor in layout.tensors if tensor.spec}
            shard = build_shard(key, layout, tensors)
            file.write(shard.data)
            entries[key] = ShardEntry(name, offset, shard.nbytes, xxhash.xxh3_64_intdigest(shard.data))
    return entries


def _write_trunk(directory: Path, geometry: Geometry, recipe: Recipe, weights: RandomWeights) -> dict[str, PackedSpec]:
    """Returns the packed weights by module path: attention, the embedding and the output head."""
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, PackedSpec] = {}
    for tensor in tensors_of(geometry):
        path = tensor.name.removesuffix(".weight")
        if ".experts." in path:
            continue
        if path.endswith("norm"):
            tensors[tensor.name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
        elif path.endswith(".gate"):
            tensors[tensor.name.replace("block_sparse_moe", "mlp")] = weights.plain(tensor.shape)
        else:
            component = recipe["attention"] if "self_attn" in path else recipe["embeddings"]
            packed[path] = _spec(*tensor.shape, component)
            tensors[f"{path}.packed"] = torch.from_numpy(weights.pack(packed[path]))
    save_file(tensors, directory / TRUNK_NAME, metadata={"format": "pt"})
    return packed


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
