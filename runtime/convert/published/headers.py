"""A pre-quantized checkpoint's tensors by name, with the checks that all formats need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moray.runtime.convert.published.settings import Settings
from moray.runtime.convert.tensors import DTYPES, TensorEntry
from moray.runtime.errors import CheckpointError

FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")  # powers of two, a byte each

ADVICE = "use the original 16-bit checkpoint"


@dataclass(frozen=True, slots=True)
class Headers:
    """Names, types and shapes, and the settings that say how to read them."""

    root: Path
    settings: Settings
    tensors: Mapping[str, TensorEntry]

    def bases(self, suffix: str) -> list[str]:
        """The names before ``suffix``."""
        return [key.removesuffix(suffix) for key in self.tensors if key.endswith(suffix)]

    def parts(self, base: str, joint: str = ".", **names: str) -> dict[str, str]:
        """Role -> key. Raises CheckpointError if one is not there."""
        parts = {role: f"{base}{joint}{name}" for role, name in names.items()}
        for key in parts.values():
            if key not in self.tensors:
                raise CheckpointError(
                    f"{self.root} has {parts['codes']} but no {key}, expected both; it is incomplete, download it again"
                )
        return parts

    def optional(self, base: str, **names: str) -> dict[str, str]:
        """Role -> key, of those that are there."""
        return {role: f"{base}.{name}" for role, name in names.items() if f"{base}.{name}" in self.tensors}

    def scale_dtype(self, key: str) -> torch.dtype:
        """What 16-bit loaders of integer codes make of them: the scales' type."""
        name = self.tensors[key].dtype
        return DTYPES[name] if name in FLOATS else self.settings.dtype

    # ------------------------------------------------------------------------------ shapes

    def shape(self, key: str, *types: str, at_least: int = 0) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor has another type or fewer dimensions."""
        entry = self.tensors[key]
        if entry.dtype not in types or len(entry.shape) < at_least:
            raise CheckpointError(
                f"{self.root}: {key} is {entry.dtype} {list(entry.shape)}, expected {' or '.join(types)}"
                f"{f' of at least {at_least} dimensions' if at_least else ''}; download the checkpoint again"
            )
        return entry.shape

    def matrix(self, key: str, *types: str) -> tuple[int, int]:
        shape = self.shape(key, *types)
        if len(shape) != 2 or not all(shape):
            raise self.wrong(key, ["rows", "columns"])
        return shape[0], shape[1]

    def expect(self, key: str, types: tuple[str, ...], *shape: int) -> None:
        if self.shape(key, *types) != shape:
            raise self.wrong(key, list(shape))

    def wrong(self, key: str, expected: list[Any]) -> CheckpointError:
        return CheckpointError(
            f"{self.root}: {key} has shape {list(self.tensors[key].shape)}, expected [{', '.join(map(str, expected))}] "
            "by quantization_config and the tensors beside it; the checkpoint does not fit its config.json"
        )

    # ---------------------------------------------------------------------------- settings

    def bits(self, *allowed: int) -> int:
        bits = self.settings.get("bits", "w_bit")
        if type(bits) is not int or bits not in allowed:
            raise self.refusal("bits", bits, " or ".join(map(str, allowed)))
        return bits

    def group(self, columns: int) -> int:
        """Columns that share a scale in rows of this length."""
        group = self.settings.get("group_size", "q_group_size")
        if type(group) is not int or group == 0 or group < -1:
            raise self.refusal("group_size", group, "-1 or a number of columns")
        return columns if group == -1 else group

    def refusal(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.root} is pre-quantized with {self.settings.method} and {name} {value!r}, which is not read, "
            f"expected {expected}; {ADVICE}"
        )
