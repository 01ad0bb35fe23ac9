"""Checkpoints that are quantized already: which of their tensors stand for which weight of the model.

A quantized weight comes in several tensors (codes, scales, zeros, ...). Here each set of them becomes one
``Published`` weight, with the name, shape and type that it would have in 16 bits, so that everything after it need
not know. Which sets there are follows from the tensors' names; ``quantization_config`` says how to read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moray.runtime.convert.tensors import DTYPES, TensorEntry
from moray.runtime.convert.unpack import (
    Grid,
    Kind,
    Read,
    dequantize_fp8,
    unpack_awq,
    unpack_gptq,
    unpack_int8,
    unpack_mxfp4,
    unpack_packed,
)
from moray.runtime.errors import CheckpointError
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import Encoding, Meta, is_legal_group

_FLOATS = ("F32", "BF16", "F16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_MAX_GROUP = 256  # activations are quantized in the weights' groups: larger ones would cost precision
_ENCODINGS: dict[int, Encoding] = {2: "q2", 4: "q4", 8: "q8"}
_ACTIVATIONS = (".activation_scale", ".input_scale", ".act_scale", ".qscale_act", ".k_scale", ".v_scale", ".q_scale")
_ADVICE = "use the original 16-bit checkpoint"


@dataclass(frozen=True, slots=True)
class Published:
    """One weight, quantized. ``parts``: role -> the checkpoint's key."""

    kind: Kind
    parts: dict[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    group: int = 0  # columns that share a scale; 0 for fp8
    zero_offset: int = 0
    block: tuple[int, int] = (0, 0)  # of fp8
    transposed: bool = False  # the parameter is [.., C, R]
    is_reordered: bool = False  # groups are not runs of columns, says the configuration

    def read_grid(self, read: Callable[[str], torch.Tensor]) -> Grid:
        """Codes, scales and zeros; not of fp8. ``read`` gives a tensor by its key."""

        def role(name: str) -> torch.Tensor:
            return read(self.parts[name])

        grid = self._unpack(role)
        return grid.transpose() if self.transposed else grid

    def dequantize(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The weight as it would be in 16 bits."""
        if self.kind == "fp8":
            return dequantize_fp8(lambda role: read(self.parts[role]), self.block, self.dtype)
        return self.read_grid(read).dequantize(self.dtype)

    def _unpack(self, role: Read) -> Grid:
        has_zeros, has_order = "zeros" in self.parts, "order" in self.parts
        if self.kind == "gptq":
            return unpack_gptq(role, self.bits, self.group, self.zero_offset, has_order)
        if self.kind == "awq":
            return unpack_awq(role, self.bits, self.group)
        if self.kind == "packed":
            return unpack_packed(role, self.bits, self.group, self.shape[1], has_zeros, has_order)
        if self.kind == "int8":
            return unpack_int8(role, self.group, has_zeros)
        assert self.kind == "mxfp4"
        return unpack_mxfp4(role)

    def coding(self, columns: int) -> tuple[Encoding, int, Meta] | None:
        """How a packed matrix with such rows holds the codes as they are; None if it cannot."""
        if self.kind == "mxfp4":
            return ("fp4", fp4.GROUP, "e8m0") if columns % fp4.GROUP == 0 else None
        if self.kind == "fp8":
            return None
        fitting = [
            g for g in range(16, _MAX_GROUP + 1) if self.group % g == 0 and is_legal_group(g, columns, self.bits)
        ]
        return (_ENCODINGS[self.bits], max(fitting), "f16") if fitting else None


@dataclass(frozen=True, slots=True)
class Settings:
    """``quantization_config``, and the type that the weights would have."""

    method: str
    document: Mapping[str, Any]
    dtype: torch.dtype

    @classmethod
    def read(cls, file: Path) -> Settings | None:
        """From a config.json; None if it has none, or cannot be read (load_config reports that)."""
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(document, dict):
            return None
        inner = document.get("text_config")
        text: dict[str, Any] = inner if isinstance(inner, dict) else {}
        found = _quantization(document) or _quantization(text)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} has a quantization_config that is not a map: {found!r}; download it again")
        name = next((d[k] for d in (document, text) for k in ("dtype", "torch_dtype") if d.get(k)), "bfloat16")
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(str(name), torch.bfloat16)
        return cls(str(found.get("quant_method", "unknown")), found, dtype)


def _quantization(document: Mapping[str, Any]) -> Any:
    return document.get("quantization_config") or document.get("compression_config")


@dataclass
class Finder:
    """Turns a checkpoint's tensors into published weights. ``used``: keys that stand for nothing else."""

    root: Path
    settings: Settings
    tensors: Mapping[str, TensorEntry]
    used: set[str] = field(default_factory=set)
    found: dict[str, Published] = field(default_factory=dict)

    def run(self) -> dict[str, Published]:
        """All published weights, by the names they would have. Raises CheckpointError."""
        methods: dict[str, Callable[[], None]] = {
            "gptq": self._find_gptq,
            "awq": self._find_awq,
            "mxfp4": self._find_mxfp4,
            "fp8": self._find_fp8,
            "compressed-tensors": self._find_compressed,
        }
        method = self.settings.method
        if method not in methods:
            raise CheckpointError(
                f"{self.root} is quantized already, with {method!r}; of pre-quantized checkpoints moray reads "
                f"{', '.join(methods)}: {_ADVICE}"
            )
        methods[method]()
        self.used |= {key for key in self.tensors if key.endswith(_ACTIVATIONS)}
        if not self.found:
            raise CheckpointError(
                f"{self.root / 'config.json'} says that the checkpoint is pre-quantized with {method}, but none of its "
                "tensors is; delete quantization_config from it if the weights are in 16 bits, else download them again"
            )
        return self.found

    # ------------------------------------------------------------------------------ one method each

    def _find_gptq(self) -> None:
        form = str(self._setting("checkpoint_format", self._setting("format", "gptq"))).lower()
        if form not in ("gptq", "gptq_v2"):
            raise self._refusal("checkpoint_format", form, "gptq or gptq_v2")
        bits, is_reordered = self._bits(2, 4, 8), bool(self._setting("desc_act", False))
        for base in self._bases(".qweight"):
            parts = self._parts(base, codes="qweight", zeros="qzeros", scales="scales")
            if f"{base}.g_idx" in self.tensors:
                parts["order"] = f"{base}.g_idx"
            words, rows = self._matrix(parts["codes"], "I32")
            columns = words * 32 // bits
            group = self._group(columns)
            groups = -(-columns // group)
            self._expect(parts["scales"], _FLOATS, groups, rows)
            self._expect(parts["zeros"], ("I32",), groups, rows * bits // 32)
            if "order" in parts:
                self._expect(parts["order"], ("I32",), columns)
            reordered = is_reordered and "order" in parts and groups > 1
            offset = 0 if form == "gptq_v2" else 1  # the older format stores zero - 1
            self._add(base, "gptq", parts, (rows, columns), bits, group, zero_offset=offset, is_reordered=reordered)

    def _find_awq(self) -> None:
        version = str(self._setting("version", "gemm")).lower()
        if version != "gemm":
            raise self._refusal("version", version, "gemm")
        bits = self._bits(4)
        for base in self._bases(".qweight"):
            parts = self._parts(base, codes="qweight", zeros="qzeros", scales="scales")
            columns, words = self._matrix(parts["codes"], "I32")
            group = self._group(columns)
            groups, rows = -(-columns // group), words * 32 // bits
            self._expect(parts["scales"], _FLOATS, groups, rows)
            self._expect(parts["zeros"], ("I32",), groups, words)
            self._add(base, "awq", parts, (rows, columns), bits, group)

    def _find_mxfp4(self) -> None:
        for base in self._bases("_blocks"):
            parts = self._parts(base, "_", codes="blocks", scales="scales")
            *outer, rows, groups, width = self._shape(parts["codes"], "U8", at_least=3)
            if width != fp4.GROUP // 2:
                raise self._wrong(parts["codes"], [*outer, rows, groups, fp4.GROUP // 2])
            self._expect(parts["scales"], ("U8",), *outer, rows, groups)
            shape = (*outer, groups * fp4.GROUP, rows)  # experts of families that have them [in, out]
            self._add(base, "mxfp4", parts, shape, 4, fp4.GROUP, name=base, transposed=True)

    def _find_fp8(self) -> None:
        size = self._setting("weight_block_size", None)
        for key in [key for key, entry in self.tensors.items() if entry.dtype in _FP8]:
            stem = key.removesuffix("weight")
            names = (f"{key}_scale_inv", f"{key}_scale", f"{stem}scale", f"{stem}qscale_weight")
            scales = next((name for name in names if name in self.tensors), None)
            if scales is None:
                raise CheckpointError(
                    f"{self.root} has no scales for {key} ({self.tensors[key].dtype}), expected {names[0]}; "
                    "it is incomplete, download it again"
                )
            self._add_fp8(key, scales, size)

    def _find_compressed(self) -> None:
        weights = self._compressed_weights()
        bits = weights.get("num_bits")
        for base in self._bases(".weight_packed"):
            parts = self._parts(base, codes="weight_packed", scales="weight_scale")
            if self.tensors[parts["codes"]].dtype == "U8":
                self._add_packed_fp4(base, parts)
                continue
            if bits not in (4, 8):
                raise self._refusal("num_bits", bits, "4 or 8")
            self._add_packed(base, parts, bits)
        for key, entry in self.tensors.items():
            scales = f"{key}_scale"
            if entry.dtype in _FP8 and scales in self.tensors:
                self._add_fp8(key, scales, weights.get("block_structure"))
            elif entry.dtype == "I8" and scales in self.tensors and key.endswith(".weight"):
                self._add_int8(key.removesuffix(".weight"), key, scales)

    # ---------------------------------------------------------------------------- parts of the above

    def _add_packed(self, base: str, parts: dict[str, str], bits: int) -> None:
        for role, name in (("zeros", "weight_zero_point"), ("order", "weight_g_idx")):
            if f"{base}.{name}" in self.tensors:
                parts[role] = f"{base}.{name}"
        self.used.add(f"{base}.weight_shape")
        rows, words = self._matrix(parts["codes"], "I32")
        columns = words * 32 // bits
        scale_rows, groups = self._matrix(parts["scales"], *_FLOATS)
        if scale_rows != rows or not groups or columns % groups:
            raise self._wrong(parts["scales"], [rows, f"a divisor of {columns}"])
        if "zeros" in parts:
            self._expect(parts["zeros"], ("I32",), -(-rows * bits // 32), groups)
        if "order" in parts:
            self._expect(parts["order"], ("I32", "I64"), columns)
        reordered = "order" in parts and groups > 1
        self._add(base, "packed", parts, (rows, columns), bits, columns // groups, is_reordered=reordered)

    def _add_packed_fp4(self, base: str, parts: dict[str, str]) -> None:
        rows, width = self._matrix(parts["codes"], "U8")
        if width % 16 or f"{base}.weight_global_scale" in self.tensors:
            raise self._refusal("format", self._setting("format", "unknown"), "mxfp4-pack-quantized for 4-bit floats")
        self._expect(parts["scales"], ("U8", "F8_E8M0"), rows, 2 * width // fp4.GROUP)
        self._add(base, "mxfp4", parts, (rows, 2 * width), 4, fp4.GROUP)

    def _add_int8(self, base: str, key: str, scales: str) -> None:
        parts = {"codes": key, "scales": scales}
        if f"{key}_zero_point" in self.tensors:
            parts["zeros"] = f"{key}_zero_point"
        rows, columns = self._matrix(key, "I8")
        shape = self._shape(scales, *_FLOATS)
        groups = shape[-1] if shape else 1
        if math.prod(shape) not in (groups, rows * groups) or not groups or columns % groups:
            raise self._wrong(scales, [rows, f"a divisor of {columns}"])
        self._add(base, "int8", parts, (rows, columns), 8, columns // groups)

    def _add_fp8(self, key: str, scales: str, size: Any) -> None:
        shape, grid = self._shape(key, *_FP8, at_least=1), self._shape(scales, *_FLOATS, "U8", "F8_E8M0")
        *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
        block = self._block(rows, columns, math.prod(outer), grid, size)
        if block is None:
            wanted = f"[{-(-rows // size[0])}, {-(-columns // size[1])}]" if _is_pair(size) else "1 value"
            raise CheckpointError(
                f"{self.root}: {scales} has shape {list(grid)}, expected {wanted} for {key} of {list(shape)}; "
                "the checkpoint does not fit its config.json, download it again"
            )
        parts = {"codes": key, "scales": scales}
        self.used |= set(parts.values())
        self.found[key] = Published("fp8", parts, shape, self.settings.dtype, 8, block=block)

    def _block(self, rows: int, columns: int, outer: int, grid: tuple[int, ...], size: Any) -> tuple[int, int] | None:
        """Rows and columns of a scale's block: as configured, or what divides the weight (as transformers has it)."""
        count = math.prod(grid)
        if count == outer:
            return rows, columns
        high, wide = grid[-2:] if len(grid) > 1 else (*grid, 1)
        if math.prod(grid[:-2]) != outer:
            return None
        if _is_pair(size) and (-(-rows // size[0]), -(-columns // size[1])) == (high, wide):
            return int(size[0]), int(size[1])
        fits = high and wide and rows % high == 0 and columns % wide == 0
        return (rows // high, columns // wide) if fits else None

    def _compressed_weights(self) -> Mapping[str, Any]:
        """The one description of weights that all groups of layers share."""
        groups = self._setting("config_groups", {})
        found = [g["weights"] for g in groups.values() if isinstance(g, dict) and isinstance(g.get("weights"), dict)]
        if not found or any(weights.get("num_bits") != found[0].get("num_bits") for weights in found):
            raise self._refusal("config_groups", [w.get("num_bits") for w in found], "one num_bits for all layers")
        weights: Mapping[str, Any] = found[0]
        return weights

    # ----------------------------------------------------------------------------------- checks

    def _setting(self, name: str, default: Any) -> Any:
        value = self.settings.document.get(name)
        return default if value is None else value

    def _bits(self, *allowed: int) -> int:
        bits = self._setting("bits", self._setting("w_bit", None))
        if type(bits) is not int or bits not in allowed:
            raise self._refusal("bits", bits, " or ".join(map(str, allowed)))
        return bits

    def _group(self, columns: int) -> int:
        group = self._setting("group_size", self._setting("q_group_size", 128))
        if type(group) is not int or group == 0 or group < -1:
            raise self._refusal("group_size", group, "-1 or a number of columns")
        return columns if group == -1 else group

    def _refusal(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.root} is pre-quantized with {self.settings.method} and {name} {value!r}, which is not read, "
            f"expected {expected}; {_ADVICE}"
        )

    def _bases(self, suffix: str) -> list[str]:
        return [key.removesuffix(suffix) for key in self.tensors if key.endswith(suffix)]

    def _parts(self, base: str, joint: str = ".", **names: str) -> dict[str, str]:
        parts = {role: f"{base}{joint}{name}" for role, name in names.items()}
        for key in parts.values():
            if key not in self.tensors:
                raise CheckpointError(
                    f"{self.root} has {parts['codes']} but no {key}, expected both; it is incomplete, download it again"
                )
        return parts

    def _add(
        self,
        base: str,
        kind: Kind,
        parts: dict[str, str],
        shape: tuple[int, ...],
        bits: int,
        group: int,
        *,
        name: str | None = None,
        zero_offset: int = 0,
        transposed: bool = False,
        is_reordered: bool = False,
    ) -> None:
        scale_type = self.tensors[parts["scales"]].dtype
        dtype = DTYPES[scale_type] if scale_type in _FLOATS else self.settings.dtype
        self.used |= set(parts.values())
        self.found[name or f"{base}.weight"] = Published(
            kind, parts, shape, dtype, bits, group, zero_offset, (0, 0), transposed, is_reordered
        )

    def _shape(self, key: str, *types: str, at_least: int = 0) -> tuple[int, ...]:
        entry = self.tensors[key]
        if entry.dtype not in types or len(entry.shape) < at_least:
            raise CheckpointError(
                f"{self.root}: {key} is {entry.dtype} {list(entry.shape)}, expected {' or '.join(types)}"
                f"{f' of at least {at_least} dimensions' if at_least else ''}; download the checkpoint again"
            )
        return entry.shape

    def _matrix(self, key: str, *types: str) -> tuple[int, int]:
        shape = self._shape(key, *types)
        if len(shape) != 2:
            raise self._wrong(key, ["rows", "columns"])
        return shape[0], shape[1]

    def _expect(self, key: str, types: tuple[str, ...], *shape: int) -> None:
        if self._shape(key, *types) != shape:
            raise self._wrong(key, list(shape))

    def _wrong(self, key: str, expected: list[Any]) -> CheckpointError:
        return CheckpointError(
            f"{self.root}: {key} has shape {list(self.tensors[key].shape)}, expected [{', '.join(map(str, expected))}] "
            "by quantization_config and the tensors beside it; the checkpoint does not fit its config.json"
        )


def _is_pair(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
