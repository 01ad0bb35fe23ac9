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
    """w[r, c] = scales[g, r] * (code[c, r] - zero[g, r]), g = g_idx[c]; fields of int32, lowest first.

    The older format counts the zeros' words down by ``zero_offset`` in each field. ``reorder``: act-order.
    """

    def quantize(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        width = columns if group == -1 else group
        groups = columns // width
        codes = rng.integers(0, 1 << bits, (columns, rows))
        zeros = rng.choice([0, 1, 2 ** (bits - 1), (1 << bits) - 1], (groups, rows))
        scales = _scales(rng, (groups, rows), bits)
        g_idx = np.arange(columns) // width
        if reorder:
            g_idx = rng.permutation(g_idx)
        values = np.empty((rows, columns), dtype=np.float32)
        for c in range(columns):
            steps = codes[c].astype(np.float32) - zeros[g_idx[c]].astype(np.float32)
            values[:, c] = scales[g_idx[c]].astype(np.float32) * steps
        parts = {
            f"{name}qweight": _words(codes, bits, 0),
            f"{name}qzeros": _words(zeros, bits, 1) - sum(zero_offset << shift for shift in range(0, 32, bits)),
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


def int8_with_zeros(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors, naive-quantized, asymmetric, in groups: w[r, c] = scales[r, g] * (q - zero[r, g])."""
    groups = shape[1] // GROUP
    q = rng.integers(-128, 128, shape, dtype=np.int8)
    zeros = rng.choice(np.array([-128, -3, 0, 127], dtype=np.int8), (shape[0], groups))
    scales = torch.from_numpy(_scales(rng, (shape[0], groups), 8))
    steps = q.astype(np.float32).reshape(*zeros.shape, GROUP) - zeros.astype(np.float32)[:, :, None]
    parts = {
        f"{name}weight": torch.from_numpy(q),
        f"{name}weight_scale": scales,
        f"{name}weight_zero_point": torch.from_numpy(zeros),
    }
    return parts, (torch.from_numpy(steps) * scales.float()[:, :, None]).reshape(shape)


def mxfp4(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors, mxfp4-pack-quantized: w[r, c] = E2M1 * 2**(e[r, c // 32] - 127), even columns in low bits."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    exponents = rng.integers(118, 124, (shape[0], shape[1] // 32), dtype=np.uint8)
    signs = np.where(codes & 8, np.float32(-1), np.float32(1))
    powers = np.exp2(exponents.astype(np.float32) - 127)
    values = signs * magnitudes[codes & 7] * np.repeat(powers, 32, axis=1)
    parts = {
        f"{name}weight_packed": torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4),
        f"{name}weight_scale": torch.from_numpy(exponents),
    }
    return parts, torch.from_numpy(values)


def mxfp4_in_int8(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """The same as DeepSeek-V4 has its experts: int8, and scales of type float8_e8m0."""
    parts, values = mxfp4(name, shape, rng)
    codes, exponents = parts.values()
    return {f"{name}weight": codes.view(torch.int8), f"{name}scale": exponents.view(torch.float8_e8m0fnu)}, values


def fp8(
    block: tuple[int, int] | None,
    suffix: str = "weight_scale_inv",
    dims: int = 2,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    activations: str | None = None,
) -> Quantize:
    """w[r, c] = float8 * scale of the block; ``block`` None: one scale for the tensor, (1, 0): one for each row.

    ``scale_dtype`` uint8 and float8_e8m0: powers of two. ``activations``: the name of a scale for them.
    """

    def quantize(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        high, wide = (block[0], block[1] or shape[1]) if block else shape
        grid = -(-shape[0] // high), -(-shape[1] // wide)
        weight = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 100).to(dtype)
        if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = torch.from_numpy(rng.integers(116, 119, grid, dtype=np.uint8)).view(scale_dtype)
            factors = np.exp2(scales.view(torch.uint8).numpy().astype(np.float32) - 127)
        else:
            scales = torch.from_numpy(rng.uniform(0.0006, 0.002, grid)).to(scale_dtype)
            factors = scales.float().numpy()
        values = torch.empty(shape)
        for r in range(shape[0]):
            for c in range(0, shape[1], wide):
                values[r, c : c + wide] = weight[r, c : c + wide].float() * float(factors[r // high, c // wide])
        parts = {f"{name}weight": weight, f"{name}{suffix}": scales.reshape(scales.shape[:dims])}
        if activations:
            parts[f"{name}{activations}"] = torch.tensor(0.01)
        return parts, values

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
