"""A layer's experts in one launch, from shards wherever they lie: what compute processes and hosts share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moray.runtime.arrays import Floats, Ints
from moray.runtime.kernels import ops
from moray.runtime.kernels.gates import Gate
from moray.runtime.kernels.ops import EVERY_ROW, NO_BIASES, Grouping, LayerKernel, MatrixKernel
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ShardLayout, ShardTensor


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """How a layer's gated experts are computed, biases included."""

    kernel: LayerKernel
    gate_up_at: int  # offsets in a shard
    down_at: int
    gate_up_bias: ShardTensor | None
    down_bias: ShardTensor | None

    @classmethod
    def of(cls, layout: ShardLayout, numerics: Numerics, gate: Gate) -> FusedExperts:
        gate_up, down = layout["gate_up_proj"], layout["down_proj"]
        assert gate_up.spec is not None and down.spec is not None
        kernel = LayerKernel(MatrixKernel.of(gate_up.spec, numerics), MatrixKernel.of(down.spec, numerics), gate)
        biases = layout.get("gate_up_proj_bias"), layout.get("down_proj_bias")
        return cls(kernel, gate_up.offset, down.offset, *biases)

    def compute_at(
        self, x: int, weights: int, out: int, grouping: Grouping, shards_E: Ints, rows: Ints = EVERY_ROW
    ) -> None:
        """Weighted sums of the experts at ``shards_E``, by addresses: ``ops.moe_layer_at``."""
        gate_up_biases, down_biases = (
            NO_BIASES if bias is None else shards_E + bias.offset for bias in (self.gate_up_bias, self.down_bias)
        )
        ops.moe_layer_at(
            x, weights, out, grouping, self.kernel, shards_E + self.gate_up_at, shards_E + self.down_at,
            gate_up_biases, down_biases, rows,
        )  # fmt: skip

    def compute_pairs(self, x_TH: Floats, experts: Ints, starts: Ints, row_of_pair: Ints, shards_E: Ints) -> Floats:
        """float32 [P, H]: each pair's own output, unweighted; pair p takes row ``row_of_pair[p]`` of x."""
        num_pairs = len(row_of_pair)
        positions, ones = _unweighted(num_pairs)
        grouping = Grouping(experts, starts, row_of_pair, positions)
        y_PH = np.empty((num_pairs, self.kernel.down.spec.rows), dtype=np.float32)
        self.compute_at(x_TH.ctypes.data, ones.ctypes.data, y_PH.ctypes.data, grouping, shards_E)
        return y_PH


@lru_cache(maxsize=16)  # decoding asks for a few again and again
def _unweighted(num_pairs: int) -> tuple[Ints, Floats]:
    """[P, 1]: each pair is a token of its own, of weight 1."""
    return np.arange(num_pairs, dtype=np.int64)[:, None], np.ones((num_pairs, 1), dtype=np.float32)
