"""Counts in a config.json that no model has: transformers would build lists and modules of that length, for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moray.runtime.errors import CheckpointError

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
MAX_SIZE = 1 << 40
_MAX_DEPTH = 20


def check_counts(file: Path, value: Any, name: str = "", depth: int = 0) -> None:
    """Raises CheckpointError for a number, anywhere in the document, that is larger than a model can have."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{file} is nested deeper than {_MAX_DEPTH}; download it again")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_counts(file, inner, str(key), depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_counts(file, inner, name, depth + 1)
    elif type(value) is int and abs(value) > (limit := _limit(name)):
        raise CheckpointError(f"{file} has {name!r:.80} {value:.3g}, expected at most {limit:.3g}; download it again")


def _limit(name: str) -> int:
    if "layer" in name or name == "depth":
        return MAX_LAYERS
    return MAX_EXPERTS if "expert" in name else MAX_SIZE
