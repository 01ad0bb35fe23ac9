"""Compile the kernels that a store needs: ``python -m moray.runtime.kernels.compile STORE int8``.

Prints ``done total what`` before each step, and leaves a stamp beside the compiled kernels (cache.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moray.runtime.kernels import ops
from moray.runtime.kernels.cache import compiled_stamp, needed_kernels
from moray.runtime.kernels.memory import all_equal
from moray.runtime.kernels.ops import LayerKernel, MatrixKernel
from moray.runtime.layout.packed import Numerics, PackedSpec
from moray.runtime.store.store import Store


def compile_kernels(store: Path, numerics: Numerics) -> None:
    """Compile and check each kind of matrix, then what every layer uses."""
    with Store.open(store) as opened:
        specs = needed_kernels(opened.manifest)
    total = len(specs) + 1
    for done, spec in enumerate(specs):
        print(done, total, spec.encoding, flush=True)
        MatrixKernel.of(spec, numerics)
    print(total - 1, total, "layers", flush=True)
    _try_layer(numerics)
    compiled_stamp(specs, numerics).touch()


def _try_layer(numerics: Numerics) -> None:
    plain = PackedSpec(32, 32, "f32")
    matrix = np.zeros(plain.num_bytes, dtype=np.uint8)
    kernel = MatrixKernel.of(plain, numerics)
    grouping = ops.group_by_expert(np.zeros((1, 1), dtype=np.int64), 1)
    down = MatrixKernel.of(PackedSpec(32, 16, "f32"), numerics)
    x, at = np.zeros((1, 32), dtype=np.float32), np.array([matrix.ctypes.data])
    ops.moe_layer(x, np.ones((1, 1), dtype=np.float32), grouping, LayerKernel(kernel, down), at, at)
    ops.combine(x, grouping, np.ones((1, 1), dtype=np.float32))
    all_equal(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


if __name__ == "__main__":
    compile_kernels(Path(sys.argv[1]), "float" if sys.argv[2] == "float" else "int8")
