"""What a checkpoint's config.json says about how it is quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moray.runtime.errors import CheckpointError

_TYPES = {"float32": torch.float32, "float16": torch.float16}


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
        method = str(found.get("quant_method") or "unknown").replace("QuantizationMethod.", "").lower()
        return cls(method, found, _TYPES.get(str(name), torch.bfloat16))

    def get(self, *names: str) -> Any:
        """The first of these settings that is there; None if none is."""
        return next((self.document[name] for name in names if self.document.get(name) is not None), None)


def _quantization(document: Mapping[str, Any]) -> Any:
    return document.get("quantization_config") or document.get("compression_config")
