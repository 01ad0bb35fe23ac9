"""Write a random Mixtral or Qwen3-MoE checkpoint in the hub's original layout, of any size, in little memory.

    python benchmarks/make_checkpoint.py /tmp/checkpoint --preset 4gib
    python benchmarks/make_checkpoint.py /tmp/checkpoint --hidden 1024 --intermediate 3584 --experts 8 --layers 4
    python benchmarks/make_checkpoint.py /tmp/checkpoint --preset qwen3-30b-a3b --layers 1

What it writes: `config.json`, safetensors files of at most 1 GiB (or one tensor) with `model.safetensors.index.json`,
bf16, every expert's matrices on their own (geometry.py has the sizes and names). No tokenizer: prompts are token ids.
Weights are zero-mean normal with std 0.02 (embeddings: 1; norms are ones): zero-mean, because biased weights route
every token to the same experts. They are slices of one random block at random places, so writing runs at the disk's
speed and holds neither a tensor nor a file in memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from geometry import WEIGHT_STD, Geometry, Tensor, add_geometry, config_of, geometry_of, std_of, tensors_of

_FILE_BYTES = 1 << 30
_BLOCK = 8 << 20  # values in the random block
_SLICE = 1 << 20  # values written at a time
_ONE = 0x3F80  # 1.0 in bf16

Halves = npt.NDArray[np.uint16]  # bf16 values as their bits


class Noise:
    """Endless zero-mean normal bf16 values, cheaply: slices of one random block."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal(_BLOCK, dtype=np.float32)
        self._values = (values - values.mean()) / values.std()
        self._blocks: dict[float, Halves] = {}

    def slices(self, count: int, std: float = WEIGHT_STD) -> Iterator[Halves]:
        """``count`` values in pieces. Do not change them."""
        block = self._block(std)
        while count > 0:
            size = min(count, _SLICE)
            start = int(self._random.integers(0, _BLOCK - size))
            yield block[start : start + size]
            count -= size

    def _block(self, std: float) -> Halves:
        if std not in self._blocks:
            scaled = torch.from_numpy(self._values * np.float32(std))
            self._blocks[std] = scaled.bfloat16().view(torch.uint16).numpy()
        return self._blocks[std]


def write_checkpoint(directory: Path, geometry: Geometry, *, seed: int = 0, file_bytes: int = _FILE_BYTES) -> Path:
    """Write a checkpoint into a new directory, in files of at most ``file_bytes`` (or one tensor). Returns it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    noise = Noise(seed)
    files = _split(list(tensors_of(geometry)), file_bytes)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        with (directory / name).open("wb") as file:
            _write_file(file, tensors, noise)
    total = sum(tensor.num_bytes for tensors in files for tensor in tensors)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (directory / "model.safetensors.index.json").write_text(index_text)
    return directory


def _split(tensors: list[Tensor], file_bytes: int) -> list[list[Tensor]]:
    files: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.num_bytes for t in files[-1]) + tensor.num_bytes > file_bytes:
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
        if tensor.is_norm:
            file.write(np.full(tensor.count, _ONE, dtype=np.uint16).data)
            continue
        for values in noise.slices(tensor.count, std_of(tensor.name)):
            file.write(values.data)


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
