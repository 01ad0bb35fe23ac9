"""Write a random Mixtral checkpoint in the hub's original layout, of any size, in little memory.

    python benchmarks/make_checkpoint.py /tmp/checkpoint --preset 4gib
    python benchmarks/make_checkpoint.py /tmp/checkpoint --hidden 1024 --intermediate 3584 --experts 8 --layers 4

What it writes: `config.json`, safetensors files of at most 1 GiB (or one tensor) with `model.safetensors.index.json`,
bf16, experts as `model.layers.N.block_sparse_moe.experts.E.w1/w2/w3.weight`. No tokenizer: prompts are token ids.
Weights are zero-mean normal with std 0.02 (norms are ones): zero-mean, because biased weights route every token to
the same experts. They are slices of one 16 MiB random block at random places, so writing runs at the disk's speed and
holds neither a tensor nor a file in memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

WEIGHT_STD = 0.02
_FILE_BYTES = 1 << 30
_BLOCK = 8 << 20  # values in the random block
_SLICE = 1 << 20  # values written at a time
_ONE = 0x3F80  # 1.0 in bf16

Halves = npt.NDArray[np.uint16]  # bf16 values as their bits


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Mixtral; two experts a token."""

    hidden: int
    intermediate: int
    experts: int
    layers: int
    vocab: int
    head_dim: int = 128
    queries_per_kv: int = 4

    @property
    def heads(self) -> int:
        return max(1, self.hidden // self.head_dim)

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // self.queries_per_kv)

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def num_parameters(self) -> int:
        return sum(tensor.count for tensor in tensors_of(self))


PRESETS = {
    "4gib": Geometry(4096, 14336, experts=5, layers=2, vocab=32000),
    "1gib": Geometry(2048, 7168, experts=5, layers=2, vocab=32000),
    "mixtral-layer": Geometry(4096, 14336, experts=8, layers=1, vocab=1024),  # a small head: the layer is what counts
    "tiny": Geometry(256, 448, experts=8, layers=6, vocab=4096, head_dim=32, queries_per_kv=2),  # the demo model's
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return 2 * self.count


def tensors_of(geometry: Geometry) -> Iterator[Tensor]:
    """Every tensor, in the order of the file."""
    hidden, kv = geometry.hidden, geometry.kv_heads * geometry.head_dim
    queries = geometry.heads * geometry.head_dim
    yield Tensor("model.embed_tokens.weight", (geometry.vocab, hidden))
    for layer in range(geometry.layers):
        prefix = f"model.layers.{layer}"
        for name, shape in (
            ("q", (queries, hidden)),
            ("k", (kv, hidden)),
            ("v", (kv, hidden)),
            ("o", (hidden, queries)),
        ):
            yield Tensor(f"{prefix}.self_attn.{name}_proj.weight", shape)
        yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,))
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,))
        yield Tensor(f"{prefix}.block_sparse_moe.gate.weight", (geometry.experts, hidden))
        for expert in range(geometry.experts):
            path = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield Tensor(f"{path}.w1.weight", (geometry.intermediate, hidden))
            yield Tensor(f"{path}.w2.weight", (hidden, geometry.intermediate))
            yield Tensor(f"{path}.w3.weight", (geometry.intermediate, hidden))
    yield Tensor("model.norm.weight", (hidden,))
    yield Tensor("lm_head.weight", (geometry.vocab, hidden))


def config_of(geometry: Geometry) -> dict[str, Any]:
    """What config.json holds. No token ends a text: a benchmark generates as many tokens as it asks for."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_local_experts": geometry.experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


class Noise:
    """Endless zero-mean normal bf16 values, cheaply: slices of one random block."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal(_BLOCK, dtype=np.float32)
        values = (values - values.mean()) * (WEIGHT_STD / values.std())
        self._block: Halves = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()

    def slices(self, count: int) -> Iterator[Halves]:
        """``count`` values in pieces. Do not change them."""
        while count > 0:
            size = min(count, _SLICE)
            start = int(self._random.integers(0, _BLOCK - size))
            yield self._block[start : start + size]
            count -= size


def write_checkpoint(directory: Path, geometry: Geometry, *, seed: int = 0) -> Path:
    """Write a checkpoint into a new directory. Returns it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    noise = Noise(seed)
    files = _split(list(tensors_of(geometry)))
    weight_map = {}
    for index, tensors in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        with (directory / name).open("wb") as file:
            _write_file(file, tensors, noise)
    total = sum(tensor.num_bytes for tensors in files for tensor in tensors)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (directory / "model.safetensors.index.json").write_text(index_text)
    return directory


def _split(tensors: list[Tensor]) -> list[list[Tensor]]:
    files: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.num_bytes for t in files[-1]) + tensor.num_bytes > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    return files


def _write_file(file: BinaryIO, tensors: list[Tensor], noise: Noise) -> None:
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.num_bytes]
        document[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        end = offsets[1]
    header = json.dumps(document).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors:
        if tensor.name.endswith("norm.weight"):
            file.write(np.full(tensor.count, _ONE, dtype=np.uint16).data)
            continue
        for values in noise.slices(tensor.count):
            file.write(values.data)


def add_geometry(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags that choose a geometry: a preset, and sizes that override it."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default=default, help=f"sizes to start from ({default})")
    for name in ("hidden", "intermediate", "experts", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")


def geometry_of(arguments: argparse.Namespace) -> Geometry:
    sizes = asdict(PRESETS[arguments.preset])
    return Geometry(**{name: getattr(arguments, name, None) or value for name, value in sizes.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--seed", type=int, default=0)
    add_geometry(parser, "4gib")
    arguments = parser.parse_args()
    geometry = geometry_of(arguments)
    write_checkpoint(arguments.directory, geometry, seed=arguments.seed)
    print(f"{arguments.directory}: {geometry.num_parameters:,} parameters, {2 * geometry.num_parameters:,} bytes")


if __name__ == "__main__":
    main()
