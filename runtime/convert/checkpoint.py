"""Reading a Hugging Face checkpoint: which tensors lie where, and their values, one at a time.

Headers are checked when a checkpoint is opened, so that a download that was cut short is found before
hours of work. Tensors are read with plain reads, never mapped: memory stays bounded and a file that
shrinks is an error instead of a signal.

The weights of a pre-quantized checkpoint have the names and shapes that they would have in 16 bits (published/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
import xxhash

from moray.runtime.convert.headers import read_file_header, read_into, read_tensor
from moray.runtime.convert.published.formats import Found, find_published
from moray.runtime.convert.published.settings import Settings
from moray.runtime.convert.tensors import DTYPES, TensorEntry
from moray.runtime.errors import CheckpointError
from moray.runtime.paths import is_outside

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NOTHING = Found()  # of quantized weights


class Checkpoint:
    """A local checkpoint in safetensors. Picklable; opens files when it reads."""

    def __init__(self, path: Path, tensors: dict[str, TensorEntry], digest: str, found: Found = _NOTHING) -> None:
        self.path = path
        self.tensors = tensors
        self._found = found
        self.published = found.weights  # weights that several tensors stand for; empty if it is not quantized
        self.notes = found.notes  # what of it is left out
        self.fingerprint = digest  # of its files' names, sizes, headers and samples of their content
        self._used = found.used

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read all headers. Raises CheckpointError: nothing there, cut short, damaged, or quantized in unknown ways."""
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a directory; expected a downloaded Hugging Face checkpoint")
        settings = Settings.read(root / "config.json")
        index = _read_index(root)
        files = sorted(set(index.values())) if index else [SINGLE_NAME]
        tensors: dict[str, TensorEntry] = {}
        digest = xxhash.xxh3_128()
        for file in files:
            found, file_digest = read_file_header(root, file)
            tensors |= found
            digest.update(f"{file}\0{file_digest}\0".encode())
        for key, file in (index or {}).items():
            if key not in tensors or tensors[key].file != file:
                raise CheckpointError(
                    f"{root / INDEX_NAME} says that tensor {key} is in {file}, but it is not; download both again"
                )
        return cls(root, tensors, digest.hexdigest(), find_published(root, settings, tensors))

    @property
    def keys(self) -> list[str]:
        """What a model is made from: plain tensors, and published weights under the names they would have."""
        return [*(key for key in self.tensors if key not in self._used), *self.published]

    def reshaped(self, reshape: Callable[[str, tuple[int, ...]], tuple[int, ...]]) -> Self:
        """The same checkpoint with each plain tensor seen in the shape ``reshape(key, shape)``, of as many elements."""
        tensors = {
            key: entry if key in self._used else replace(entry, shape=reshape(key, entry.shape))
            for key, entry in self.tensors.items()
        }
        other = copy(self)
        other.tensors = tensors
        return other

    def moved(self, path: Path) -> Checkpoint:
        """The same checkpoint with its files in another directory."""
        return Checkpoint(path, self.tensors, self.fingerprint, self._found)

    def parts_of(self, key: str) -> Sequence[str]:
        """The tensors in files that one of ``keys`` stands for."""
        return tuple(self.published[key].parts.values()) if key in self.published else (key,)

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor. Raises CheckpointError if its dtype is not supported."""
        if key in self.published:
            return self.published[key].shape, self.published[key].dtype
        entry = self.tensors[key]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path / entry.file}: tensor {key} has dtype {entry.dtype}, expected F32, BF16 or F16; "
                "if it is a pre-quantized checkpoint, its config.json lacks quantization_config: download both again"
            )
        return entry.shape, DTYPES[entry.dtype]

    def read(self, key: str, expert: int | None = None) -> torch.Tensor:
        """A private copy of a tensor; with ``expert`` only ``tensor[expert : expert + 1]``."""
        if key in self.published:
            return self.published[key].dequantize(self.part_reader(key, expert))
        return self._read(key, expert)

    def part_reader(self, key: str, expert: int | None = None) -> Callable[[str], torch.Tensor]:
        """Reads the tensors of a published weight; with ``expert`` only its part of those that have one for each."""
        num_experts = self.published[key].shape[:1]
        return lambda part: self._read(part, expert if self.tensors[part].shape[:1] == num_experts else None)

    def _read(self, key: str, expert: int | None) -> torch.Tensor:
        entry = self.tensors[key]
        return read_tensor(lambda offset, view: self._read_into(entry.file, offset, view), entry, expert)

    def _read_into(self, file: str, offset: int, view: memoryview) -> None:
        read_into(self.path / file, offset, view)


def refuse_gguf(path: Path) -> None:
    """Raises CheckpointError for a GGUF file, or a directory with nothing better.

    transformers' reading of them is not sound enough: it builds a dense model of Mixtral's, with random weights in
    place of the experts, does not read Qwen3-MoE's expert size, and holds all weights in float32 at once.
    """
    if path.is_dir():
        found = next(iter(sorted(path.glob("*.gguf"))), None)
        is_gguf = found is not None and not any(path.glob("*.safetensors*"))
    else:
        found, is_gguf = path, path.suffix == ".gguf"
    if is_gguf:
        raise CheckpointError(
            f"{found} is a GGUF file, expected a directory with safetensors: GGUF is not read; convert the checkpoint "
            "that it was made from, e.g. with recipe experts=hqq4:32,attention=hqq4:32 for about the size of Q4_0"
        )


def read_index_files(root: Path) -> list[str]:
    """The weight files that an index names, whether they are there or not. Raises CheckpointError."""
    return sorted(set(_parse_index(root / INDEX_NAME).values()))


def _read_index(root: Path) -> dict[str, str]:
    """Tensor -> file; empty for a checkpoint in a single file."""
    file = root / INDEX_NAME
    if not file.is_file():
        if not (root / SINGLE_NAME).is_file():
            raise CheckpointError(_explain_no_weights(root))
        return {}
    index = _parse_index(file)
    missing = sorted({name for name in index.values() if not (root / name).is_file()})
    if missing:
        raise CheckpointError(
            f"{root} lacks {missing[0]}{_and_more(len(missing) - 1)}, named in {INDEX_NAME}; download the missing files"
        )
    return index


def _parse_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        index = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); download it again") from error
    for key, name in index.items():
        if not key.isprintable() or not name.isprintable() or not name or is_outside(name):
            raise CheckpointError(
                f"{file} says that tensor {key!r:.80} is in {name!r:.80}, expected the name of a file beside it; "
                "download it again"
            )
    if not index:
        raise CheckpointError(f"{file} names no tensors; download it again")
    return index


def _and_more(count: int) -> str:
    return f" and {count} more files" if count else ""


def _explain_no_weights(root: Path) -> str:
    others = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in sorted(root.glob(pattern))]
    if others:
        return (
            f"{root} has its weights in {others[0]}; expected {SINGLE_NAME} or {INDEX_NAME}: "
            "convert it to safetensors first, or download the safetensors version"
        )
    return f"{root} has no weights: expected {SINGLE_NAME} or {INDEX_NAME}; download the checkpoint again"
