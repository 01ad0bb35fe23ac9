"""Tiny checkpoints from the key lists of published repositories (tests/data/layouts), written without transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from helpers.prequantized import GROUP, Quantize, Tensors, awq, fp8, gptq
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FOLDER = Path(__file__).parent.parent / "data" / "layouts"
LAYOUTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class Listed:
    """One tensor of a list, or one quantized weight in several (``parts``: suffix -> type and shape)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[str, tuple[int, ...]]]
    entry: dict[str, Any]

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By the names that the files have."""
        if not self.parts:
            return {self.name: (self.dtype, self.shape)}
        joint = "_" if "blocks" in self.parts else "."
        return {f"{self.name}{joint}{suffix}": what for suffix, what in self.parts.items()}

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())


@dataclass(frozen=True)
class Layout:
    """One repository's list, in its real sizes or in tiny ones."""

    document: dict[str, Any]
    sizes: dict[str, int]

    @classmethod
    def read(cls, name: str, *, tiny: bool = True) -> Layout:
        document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        return cls(document, {size: values[tiny] for size, values in document["sizes"].items()})

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._fill(self.document["config"])
        return config

    @property
    def listed(self) -> list[Listed]:
        found = [one for entry in self.document["tensors"] for one in self._expand(entry)]
        return found if self.document.get("order") == "listed" else sorted(found, key=lambda one: one.name)

    def _expand(self, entry: dict[str, Any]) -> Iterator[Listed]:
        name: str = entry["name"]
        layers = self._evaluate(entry.get("l", "range(L)")) if "{l}" in name else [None]
        experts = range(self.sizes["E"]) if "{e}" in name else [None]
        shape = self._shape(entry.get("shape") or entry["quantized"])
        dtype = entry.get("dtype", self.document["dtype"])
        parts = {key: (kind, self._shape(dims)) for key, (kind, *dims) in entry.get("parts", {}).items()}
        for layer in layers:
            for expert in experts:
                yield Listed(name.format(l=layer, e=expert), dtype, shape, parts, entry)

    def _shape(self, expressions: list[Any]) -> tuple[int, ...]:
        return tuple(self._evaluate(one) for one in expressions)

    def _fill(self, value: Any) -> Any:
        """With every string like ``=H`` replaced by its value."""
        if isinstance(value, dict):
            return {key: self._fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._fill(inner) for inner in value]
        return self._evaluate(value[1:]) if isinstance(value, str) and value.startswith("=") else value

    def _evaluate(self, expression: Any) -> Any:
        names = {"range": range, "ceil": lambda size, block: -(-size // block), **self.sizes}
        return eval(str(expression), {"__builtins__": {}}, names)


@dataclass(frozen=True)
class Written:
    """``checkpoint``: as the list has it. ``weights``: what its tensors stand for, quantized ones dequantized."""

    checkpoint: Path
    plain: Path  # the same weights, without quantization
    weights: Tensors


def write_layout(layout: Layout, directory: Path, seed: int = 1) -> Written:
    """Random tensors, in files that are named and numbered as in the repository, with everything beside them."""
    rng = np.random.default_rng(seed)
    stored: Tensors = {}
    weights: Tensors = {}
    for one in layout.listed:
        parts, value = _draw(layout, one, rng)
        assert {key: (_name(t.dtype), tuple(t.shape)) for key, t in parts.items()} == one.tensors
        stored |= parts
        weights[f"{one.name}.weight" if one.parts and "blocks" not in one.parts else one.name] = value
    config = layout.config
    written = Written(directory / "checkpoint", directory / "plain", weights)
    written.checkpoint.mkdir(parents=True)
    written.plain.mkdir()
    (written.checkpoint / "config.json").write_text(json.dumps(config, indent=2))
    _write_files(layout, stored, written.checkpoint)
    for name in layout.document.get("extra", []):
        file = written.checkpoint / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"{}" if name.endswith(".json") else b"not weights")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (written.plain / "config.json").write_text(json.dumps(plain))
    save_file({key: t.contiguous() for key, t in weights.items()}, written.plain / "model.safetensors")
    return written


def _write_files(layout: Layout, tensors: Tensors, directory: Path) -> None:
    count = layout.document["shards"]
    if count == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    pattern = layout.document.get("file_name", "model-{number:05d}-of-{total:05d}.safetensors")
    keys, index = list(tensors), {}
    for i in range(count):
        own = keys[i * len(keys) // count : (i + 1) * len(keys) // count]
        file = pattern.format(number=i + 1, total=count, index=i, last=count - 1)
        save_file({key: tensors[key] for key in own}, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    metadata = layout.document.get("index_metadata", {"total_size": total})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": index}))


def _draw(layout: Layout, one: Listed, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """The tensors of one entry, and what they stand for."""
    if not one.parts:
        value = _weight(one, rng).to(DTYPES[one.dtype])
        return {one.name: value}, value
    base = DTYPES[layout.document["dtype"]]
    if "blocks" in one.parts:
        return _mxfp4(one, rng)
    parts, values = _quantize(layout)(f"{one.name}.", one.shape, rng)
    kinds = {f"{one.name}.{suffix}": DTYPES[kind] for suffix, (kind, _) in one.parts.items()}
    if layout.config["quantization_config"]["quant_method"] == "fp8":
        parts = {key: t.to(kinds[key]) for key, t in parts.items()}
        values = _dequantize_fp8(one, parts, layout.sizes["B"])
    return parts, values.to(base)


def _quantize(layout: Layout) -> Quantize:
    form = layout.document.get("format", "fp8")
    if form == "fp8":
        return fp8((layout.sizes["B"], layout.sizes["B"]))
    assert layout.sizes["G"] == GROUP
    return awq if form == "awq" else gptq(reorder=True)


def _dequantize_fp8(one: Listed, parts: Tensors, block: int) -> torch.Tensor:
    """Entry by entry: a value times the scale of its block."""
    weight, scales = (parts[f"{one.name}.{suffix}"].float() for suffix in ("weight", "weight_scale_inv"))
    for r in range(weight.shape[0]):
        for c in range(0, weight.shape[1], block):
            weight[r, c : c + block] *= scales[r // block, c // block]
    return weight


def _mxfp4(one: Listed, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    blocks = torch.from_numpy(rng.integers(0, 256, one.parts["blocks"][1], dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(118, 124, one.parts["scales"][1], dtype=np.uint8))
    value = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return {f"{one.name}_blocks": blocks, f"{one.name}_scales": scales}, value


def _weight(one: Listed, rng: np.random.Generator) -> torch.Tensor:
    """Of a size that keeps activations and logits of order 1, and routing decided."""
    noise = torch.from_numpy(rng.standard_normal(one.shape).astype(np.float32))
    if one.entry.get("zeros"):
        return torch.zeros(one.shape)
    if "norm" in one.name and one.name.endswith("weight"):
        return 0.1 * noise if one.entry.get("norm") == "zero" else 1 + 0.1 * noise
    router = one.name.endswith((".gate.weight", ".router.weight", "router.layer.weight"))
    return noise * (0.2 if router else 0.12)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
