"""Names of files that come from files."""

from __future__ import annotations

from pathlib import PurePosixPath


def is_outside(name: str) -> bool:
    """Whether a relative name, joined to a directory, could lead out of it: absolute, or through ``..``."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name
