"""The kernels as functions on arrays: what the rest of moray calls. All arrays are on the CPU, float32, contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.runtime.kernels import activation, moe
from moray.runtime.kernels.matmul import ENCODING_CODES
from moray.runtime.layout.packed import Bytes, Numerics, PackedSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

EVERY_ROW: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MatrixKernel:
    """How the kernels see one packed matrix shape: computed once, passed at every call."""

    spec: PackedSpec
    integer: bool  # int8 activations; plain encodings use float32 activations in both classes
    columns: int  # with the zero column that pads an odd count of 16-bit columns
    parameters: Ints  # [6]: integer, encoding, group, rows, columns, block bytes

    @classmethod
    def of(cls, spec: PackedSpec, numerics: Numerics) -> MatrixKernel:
        integer = numerics == "int8" and spec.is_quantized
        columns = spec.columns + (spec.columns % 2 if spec.bits == 16 else 0)
        values = [integer, ENCODING_CODES[spec.encoding], spec.group, spec.rows, columns, spec.block_bytes]
        return cls(spec, integer, columns, np.array(values, dtype=np.int64))

    def pad(self, x_PC: Floats) -> Floats:
        if self.columns == x_PC.shape[1]:
            return x_PC
        return np.pad(x_PC, ((0, 0), (0, self.columns - x_PC.shape[1])))

    def matmul(self, x_TC: Floats, addresses_E: Ints, starts: Ints, token_of_pair: Ints = EVERY_ROW) -> Floats:
        """[P, rows]: for each pair p of expert e, x[token_of_pair[p]] @ W_e^T; by default pair p is row p of x."""
        y = np.empty((starts[-1], self.spec.rows), dtype=np.float32)
        moe.project(self.integer, *self.parameters[1:].tolist(), addresses_E, starts, token_of_pair, self.pad(x_TC), y)
        return y


@dataclass(frozen=True, slots=True)
class Grouping:
    """The pairs of one layer sorted by expert (see moe.group_by_expert)."""

    active: Ints
    starts: Ints
    token_of_pair: Ints
    positions: Ints


def group_by_expert(ids_TK: Ints, num_experts: int) -> Grouping:
    return Grouping(*moe.group_by_expert(ids_TK, num_experts))


def linear(x_TC: Floats, packed: Bytes, kernel: MatrixKernel) -> Floats:
    """x @ W^T for one packed matrix."""
    address = np.array([packed.ctypes.data], dtype=np.int64)
    starts = np.array([0, len(x_TC)], dtype=np.int64)
    return kernel.matmul(x_TC, address, starts)


def moe_swiglu(
    x_TH: Floats,
    weights_TK: Floats,
    grouping: Grouping,
    gate_up: MatrixKernel,
    gate_up_addresses: Ints,
    down: MatrixKernel,
    down_addresses: Ints,
) -> Floats:
    """One MoE layer of SwiGLU experts, all in one launch. Returns float32 [T, H].

    The addresses are of the active experts' packed matrices, in the order of ``grouping.active``.
    """
    out = np.empty((len(x_TH), down.spec.rows), dtype=np.float32)
    moe.moe_swiglu(
        gate_up.parameters,
        gate_up_addresses,
        down.parameters,
        down_addresses,
        grouping.starts,
        grouping.token_of_pair,
        grouping.positions,
        gate_up.pad(x_TH),
        weights_TK,
        out,
    )
    return out


def combine(y_PH: Floats, grouping: Grouping, weights_TK: Floats) -> Floats:
    """Weighted sum of the pairs of each token, in the router's order. Returns float32 [T, H]."""
    out = np.empty((len(weights_TK), y_PH.shape[1]), dtype=np.float32)
    activation.combine(y_PH, grouping.positions, weights_TK, out)
    return out
