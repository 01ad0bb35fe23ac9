"""Tiny pre-quantized checkpoints with the key layouts of published ones, and the weights that they stand for.

Codes and scales are random. What they stand for is computed here from each format's published definition, entry by
entry where that is short, and never with moray's own code; for MXFP4 with transformers' function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from helpers.checkpoints import tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]
#: A weight's name without ``weight``, its shape and a random generator -> its tensors, and its values.
Quantize = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Tensors, torch.Tensor]]

_QUANTIZED = re.compile(r".*(\.experts\.[0-9]+\.|self_attn\.|shared_experts?\.|mlp\.(gate|up|down)_proj).*\.weight")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: field i of a word holds output order[i] of eight
GROUP = 32


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    quantized: Path
    plain: Path  # float32, as its format's definition dequantizes it


def write_pair(
    directory: Path,
    family: str,
    quantize: Quantize,
    quantization_config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    **overrides: Any,
) -> Pair:
    base = tiny_checkpoint(family, directory / "base", dtype, **overrides)
    tensors, rng = load_file(base / "model.safetensors"), np.random.default_rng(0)
    quantized, plain = {}, {}
    for key, tensor in tensors.items():
        if _QUANTIZED.fullmatch(key) and tensor.ndim == 2 and "norm" not in key:
            parts, values = quantize(key.removesuffix("weight"), tuple(tensor.shape), rng)
            quantized |= parts
            plain[key] = values
        else:
            quantized[key] = tensor
            plain[key] = tensor.float()
    return _write(directory, base, quantized, plain, quantization_config)


def write_mxfp4_pair(directory: Path) -> Pair:
    """gpt-oss: experts as blocks and scales, everything else in bfloat16."""
    base = tiny_checkpoint("gpt_oss", directory / "base", torch.bfloat16, fused=True)
    rng = np.random.default_rng(0)
    quantized, plain = {}, {}
    for key, tensor in load_file(base / "model.safetensors").items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            quantized[key], plain[key] = tensor, tensor.float()
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(rng.integers(118, 124, (experts, rows, columns // 32), dtype=np.uint8))
        quantized[f"{key}_blocks"], quantized[f"{key}_scales"] = blocks, scales
        plain[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return _write(directory, base, quantized, plain, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _write(directory: Path, base: Path, quantized: Tensors, plain: Tensors, config: dict[str, Any]) -> Pair:
    document = json.loads((base / "config.json").read_text())
    pair = Pair(directory / "quantized", directory / "plain")
    for path, tensors, changes in (
        (pair.quantized, quantized, {"quantization_config": config}),
        (pair.plain, plain, {"dtype": "float32"}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(document | changes))
        # Tensors may be views; file formats want their own memory.
        save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path / "model.safetensors")
    return pair


# ----------------------------------------------------------------------------------- formats


def gptq(*, bits: int = 4, zero_offset: int = 1, group: int = GROUP, reorder: bool = False) -> Quantize:
    """w[r, c] = scales[g, r] * (code[c, r] - (zero[g, r] + 1)), g = g_idx[c]; fields of int32, lowest first."""

    def quantize(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        groups = columns // group
        codes = rng.integers(0, 1 << bits, (columns, rows))
        zeros = rng.choice([0, 2 ** (bits - 1) - 1, 2 ** (bits - 1), (1 << bits) - 2], (groups, rows))
        scales = _scales(rng, (groups, rows), bits)
        g_idx = np.arange(columns) // group
        if reorder:
            g_idx = rng.permutation(g_idx)
        values = np.empty((rows, columns), dtype=np.float32)
        for c in range(columns):
            steps = codes[c].astype(np.float32) - (zeros[g_idx[c]] + zero_offset).astype(np.float32)
            values[:, c] = scales[g_idx[c]].astype(np.float32) * steps
        parts = {
            f"{name}qweight": _words(codes, bits, 0),
            f"{name}qzeros": _words(zeros, bits, 1),
            f"{name}scales": torch.from_numpy(scales),
            f"{name}g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }
        return parts, torch.from_numpy(values)

    return quantize


def awq(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """w[r, c] = scales[g, r] * (code[c, r] - zero[g, r]), g = c // group; outputs shuffled in each int32."""
    rows, columns = shape
    groups = columns // GROUP
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.choice([0, 7, 8, 15], (groups, rows))
    scales = _scales(rng, (groups, rows), 4)
    values = np.empty((rows, columns), dtype=np.float32)
    for c in range(columns):
        g = c // GROUP
        values[:, c] = scales[g].astype(np.float32) * (codes[c] - zeros[g]).astype(np.float32)
    parts = {
        f"{name}qweight": _words(_shuffle(codes), 4, 1),
        f"{name}qzeros": _words(_shuffle(zeros), 4, 1),
        f"{name}scales": torch.from_numpy(scales),
    }
    return parts, torch.from_numpy(values)


