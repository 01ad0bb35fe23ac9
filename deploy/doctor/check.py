"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.runtime.errors import MorayError


@dataclass(frozen=True, slots=True)
class Check:
    """One finding about this machine."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def describe(error: Exception) -> str:
    """An error in one line. Ours say what to do; others need their type to be understood."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, MorayError) else f"{type(error).__name__}: {text}"
