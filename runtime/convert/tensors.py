"""Where a checkpoint's tensors lie, and safetensors' names of types."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: What a model's weights may be.
DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: What can be read: parts of quantized weights, too.
STORED_DTYPES = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts bytes from the start of its file."""

    file: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
