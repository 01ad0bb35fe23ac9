"""Names of files that come from files, and folders of caches."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path, PurePosixPath


def is_outside(name: str) -> bool:
    """Whether a relative name, joined to a directory, could lead out of it: absolute, or through ``..``."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def cache_folder(name: str) -> Path:
    """A folder of this user's cache, made if need be; where the home is read-only, one for each boot."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moray" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"moray-{os.getuid()}" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
