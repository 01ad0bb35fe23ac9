"""A whole MoE layer in one launch: grouping, experts, the weighted sum."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.kernels import addresses_of, normal, seeds
from helpers.matrices import assert_same_bits, random_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.arrays import Bytes, Floats, Ints
from moray.runtime.kernels import ops, reference
from moray.runtime.kernels.activation import SLICE
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.kernels.programs import SERIAL_BYTES
from moray.runtime.layout.packed import PackedSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


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
    places, wide = rng.permutation(tokens + 3), np.full((tokens + 3, layer[1].rows), 7.0, dtype=np.float32)
    at = x.ctypes.data, weights.ctypes.data, wide.ctypes.data
    ops.moe_layer_at(*at, grouping, LayerKernel(*kernels), up_at, down_at, rows=places[:tokens])
    assert_same_bits(wide[places[:tokens]], expected)
    assert (wide[places[tokens:]] == 7).all()


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
