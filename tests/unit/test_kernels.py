from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.matrices import COMPILED_GROUPS, Floats, assert_same_bits, random_matrix, specs
from helpers.rows import gated, quantize_rows, swiglu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moray.runtime.kernels import ops, reference
from moray.runtime.kernels.activation import SLICE
from moray.runtime.kernels.block import Variant
from moray.runtime.kernels.dequantize import dequantize, dequantize_rows
from moray.runtime.kernels.gates import Gate
from moray.runtime.kernels.isa import INSTRUCTION_SET, INSTRUCTION_SETS, best_instruction_set, detect_instruction_set
from moray.runtime.kernels.lookup import lookup
from moray.runtime.kernels.memory import all_equal
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.kernels.pool import current_pool, set_num_threads
from moray.runtime.kernels.programs import SERIAL_BYTES, SERIAL_PRODUCTS
from moray.runtime.layout.packed import ENCODINGS, METAS, Bytes, Encoding, PackedSpec, pack_fp4, pack_plain
from moray.runtime.model.expert_gates import apply_gate

Ints = npt.NDArray[np.int64]

# One matrix of every encoding, with several groups, a row tail and, in 16 bits, an odd row.
SPECS = [
    PackedSpec(37, 96, "q8", 32),
    PackedSpec(37, 192, "q4", 64),
    PackedSpec(37, 192, "q3", 64),
    PackedSpec(37, 64, "q2", 16),
    PackedSpec(37, 192, "q4", 32, "u8"),
    PackedSpec(37, 640, "q3", 32, "u8"),
    PackedSpec(37, 272, "q2", 16, "u8"),  # 17 groups: two super-scales a row
    PackedSpec(37, 160, "fp4", 32, "e8m0"),
    PackedSpec(37, 41, "bf16"),
    PackedSpec(37, 41, "f16"),
    PackedSpec(37, 41, "f32"),
]
QUANTIZED = [spec for spec in SPECS if spec.is_quantized]


def name_of(spec: PackedSpec) -> str:
    return spec.encoding + "-u8" * (spec.meta == "u8")