def packed(*, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Quantize:
    """compressed-tensors, pack-quantized: w[r, c] = scales[r, g] * (q - zero), stored as q + 2**(bits - 1)."""

    def quantize(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        groups = columns // GROUP
        half = 1 << (bits - 1)
        q = rng.integers(-half, half, shape)
        zeros = np.zeros((rows, groups), int) if symmetric else rng.choice([-half, 0, 1, half - 1], (rows, groups))
        scales = torch.from_numpy(_scales(rng, (rows, groups), bits)).to(dtype)
        steps = (q.reshape(rows, groups, -1) - zeros[:, :, None]).astype(np.float32)
        parts = {
            f"{name}weight_packed": _words(q + half, bits, 1),
            f"{name}weight_scale": scales,
            f"{name}weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            parts[f"{name}weight_zero_point"] = _words(zeros + half, bits, 0)
        return parts, (torch.from_numpy(steps) * scales.float()[:, :, None]).reshape(shape)

    return quantize


def int8(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors, int-quantized: w[r, c] = scales[r] * q."""
    q = torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))
    scales = torch.from_numpy(_scales(rng, (shape[0], 1), 8)).bfloat16()
    return {f"{name}weight": q, f"{name}weight_scale": scales}, q.float() * scales.float()


def fp8(block: tuple[int, int] | None, suffix: str = "weight_scale_inv", dims: int = 2) -> Quantize:
    """w[r, c] = float8 * scale of the block; ``block`` None: one scale for the tensor."""

    def quantize(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        high, wide = block or shape
        weight = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 100).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.uniform(0.0006, 0.002, (-(-shape[0] // high), -(-shape[1] // wide)))).float()
        values = torch.empty(shape)
        for r in range(shape[0]):
            for c in range(0, shape[1], wide):
                values[r, c : c + wide] = weight[r, c : c + wide].float() * scales[r // high, c // wide]
        return {f"{name}weight": weight, f"{name}{suffix}": scales.reshape(scales.shape[:dims])}, values

    return quantize


def _scales(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> npt.NDArray[np.float16]:
    return (rng.uniform(0.1, 0.5, shape) / (1 << bits)).astype(np.float16)


def _words(fields: Array, bits: int, dim: int) -> torch.Tensor:
    """int32 words of 32 / bits neighbours along ``dim``, lowest bits first."""
    count = 32 // bits
    moved = np.moveaxis(fields.astype(np.uint64), dim, -1)
    padded = np.pad(moved, [(0, 0), (0, -moved.shape[-1] % count)])
    words = np.zeros((*padded.shape[:-1], padded.shape[-1] // count), dtype=np.uint64)
    for i in range(count):
        words |= padded[..., i::count] << np.uint64(bits * i)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, dim)).astype(np.uint32).view(np.int32))


def _shuffle(fields: Array) -> Array:
    shuffled = np.empty_like(fields)
    for i, output in enumerate(AWQ_ORDER):
        shuffled[:, i::8] = fields[:, output::8]
    return shuffled
