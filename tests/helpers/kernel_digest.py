"""Prints a digest of the kernels' outputs on fixed inputs. Run in processes of several instruction sets."""

from __future__ import annotations

import hashlib

import numpy as np
from helpers.matrices import random_matrix

from moray.runtime.kernels import ops
from moray.runtime.kernels.isa import INSTRUCTION_SET
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.layout.packed import Numerics, PackedSpec

SPECS = [
    PackedSpec(21, 128, "q8", 64),
    PackedSpec(21, 192, "q4", 64),
    PackedSpec(21, 192, "q3", 96),
    PackedSpec(21, 96, "q2", 32),
    PackedSpec(21, 33, "bf16"),
    PackedSpec(21, 33, "f16"),
    PackedSpec(21, 33, "f32"),
]


def kernel_digest() -> str:
    """Every encoding in both classes, single tokens and tiles, and one whole MoE layer."""
    rng = np.random.default_rng(1)
    digest = hashlib.sha256()
    numerics: tuple[Numerics, ...] = ("int8", "float")
    for spec in SPECS:
        packed = random_matrix(spec, rng)
        x = rng.standard_normal((6, spec.columns)).astype(np.float32)
        x[1, 0] = 1000  # an outlier: most codes of its group are 0
        for kind in numerics:
            digest.update(ops.linear(x, packed, MatrixKernel.of(spec, kind)).tobytes())
    up, down = PackedSpec(64, 64, "q4", 64), PackedSpec(64, 32, "q8", 32)
    experts = [(random_matrix(up, rng), random_matrix(down, rng)) for _ in range(3)]
    ids = np.array([[0, 1], [2, 0], [0, 2], [1, 2], [0, 1], [0, 2]], dtype=np.int64)
    weights = rng.uniform(0, 1, ids.shape).astype(np.float32)
    x = rng.standard_normal((len(ids), 64)).astype(np.float32)
    up_at, down_at = (np.array([e[i].ctypes.data for e in experts], dtype=np.int64) for i in (0, 1))
    grouping = ops.group_by_expert(ids, len(experts))
    kernels = MatrixKernel.of(up, "int8"), MatrixKernel.of(down, "int8")
    digest.update(ops.moe_swiglu(x, weights, grouping, kernels[0], up_at, kernels[1], down_at).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(INSTRUCTION_SET, kernel_digest())
