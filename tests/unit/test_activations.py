"""Activations: quantized, and through gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernels import normal
from helpers.matrices import assert_same_bits
from helpers.rows import gated, quantize_rows, swiglu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moray.runtime.arrays import Floats
from moray.runtime.kernels import reference
from moray.runtime.kernels.gates import Gate
from moray.runtime.model.expert_gates import apply_gate


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
