"""A whole MoE block in one call: routing, grouping, looking the leases up, the layer, and checking the leases."""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from moray.runtime.kernels.atomics import address_of, monotonic_ns
from moray.runtime.kernels.memory import ADDRESS, COUNTER, ENTRY, GENERATION, all_equal, look_up
from moray.runtime.kernels.moe import GATE, count_use, group_by_expert, moe_layer
from moray.runtime.kernels.router import pointer, route
from moray.runtime.kernels.setup import TABLE, entry

# What a block is, int64: ops_fused.RoutedKernel. Offsets are of a shard's tensors; -1: there is no such tensor.
ROUTER_AT, ROUTER_BIAS, ROUTER_KIND, NUM_EXPERTS, TOP_K = range(5)
GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS, SHARD_BYTES = range(5, 10)
NUM_FIELDS = 10

CHOSEN = types.UniTuple(types.int64, 2)  # addresses of ids and weights


# Loops, where NumPy's expressions on arrays would take Numba seconds to compile.


@njit(nogil=True, cache=True)
def _moved(addresses, offset):
    moved = np.empty(addresses.shape[0], np.int64)
    for i in range(addresses.shape[0]):
        moved[i] = addresses[i] + offset
    return moved


@njit(nogil=True, cache=True)
def _of_active(column, active):
    values = np.empty(active.shape[0], np.int64)
    for i in range(active.shape[0]):
        values[i] = column[active[i]]
    return values


@njit(nogil=True, cache=True)
def _biases(shards, offset):
    return _moved(shards, offset) if offset >= 0 else np.empty(0, np.int64)


@entry(
    "functions fields router gate_up down owners tokens bytes_by_owner times used",
    gate=GATE, leases=TABLE, chosen=CHOSEN,
)  # fmt: skip
def routed_layer(
    pool, functions, fields, router, gate_up, down, gate, leases, owners, tokens, bytes_by_owner, x, num_tokens,
    chosen, out, scratch, times, used,
):  # fmt: skip
    """out = experts(x, router(x)), or False if an expert was not there, or moved meanwhile: then out is of no use.

    router, gate_up, down: int64 [K_FIELDS]; gate: the fields of a Gate; leases int64 [.., num experts] of the layer
    (memory.py), looked up if they can move; owners [num experts]; tokens [num experts] and bytes_by_owner are added
    to, times [3] too: ns of grouping, of leases and of computing; used [1 + 2 * num experts]: how many experts were,
    which, and from 1 + num experts on with how many tokens. chosen: addresses of int64 and float32 [T, K]: the
    experts' ids and weights, written in any case. x and out float32 [T, H], and scratch, by address.
    """
    num_experts, top_k = fields[NUM_EXPERTS], fields[TOP_K]
    logits = np.empty((num_tokens, num_experts), np.float32)
    ids = carray(pointer(chosen[0], np.int64(0)), (num_tokens, top_k))
    route(
        pool, functions, router, fields[ROUTER_AT], fields[ROUTER_BIAS], fields[ROUTER_KIND], x, num_tokens,
        (num_experts, top_k), address_of(logits), chosen[0], chosen[1], scratch,
    )  # fmt: skip
    started = monotonic_ns()
    active, starts, token_of_pair, positions = group_by_expert(ids, num_experts)
    grouped = monotonic_ns()
    if leases.shape[0] > ENTRY:
        for expert in active:
            look_up(leases, expert)
    shards, held = _of_active(leases[ADDRESS], active), _of_active(leases[COUNTER], active)
    expected = _of_active(leases[GENERATION], active)
    if not all_equal(held, expected):
        return False
    leased = monotonic_ns()
    moe_layer(
        pool, functions, gate, gate_up, _moved(shards, fields[GATE_UP]), _biases(shards, fields[GATE_UP_BIAS]), down,
        _moved(shards, fields[DOWN]), _biases(shards, fields[DOWN_BIAS]), starts, token_of_pair, positions, x,
        chosen[1], out, np.int64(0), scratch,
    )  # fmt: skip
    if not all_equal(held, expected):
        return False
    count_use(active, starts, fields[SHARD_BYTES], owners, tokens, bytes_by_owner)
    count = active.shape[0]
    used[0] = count
    for i in range(count):
        used[1 + i], used[1 + num_experts + i] = active[i], starts[i + 1] - starts[i]
    times[0] += grouped - started
    times[1] += leased - grouped
    times[2] += monotonic_ns() - leased
    return logits.shape[0] > 0  # alive until here: the call knows only its address
