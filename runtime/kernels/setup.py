"""Numba's settings, made once, before any kernel is compiled. Import this before `numba.njit` is used.

The compiled-kernel cache lies in a folder named after the sources, the CPU and the instruction set, because Numba
does not notice an edited intrinsic.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
import numba

from moray.runtime.kernels.isa import INSTRUCTION_SET


def _cache_folder() -> str:
    cpu = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    digest = hashlib.sha256(f"{numba.__version__} {INSTRUCTION_SET} {cpu}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moray" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile once for each boot
        folder = Path(tempfile.gettempdir()) / f"moray-{os.getuid()}" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder)


numba.config.CACHE_DIR = _cache_folder()
