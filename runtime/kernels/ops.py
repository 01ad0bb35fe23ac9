"""The kernels as functions on arrays: what the rest of moray calls. All arrays are on the CPU, float32, contiguous."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import numpy as np

from moray.runtime.arrays import Bytes, Floats, Ints
from moray.runtime.kernels import activation, attention, attention_batch, attention_prompt, moe, programs, reference
from moray.runtime.kernels.block import Variant
from moray.runtime.kernels.gates import SWIGLU, Gate
from moray.runtime.kernels.isa import INSTRUCTION_SET, PORTABLE
from moray.runtime.kernels.matmul import MAX_WIDTH, MOST_BLOCKS, compile_items
from moray.runtime.kernels.pool import Pool, current_pool
from moray.runtime.layout.packed import Numerics, PackedSpec

PANEL_SLACK = 3 * 64  # three arrays, each aligned to a cache line
EVERY_ROW: Ints = np.empty(0, dtype=np.int64)
NO_BIASES: Ints = np.empty(0, dtype=np.int64)
FUNCTIONS: Ints = np.array(
    [
        phase.address
        for phase in (
            activation.pack,
            activation.activate,
            activation.combine,
            activation.normalize,
            attention.prepare_heads,
            attention.attend,
            attention_prompt.prepare_rows,
            attention_prompt.attend_tiles,
            attention_prompt.finish_rows,
            attention_batch.prepare_batch,
            attention_batch.attend_batch,
        )
    ],
    dtype=np.int64,
)
_log = logging.getLogger(__name__)


class Scratch:
    """Memory that programs work in: grows, never shrinks. Used with the pool's lock held."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, dtype=np.uint8)
        self._size, self._address = 0, 0

    def address(self, num_bytes: int) -> int:
        if num_bytes > self._size:
            self._memory = np.empty(0, dtype=np.uint8)  # free before growing
            self._memory = np.empty(num_bytes + 64, dtype=np.uint8)
            self._size, self._address = num_bytes, -(-self._memory.ctypes.data // 64) * 64
        return self._address


SCRATCH = Scratch()


@dataclass(frozen=True, slots=True)
class MatrixKernel:
    """How the kernels see one packed matrix shape: compiled at first use, passed at every call."""

    spec: PackedSpec
    integer: bool  # int8 activations; plain encodings use float32 activations in both classes
    fields: Ints  # [K_FIELDS], see programs.py
    panel_row_bytes: int  # scratch for the panel of one row, without PANEL_SLACK for all

    @classmethod
    def of(cls, spec: PackedSpec, numerics: Numerics) -> MatrixKernel:
        integer = numerics == "int8" and spec.is_quantized
        items = checked_items(Variant(spec.encoding, spec.group, spec.meta, integer, INSTRUCTION_SET))
        return cls.with_items(spec, integer, items)

    @classmethod
    def with_items(cls, spec: PackedSpec, integer: bool, items: int) -> MatrixKernel:
        """``items`` is the address of the compiled function."""
        columns = spec.columns + (spec.columns % 2 if spec.bits == 16 else 0)
        fields = [items, integer, spec.group, spec.rows, columns, spec.block_bytes, spec.columns]
        panel = columns + 8 * spec.num_groups if integer else 4 * columns
        return cls(spec, integer, np.array(fields, dtype=np.int64), panel)

    def matmul(self, x_TC: Floats, addresses_E: Ints, starts: Ints, token_of_pair: Ints = EVERY_ROW) -> Floats:
        """[P, rows]: for each pair p of expert e, x[token_of_pair[p]] @ W_e^T; by default pair p is row p of x."""
        return _matmul(current_pool(), self, x_TC, addresses_E, starts, token_of_pair)


def _matmul(
    pool: Pool, kernel: MatrixKernel, x_TC: Floats, addresses_E: Ints, starts: Ints, token_of_pair: Ints
) -> Floats:
    assert x_TC.flags.c_contiguous and x_TC.dtype == np.float32 and x_TC.shape[1] == kernel.spec.columns
    num_pairs = int(starts[-1])
    y = np.empty((num_pairs, kernel.spec.rows), dtype=np.float32)
    if num_pairs:
        with pool.lock:
            scratch = SCRATCH.address(kernel.panel_row_bytes * num_pairs + PANEL_SLACK)
            programs.project(
                pool.address, FUNCTIONS, kernel.fields, addresses_E, starts, token_of_pair, x_TC.ctypes.data,
                x_TC.shape[1], num_pairs, y.ctypes.data, scratch,
            )  # fmt: skip
    return y


# ---------------------------------------------------------------------------------- self-check


@cache
def checked_items(variant: Variant) -> int:
    """Address of the compiled kernel of a variant, once it has been seen to equal the definition.

    Class int8 must equal reference.py bit for bit; otherwise that instruction set is refused with a warning and the
    portable kernel is used. Raises RuntimeError if that differs too.
    """
    address = int(compile_items(variant).address)
    if _equals_reference(variant, address):
        return address
    if variant.instruction_set == PORTABLE:
        raise RuntimeError(f"the portable kernel for {variant} computes wrong results on this CPU; please report this")
    _log.warning(
        "The %s kernel for %s differs from its definition on this CPU and is not used; the portable one is slower. "
        "Please report this with the output of `moray doctor`.",
        variant.instruction_set,
        variant.encoding,
    )
    return checked_items(Variant(variant.encoding, variant.group, variant.meta, variant.integer, PORTABLE))


def _equals_reference(variant: Variant, address: int) -> bool:
    """Try a small random matrix with a row tail, as often as tiles have widths, each with so many tokens."""
    columns = max(2 * variant.group, 64) if variant.group else 48
    if variant.group:
        columns = -(-columns // variant.group) * variant.group
    spec = PackedSpec(16 * (2 * MOST_BLOCKS - 1) + 5, columns, variant.encoding, variant.group, variant.meta)
    rng = np.random.default_rng(0)
    packed = _random_packed(spec, rng)
    starts = np.concatenate(([0], np.cumsum(np.arange(1, MAX_WIDTH + 1))))
    x, same = rng.standard_normal((starts[-1], columns)).astype(np.float32), np.full(MAX_WIDTH, packed.ctypes.data)
    y = MatrixKernel.with_items(spec, variant.integer, address).matmul(x, same, starts)
    if variant.integer or not variant.group:
        return np.array_equal(y, reference.matmul(x, packed, spec))
    return bool(np.allclose(y, reference.matmul_float(x, packed, spec), rtol=1e-4, atol=1e-3))


def _random_packed(spec: PackedSpec, rng: np.random.Generator) -> Bytes:
    """Any bytes are codes; scales and zeros are made harmless."""
    packed = rng.integers(0, 256, (spec.num_blocks, spec.block_bytes), dtype=np.uint8)
    if spec.meta == "f16":
        halves = rng.uniform(0.5, 4, (spec.num_blocks, (spec.block_bytes - spec.code_bytes) // 2))
        packed[:, spec.code_bytes :] = halves.astype(np.float16).view(np.uint8)
    elif spec.meta == "e8m0":
        packed[:, spec.code_bytes :] = 126 + packed[:, spec.code_bytes :] % 4
    else:
        supers = spec.code_bytes + 32 * spec.num_groups
        halves = rng.uniform(0.5, 4, (spec.num_blocks, (spec.block_bytes - supers) // 2))
        packed[:, supers:] = halves.astype(np.float16).view(np.uint8)
    if spec.encoding in ("bf16", "f16", "f32"):
        values = rng.standard_normal((spec.num_blocks, spec.block_bytes // 4)).astype(np.float32)
        if spec.encoding == "bf16":
            packed = (values.view(np.uint32) >> 16 << 16 | values.view(np.uint32) >> 16).view(np.uint8)
        elif spec.encoding == "f16":
            packed = np.repeat(values.astype(np.float16), 2, axis=1).view(np.uint8)
        else:
            packed = values.view(np.uint8)
    return np.ascontiguousarray(packed).reshape(-1)


# ---------------------------------------------------------------------------------------- calls


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
    assert x_TC.flags.c_contiguous and x_TC.dtype == np.float32 and x_TC.shape[1] == kernel.spec.columns
    y = np.empty((len(x_TC), kernel.spec.rows), dtype=np.float32)
    linear_at(kernel, packed.ctypes.data, x_TC.ctypes.data, len(x_TC), y.ctypes.data)
    return y


def linear_at(kernel: MatrixKernel, packed: int, x: int, num_rows: int, y: int) -> None:
    """``linear`` by addresses: x float32 [num_rows, C], y float32 [num_rows, R], written."""
    pool = current_pool()
    if num_rows:
        with pool.lock:
            scratch = SCRATCH.address(kernel.panel_row_bytes * num_rows + PANEL_SLACK)
            programs.linear(pool.address, FUNCTIONS, kernel.fields, packed, x, num_rows, y, scratch)


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """How the kernels see the experts of one layer."""

    gate_up: MatrixKernel
    down: MatrixKernel
    gate: Gate = SWIGLU

    def scratch_bytes(self, num_pairs: int) -> int:
        gate_up, down = self.gate_up, self.down
        per_pair = gate_up.panel_row_bytes + down.panel_row_bytes + 6 * gate_up.spec.rows + 4 * down.spec.rows
        return per_pair * num_pairs + 3 * PANEL_SLACK


def moe_layer(
    x_TH: Floats,
    weights_TK: Floats,
    grouping: Grouping,
    layer: LayerKernel,
    gate_up_addresses: Ints,
    down_addresses: Ints,
    gate_up_biases: Ints = NO_BIASES,
    down_biases: Ints = NO_BIASES,
) -> Floats:
    """One MoE layer of gated experts, all in one launch. Returns float32 [T, H].

    The addresses are of the active experts' packed matrices, and of their float32 biases if they have any, in the
    order of ``grouping.active``.
    """
    assert x_TH.flags.c_contiguous and weights_TK.flags.c_contiguous
    out = np.empty((len(x_TH), layer.down.spec.rows), dtype=np.float32)
    at = (x_TH.ctypes.data, weights_TK.ctypes.data, out.ctypes.data)
    moe_layer_at(*at, grouping, layer, gate_up_addresses, down_addresses, gate_up_biases, down_biases)
    return out


def moe_layer_at(
    x: int,
    weights: int,
    out: int,
    grouping: Grouping,
    layer: LayerKernel,
    gate_up_addresses: Ints,
    down_addresses: Ints,
    gate_up_biases: Ints = NO_BIASES,
    down_biases: Ints = NO_BIASES,
    rows: Ints = EVERY_ROW,
) -> None:
    """``moe_layer`` with x [T, H], weights [T, K] and out [., H] by address. rows [T]: where in out each token goes."""
    pool, gate_up, down = current_pool(), layer.gate_up, layer.down
    with pool.lock:
        scratch = SCRATCH.address(layer.scratch_bytes(len(grouping.token_of_pair)))
        moe.moe_layer(
            pool.address, FUNCTIONS, layer.gate.fields, gate_up.fields, gate_up_addresses, gate_up_biases,
            down.fields, down_addresses, down_biases, grouping.starts, grouping.token_of_pair, grouping.positions,
            x, weights, out, rows.ctypes.data if len(rows) else 0, scratch,
        )  # fmt: skip


def combine(y_PH: Floats, grouping: Grouping, weights_TK: Floats) -> Floats:
    """Weighted sum of the pairs of each token, in the router's order. Returns float32 [T, H]."""
    out = np.empty((len(weights_TK), y_PH.shape[1]), dtype=np.float32)
    pool = current_pool()
    with pool.lock:
        moe.combine_pairs(
            pool.address, FUNCTIONS, y_PH.ctypes.data, grouping.positions, weights_TK.ctypes.data, y_PH.shape[1],
            out.ctypes.data,
        )  # fmt: skip
    return out


def rms_norm_at(x: int, weight: int, num_rows: int, columns: int, epsilon_bits: int, out: int) -> None:
    """RMSNorm of float32 [num_rows, columns] with weight [columns], by addresses; ``out`` is written."""
    pool = current_pool()
    if num_rows:
        with pool.lock:
            programs.rms_norm(pool.address, FUNCTIONS, x, weight, num_rows, columns, epsilon_bits, out)