every_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
every_quantized = pytest.mark.parametrize("spec", QUANTIZED, ids=name_of)
seeds = st.integers(0, 2**31)
compiled_specs = partial(specs, ENCODINGS, groups_of=COMPILED_GROUPS.__getitem__)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests may change the number of threads."""
    before = current_pool().num_threads
    yield
    set_num_threads(before)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def addresses_of(matrices: list[Bytes]) -> Ints:
    return np.array([matrix.ctypes.data for matrix in matrices], dtype=np.int64)


# -------------------------------------------------------------------------- matrix products, int8


@settings(max_examples=150, deadline=None)
@given(compiled_specs(metas=METAS), st.integers(1, 19), st.sampled_from([1, 2]), seeds)
def test_int8_equals_the_reference_bit_for_bit(spec: PackedSpec, batch: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed, x = random_matrix(spec, rng), normal(rng, batch, spec.columns)
    set_num_threads(threads)
    y = ops.linear(x, packed, MatrixKernel.of(spec, "int8"))
    assert_same_bits(y, reference.matmul(x, packed, spec))


@pytest.mark.parametrize(
    ("encoding", "group"), [("q8", 20), ("q4", 24), ("q3", 96), ("q2", 48), ("q8", 256), ("q4", 512)]
)
def test_unusual_groups_equal_the_reference(encoding: Encoding, group: int) -> None:
    rng = np.random.default_rng(0)
    spec = PackedSpec(17, 2 * group, encoding, group)
    packed, x = random_matrix(spec, rng), normal(rng, 15, spec.columns)
    assert_same_bits(ops.linear(x, packed, MatrixKernel.of(spec, "int8")), reference.matmul(x, packed, spec))


@every_spec
@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_a_row_is_the_same_alone_and_in_any_batch(spec: PackedSpec, numerics: str) -> None:
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 9, spec.columns)
    kernel = MatrixKernel.of(spec, numerics)
    alone = [ops.linear(x[t : t + 1], packed, kernel)[0] for t in range(9)]
    for batch in range(1, 10):
        for threads in (1, 2):
            set_num_threads(threads)
            assert_same_bits(ops.linear(x[:batch], packed, kernel), np.stack(alone[:batch]))


@every_spec
def test_no_rows_give_no_rows(spec: PackedSpec) -> None:
    packed = random_matrix(spec, np.random.default_rng(0))
    y = ops.linear(np.empty((0, spec.columns), dtype=np.float32), packed, MatrixKernel.of(spec, "int8"))
    assert y.shape == (0, spec.rows)


@settings(max_examples=40, deadline=None)
@given(compiled_specs(), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from(["int8", "float"]), seeds)
def test_experts_with_uneven_counts_are_computed_as_if_alone(
    spec: PackedSpec, counts: list[int], numerics: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrices, x = [random_matrix(spec, rng) for _ in counts], normal(rng, 6, spec.columns)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    token_of_pair = rng.integers(0, len(x), starts[-1])
    kernel = MatrixKernel.of(spec, numerics)
    y = kernel.matmul(x, addresses_of(matrices), starts, token_of_pair)
    for e, matrix in enumerate(matrices):
        pairs = slice(starts[e], starts[e + 1])
        assert_same_bits(y[pairs], ops.linear(x[token_of_pair[pairs]], matrix, kernel))


def test_a_row_tail_does_not_write_into_the_next_token() -> None:
    spec = PackedSpec(1, 64, "q4", 64)
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 9, 64)
    assert_same_bits(ops.linear(x, packed, MatrixKernel.of(spec, "int8")), reference.matmul(x, packed, spec))


# The kernels wake other threads only for work above these sizes; what comes before is far below them.


@every_spec
def test_large_matrices_equal_the_reference_for_any_threads(spec: PackedSpec) -> None:
    rows = 2 * SERIAL_BYTES * 8 // (spec.columns * spec.bits) | 1  # with a tail
    spec = replace(spec, rows=rows)
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 6, spec.columns)
    expected = reference.matmul(x, packed, spec)
    for threads in (1, 2):
        set_num_threads(threads)
        assert_same_bits(ops.linear(x, packed, MatrixKernel.of(spec, "int8")), expected)


@every_spec
@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_large_batches_equal_single_rows_for_any_threads(spec: PackedSpec, numerics: str) -> None:
    batch = 2 * SERIAL_PRODUCTS // (spec.rows * spec.columns) | 1
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, batch, spec.columns)
    kernel = MatrixKernel.of(spec, numerics)
    alone = np.concatenate([ops.linear(row[None], packed, kernel) for row in x])
    for threads in (1, 2):
        set_num_threads(threads)
        assert_same_bits(ops.linear(x, packed, kernel), alone)


# ------------------------------------------------------------------------------ adversarial values

SPECIAL = {
    "zeros": 0.0,
    "negative zero": -0.0,
    "outlier": 1e30,
    "largest": 3.4e38,
    "smallest normal": 1.2e-38,
    "denormal": 1e-42,
    "smallest": 1e-45,
}


@every_spec
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
def test_extreme_activations_equal_the_reference(spec: PackedSpec, value: float) -> None:
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 6, spec.columns)
    x[1] = value  # a whole row
    x[2, 3] = value  # one outlier in a group
    x[4] = np.clip(x[4], -1, 1) * np.float32(value)
    x[5] = np.where(rng.random(spec.columns) < 0.5, np.float32(value), -np.float32(value))
    with np.errstate(all="ignore"):
        expected = reference.matmul(x, packed, spec)
    assert_same_bits(ops.linear(x, packed, MatrixKernel.of(spec, "int8")), expected)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.integers(1, 5).flatmap(lambda n: hnp.arrays(np.float32, (n, 640), elements=st.floats(width=32))),
)
def test_any_activations_at_all_equal_the_reference(spec: PackedSpec, x: Floats) -> None:
    x = np.ascontiguousarray(x[:, : spec.columns])
    packed = random_matrix(spec, np.random.default_rng(0))
    with np.errstate(all="ignore"):
        expected = reference.matmul(x, packed, spec)
    assert_same_bits(ops.linear(x, packed, MatrixKernel.of(spec, "int8")), expected)


@every_spec
@pytest.mark.parametrize("numerics", ["int8", "float"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_own_rows_only(spec: PackedSpec, numerics: str, value: float) -> None:
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 9, spec.columns)
    kernel = MatrixKernel.of(spec, numerics)
    clean = ops.linear(x, packed, kernel)
    x[2, 0], x[7, spec.columns - 1] = value, value  # in a tile of four tokens, and in the single ones after
    y = ops.linear(x, packed, kernel)
    spoiled = np.isin(np.arange(9), [2, 7])
    assert not np.isfinite(y[spoiled]).any()
    if numerics == "int8" and spec.is_quantized:
        assert np.isnan(y[spoiled]).all()
    assert_same_bits(y[~spoiled], clean[~spoiled])


def test_zero_activations_give_zero_even_where_the_zero_point_is_large() -> None:
    spec = PackedSpec(16, 64, "q4", 64)
    packed = random_matrix(spec, np.random.default_rng(0))
    assert not ops.linear(np.zeros((3, 64), np.float32), packed, MatrixKernel.of(spec, "int8")).any()


@every_quantized
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_activations_do_not_saturate(spec: PackedSpec, sign: int) -> None:
    packed = np.full(spec.num_bytes, 0xFF, dtype=np.uint8).reshape(spec.num_blocks, -1)
    if spec.meta != "f16":
        pytest.skip("written for float16 scales")
    packed[:, spec.code_bytes :] = np.full(spec.num_groups * 32, 1, np.float16).view(np.uint8)
    packed = packed.reshape(-1)
    x = np.full((5, spec.columns), sign, dtype=np.float32)
    y = ops.linear(x, packed, MatrixKernel.of(spec, "int8"))
    largest = 2**spec.bits - 1
    expected = sign * spec.columns * (largest - 1) / 256
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert_same_bits(y, reference.matmul(x, packed, spec))


# ------------------------------------------------------------------------------------------ float


@settings(max_examples=100, deadline=None)
@given(compiled_specs(), st.integers(1, 9), seeds)
def test_float_is_close_to_float64(spec: PackedSpec, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed, x = random_matrix(spec, rng), normal(rng, batch, spec.columns)
    weights = reference.dequantize(packed, spec).astype(np.float64)
    y = ops.linear(x, packed, MatrixKernel.of(spec, "float"))
    exact = x.astype(np.float64) @ weights.T
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weights).T  # a sum may cancel; its terms do not
    assert np.all(np.abs(y - exact) <= 1e-5 * magnitude)


@settings(max_examples=40, deadline=None)
@given(specs(("f32", "bf16", "f16")), st.integers(1, 9), seeds)
def test_plain_encodings_are_the_same_in_both_classes(spec: PackedSpec, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed, x = random_matrix(spec, rng), normal(rng, batch, spec.columns)
    one, other = (ops.linear(x, packed, MatrixKernel.of(spec, numerics)) for numerics in ("int8", "float"))
    assert_same_bits(one, other)
    assert_same_bits(one, reference.matmul_float(x, packed, spec))


def test_int8_is_close_to_float() -> None:
    rng = np.random.default_rng(0)
    for spec in QUANTIZED:
        packed, x = random_matrix(spec, rng), normal(rng, 8, spec.columns)
        one, other = (ops.linear(x, packed, MatrixKernel.of(spec, numerics)) for numerics in ("int8", "float"))
        assert 0 < np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


# ------------------------------------------------------------------------------------- activations


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([16, 20, 48]), st.integers(1, 4), st.integers(1, 3), st.data())
def test_quantized_activations_equal_the_reference(group: int, rows: int, groups: int, data: st.DataObject) -> None:
    x = data.draw(hnp.arrays(np.float32, (rows, group * groups), elements=st.floats(width=32)))
    codes, scales, sums = quantize_rows(x, group)
    with np.errstate(all="ignore"):
        expected = reference.quantize_activations(x, group)
    np.testing.assert_array_equal(codes, expected[0])
    assert_same_bits(scales, expected[1])
    np.testing.assert_array_equal(sums, expected[2])


def test_activations_are_rounded_half_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, -127] + [0] * 6], dtype=np.float32)
    codes, scales, sums = quantize_rows(x, 16)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126, -127] + [0] * 6
    assert (scales[0, 0], sums[0, 0]) == (1, 0)


pairs = st.tuples(st.integers(1, 5), st.integers(1, 40)).flatmap(
    lambda shape: st.tuples(*(hnp.arrays(np.float32, shape, elements=st.floats(width=32)) for _ in range(2)))
)


@settings(max_examples=150, deadline=None)
@given(pairs)
def test_swiglu_equals_the_reference_bit_for_bit(gate_and_up: tuple[Floats, Floats]) -> None:
    with np.errstate(all="ignore"):
        expected = reference.swiglu(*gate_and_up)
    assert_same_bits(swiglu(*gate_and_up), expected)


@pytest.mark.parametrize("values", [1111, 1 << 15])
def test_swiglu_equals_the_reference_over_its_whole_range(values: int) -> None:
    gate = np.linspace(-95, 95, 3 * values, dtype=np.float32).reshape(3, values)
    up = normal(np.random.default_rng(0), 3, values)
    assert_same_bits(swiglu(gate, up), reference.swiglu(gate, up))


@pytest.mark.parametrize(
    "gate",
    [Gate(), Gate(limit=7.0), Gate(limit=7.0, alpha=1.702), Gate(7.0, 1.702, is_interleaved=True), Gate(is_gelu=True)],
    ids=["silu", "clamped", "alpha", "interleaved", "gelu"],
)
@pytest.mark.parametrize("width", [32, 37])
def test_gates_are_what_torch_computes(gate: Gate, width: int) -> None:
    x = 8 * normal(np.random.default_rng(0), 2 * width)
    np.testing.assert_allclose(gated(gate, x), apply_gate(gate, torch.from_numpy(x)), rtol=2e-6, atol=1e-6)


def test_a_gate_that_is_not_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one of those that are compiled"):
        Gate(alpha=1.702)


def test_swiglu_is_close_to_float64() -> None:
    rng = np.random.default_rng(0)
    gate = np.concatenate([np.linspace(-80, 80, 20000), np.geomspace(1e-30, 1, 1000)]).astype(np.float32)[None]
    up = normal(rng, *gate.shape)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(swiglu(gate, up), exact, rtol=1e-6, atol=1e-44)


# ---------------------------------------------------------------------------------------- grouping


def group_plainly(ids: list[list[int]], num_experts: int) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """What ``group_by_expert`` does, in plain Python."""
    tokens = {e: [t for t, row in enumerate(ids) for k in row if k == e] for e in range(num_experts)}
    active = [e for e in tokens if tokens[e]]
    starts = [0]
    for e in active:
        starts.append(starts[-1] + len(tokens[e]))
    taken = dict(zip(active, starts[:-1], strict=True))
    positions = [[-1] * len(row) for row in ids]
    for t, row in enumerate(ids):
        for k, e in enumerate(row):
            if e in taken:
                positions[t][k] = taken[e]
                taken[e] += 1
    return active, starts, [t for e in active for t in tokens[e]], positions


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(1, 4), st.data())
def test_grouping_equals_a_plain_one(num_experts: int, tokens: int, k: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(-2, num_experts + 2), min_size=k, max_size=k)
    ids = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    grouping = ops.group_by_expert(np.array(ids, dtype=np.int64).reshape(tokens, k), num_experts)
    found = (grouping.active, grouping.starts, grouping.token_of_pair, grouping.positions)
    assert tuple(part.tolist() for part in found) == group_plainly(ids, num_experts)


def test_nobody_needs_an_expert() -> None:
    grouping = ops.group_by_expert(np.full((3, 2), 8, dtype=np.int64), 8)
    assert grouping.active.tolist() == [] and grouping.starts.tolist() == [0]
    assert (grouping.positions == -1).all()
    out = ops.combine(np.empty((0, 5), np.float32), grouping, np.ones((3, 2), np.float32))
    assert_same_bits(out, np.zeros((3, 5), np.float32))


# -------------------------------------------------------------------------------------- whole layer


def moe_plainly(
    x: Floats, weights: Floats, ids: Ints, layer: tuple[PackedSpec, PackedSpec], up: list[Bytes], down: list[Bytes]
) -> Floats:
    """A MoE layer from the reference's parts, one token and one expert at a time, summed in the router's order."""
    out = np.zeros((len(x), layer[1].rows), dtype=np.float32)
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            if 0 <= e < len(up):
                gate, value = np.split(reference.matmul(x[t : t + 1], up[e], layer[0]), 2, axis=1)
                y = reference.matmul(reference.swiglu(gate, value), down[e], layer[1])
                out[t] = out[t] + weights[t, k] * y[0]
    return out


LAYERS = [
    (PackedSpec(64, 96, "q4", 32), PackedSpec(40, 32, "q4", 32)),
    (PackedSpec(96, 64, "q8", 64), PackedSpec(64, 48, "q4", 24)),
    (PackedSpec(128, 96, "q3", 32), PackedSpec(33, 64, "q3", 64)),
    (PackedSpec(128, 32, "q2", 16), PackedSpec(32, 64, "q8", 32)),
    (PackedSpec(66, 33, "bf16"), PackedSpec(33, 33, "f16")),
    (PackedSpec(94, 64, "q4", 64), PackedSpec(64, 47, "bf16")),  # no group divides 47
    (PackedSpec(32, 64, "f32"), PackedSpec(64, 16, "q8", 16)),
]


def check_layer(layer: tuple[PackedSpec, PackedSpec], tokens: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts = 5
    up, down = ([random_matrix(spec, rng) for _ in range(num_experts)] for spec in layer)
    x, weights = normal(rng, tokens, layer[0].columns), rng.random((tokens, k), dtype=np.float32)
    ids = rng.integers(0, num_experts + 1, (tokens, k))  # the last one means: no expert
    grouping = ops.group_by_expert(ids, num_experts)
    up_at, down_at = addresses_of(up)[grouping.active], addresses_of(down)[grouping.active]
    kernels = MatrixKernel.of(layer[0], "int8"), MatrixKernel.of(layer[1], "int8")
    expected = moe_plainly(x, weights, ids, layer, up, down)
    for threads in (1, 2):
        set_num_threads(threads)
        out = ops.moe_layer(x, weights, grouping, LayerKernel(*kernels), up_at, down_at)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[0].encoding}-{layer[1].encoding}")
@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 9), k=st.integers(1, 3), seed=seeds)
def test_a_moe_layer_equals_the_composition_of_the_reference(
    layer: tuple[PackedSpec, PackedSpec], tokens: int, k: int, seed: int
) -> None:
    check_layer(layer, tokens, k, seed)


def test_a_large_moe_layer_equals_the_composition_of_the_reference() -> None:
    layer = PackedSpec(896, 256, "q4", 64), PackedSpec(256, 448, "q4", 64)  # the demonstration model's
    assert 5 * layer[1].num_bytes > SERIAL_BYTES
    check_layer(layer, tokens=200, k=2, seed=0)


def test_the_weighted_sum_is_taken_in_the_routers_order() -> None:
    y = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)  # float32 loses the 1.0 unless it is added last
    positions = np.array([[0, 1, 2], [0, 2, 1], [1, -1, -1], [-1, -1, -1]], dtype=np.int64)
    none = np.empty(0, dtype=np.int64)
    for width in (1, 17, SLICE, 2 * SLICE + 5, SERIAL_BYTES):
        wide = np.repeat(y, width, axis=1)
        out = ops.combine(wide, Grouping(none, none, none, positions), np.ones((4, 3), np.float32))
        np.testing.assert_array_equal(out, np.repeat([[0.0], [1.0], [1.0], [0.0]], width, axis=1))


# -------------------------------------------------------------------------------------- dequantize


@settings(max_examples=80, deadline=None)
@given(specs(ENCODINGS, METAS), seeds)
def test_torch_dequantizes_as_the_reference_does(spec: PackedSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = random_matrix(spec, rng)
    expected = torch.from_numpy(reference.dequantize(packed, spec))
    weights = dequantize(torch.from_numpy(packed), spec, torch.float32)
    assert torch.equal(weights, expected)
    rows = torch.from_numpy(rng.integers(0, spec.rows, 7))
    assert torch.equal(dequantize_rows(torch.from_numpy(packed), spec, rows, torch.float32), expected[rows])
    assert torch.equal(dequantize(torch.from_numpy(packed), spec, torch.bfloat16), expected.bfloat16())
    assert_same_bits(lookup(packed, spec, rows.numpy()), expected[rows].numpy())


def test_every_code_of_fp4_is_read_exactly_under_every_scale() -> None:
    """A row for each scale byte under which 6 is finite, with all sixteen codes twice."""
    spec = PackedSpec(253, 32, "fp4", 32, "e8m0")
    codes = np.tile(np.arange(16, dtype=np.uint8), (253, 2))
    exponents = np.arange(253, dtype=np.uint8)[:, None]
    codes[0] &= 8  # scale byte 0 stands for zeros
    packed = pack_fp4(codes, exponents, spec)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = (values[codes & 7] * np.exp2(exponents - 127.0) * np.where(codes & 8, -1, 1)).astype(np.float32)
    assert_same_bits(reference.dequantize(packed, spec), expected)
    assert torch.equal(dequantize(torch.from_numpy(packed), spec, torch.float32), torch.from_numpy(expected))
    assert_same_bits(lookup(packed, spec, np.arange(253)), expected)
    one_of_each = np.eye(32, dtype=np.float32)
    y = ops.linear(one_of_each, packed, MatrixKernel.of(spec, "float"))
    np.testing.assert_array_equal(y.T, expected)  # 0 + -0 is 0: not bit for bit
    with np.errstate(all="ignore"):
        wanted = reference.matmul(one_of_each, packed, spec)
    assert_same_bits(ops.linear(one_of_each, packed, MatrixKernel.of(spec, "int8")), wanted)


def test_every_16_bit_number_is_read_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bf16 = bits[(bits & 0x7F80) != 0x7F80]  # finite
    f16 = bits.view(np.float16)[np.isfinite(bits.view(np.float16))]
    for encoding, values, expected in (
        ("bf16", bf16, (bf16.astype(np.uint32) << 16).view(np.float32)),
        ("f16", f16, f16.astype(np.float32)),
    ):
        spec = PackedSpec(len(values), 1, encoding)
        packed = pack_plain(values[:, None], spec)
        y = ops.linear(np.ones((1, 1), np.float32), packed, MatrixKernel.of(spec, "float"))
        np.testing.assert_array_equal(y[0], expected)  # 0 + -0 is 0: not bit for bit


# ------------------------------------------------------------------------- instruction sets, memory


def supports(instruction_set: str) -> bool:
    features = llvm.get_host_cpu_features()
    needed = {"avx512vnni": "avx512vnni", "avx512": "avx512bw", "avxvnni": "avxvnni", "avx2": "avx2"}
    return instruction_set == "portable" or bool(features.get(needed[instruction_set]))


EVERY_SET = [spec for spec in SPECS if spec.encoding != "f32"]


@pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if supports(name)])
@pytest.mark.parametrize("spec", EVERY_SET, ids=name_of)
def test_every_instruction_set_equals_the_reference(spec: PackedSpec, name: str) -> None:
    variant = Variant(spec.encoding, spec.group, spec.meta, spec.is_quantized, name)
    kernel = MatrixKernel.with_items(spec, variant.integer, ops.compile_items(variant).address)
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 15, spec.columns)
    x[3] *= 1e30
    assert_same_bits(ops.linear(x, packed, kernel), reference.matmul(x, packed, spec))


def test_a_kernel_that_differs_from_its_definition_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked: list[Variant] = []

    def only_portable_equals(variant: Variant, address: int) -> bool:
        checked.append(variant)
        return variant.instruction_set == "portable"

    variant = Variant("q4", 48, "f16", True, INSTRUCTION_SET)
    monkeypatch.setattr(ops, "_equals_reference", only_portable_equals)
    portable = replace(variant, instruction_set="portable")
    ops.checked_items.cache_clear()
    assert ops.checked_items(variant) == ops.checked_items(portable)
    if INSTRUCTION_SET != "portable":
        assert checked == [variant, portable]
        assert f"The {INSTRUCTION_SET} kernel for q4 differs from its definition" in caplog.text
    monkeypatch.setattr(ops, "_equals_reference", lambda variant, address: False)
    ops.checked_items.cache_clear()
    with pytest.raises(RuntimeError, match=r"the portable kernel for .* computes wrong results"):
        ops.checked_items(variant)
    ops.checked_items.cache_clear()


def test_the_self_check_notices_a_wrong_kernel() -> None:
    variant = Variant("q4", 64, "f16", True, INSTRUCTION_SET)
    right, wrong = (ops.compile_items(v).address for v in (variant, replace(variant, meta="u8")))
    assert ops._equals_reference(variant, right)
    assert not ops._equals_reference(variant, wrong)


def test_the_instruction_set_can_be_chosen_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_KERNEL", "portable")
    assert detect_instruction_set() == "portable"
    monkeypatch.setenv("MORAY_KERNEL", "sse9")
    with pytest.raises(ValueError, match=r"MORAY_KERNEL=sse9 .* avx512vnni, avx512, avxvnni, avx2, portable"):
        detect_instruction_set()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512vnni": True, "avx512bw": True, "avx2": True, "f16c": True}, "avx512vnni"),
        ({"avx512vnni": False, "avx512bw": True, "avx2": True, "f16c": True}, "avx512"),
        ({"avxvnni": True, "avx2": True, "f16c": True}, "avxvnni"),
        ({"avx2": True, "f16c": True}, "avx2"),
        ({"avx2": True}, "portable"),
        ({}, "portable"),
    ],
)
def test_the_best_instruction_set_is_found(features: dict[str, bool], expected: str) -> None:
    assert best_instruction_set(features) == expected


def test_torch_and_the_kernels_get_the_same_threads() -> None:
    for count in (1, 2):
        set_num_threads(count)
        assert (torch.get_num_threads(), current_pool().num_threads) == (count, count)
    set_num_threads(10_000)  # more than there are cores
    assert current_pool().num_threads == torch.get_num_threads() == os.cpu_count()


def test_counters_are_compared_where_they_lie() -> None:
    counters = np.array([2, 4, 6], dtype=np.int64)
    at, expected = counters.ctypes.data + 8 * np.array([0, 2], dtype=np.int64), np.array([2, 6], dtype=np.int64)
    assert all_equal(at, expected)
    counters[1] = 5
    assert all_equal(at, expected)
    counters[2] = 8
    assert not all_equal(at, expected)
