"""Matrix products: bit for bit the reference, whatever the values, the batch and the threads."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from helpers.kernels import (
    QUANTIZED,
    SPECS,
    addresses_of,
    compiled_specs,
    every_quantized,
    every_spec,
    normal,
    seeds,
)
from helpers.matrices import assert_same_bits, random_matrix, specs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moray.runtime.arrays import Floats
from moray.runtime.kernels import ops, reference
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.kernels.programs import SERIAL_BYTES, SERIAL_PRODUCTS
from moray.runtime.layout.packed import METAS, Encoding, PackedSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


# -------------------------------------------------------------------------- matrix products, int8


@settings(max_examples=150, deadline=None)
@given(compiled_specs(metas=METAS), st.integers(1, 19), st.sampled_from([1, 2]), seeds)
def test_int8_equals_the_reference_bit_for_bit(spec: PackedSpec, batch: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed, x = random_matrix(spec, rng), normal(rng, batch, spec.columns)
    set_num_threads(threads)
    y = ops.linear(x, packed, MatrixKernel.of(spec, "int8"))
    assert_same_bits(y, reference.matmul(x, packed, spec))


_ANY_FLOAT = st.floats(width=32, min_value=-(2.0**50), max_value=2.0**50)


@settings(max_examples=500, deadline=None)
@given(_ANY_FLOAT, _ANY_FLOAT, _ANY_FLOAT)
@example(1 + 2**-23, 2**-24 * (1 - 2**-23), 1 + 2**-23)  # float64 makes a tie of it: rounded twice it is one too many
@example(-1 - 2**-23, 2**-24 * (1 - 2**-23), -1 - 2**-23)
@example(1 + 2**-23, 2**-24, 1.0)
@example(0.0, -1.0, 0.0)
def test_the_definition_of_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    one, other, addend = (np.array([value], dtype=np.float32) for value in (a, b, c))
    (found,) = reference.fma(one, other, addend)
    neighbours = [Fraction(float(np.nextafter(found, np.float32(end)))) for end in (-np.inf, np.inf)]
    distance, others = abs(Fraction(float(found)) - exact), [abs(value - exact) for value in neighbours]
    assert distance <= min(others)
    if distance in others:
        assert found.view(np.uint32) % 2 == 0


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
