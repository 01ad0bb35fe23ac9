"""Numba's settings, made once, before any kernel is compiled. Import this before `numba.njit` is used.

One OpenMP runtime: torch ships its own libgomp; loading it first makes Numba's OpenMP layer use the same one, so
both share one pool of threads, and kernels may run from several Python threads (the `workqueue` layer aborts).

The compiled-kernel cache lies in a folder named after the sources and the instruction set, because Numba does not
notice an edited intrinsic.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path

import numba
import torch

from moray.runtime.kernels.isa import INSTRUCTION_SET


def _load_torch_openmp() -> bool:
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return True
    return False


def _cache_folder() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {INSTRUCTION_SET}".encode())
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


def set_num_threads(count: int) -> None:
    """Give torch and Numba the same number of threads. Call once in each process that computes.

    An actor with num_cpus=0 would otherwise give torch one thread and Numba every core.
    """
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


numba.config.THREADING_LAYER = "omp" if _load_torch_openmp() else "threadsafe"
numba.config.CACHE_DIR = _cache_folder()
