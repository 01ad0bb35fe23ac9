"""Fused parts of a decode step as functions on addresses: attention of one token, routing, a whole MoE block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moray.runtime.kernels import attention, attention_batch, attention_prompt, routed, router
from moray.runtime.kernels.ops import FUNCTIONS, PANEL_SLACK, SCRATCH, Ints, LayerKernel, MatrixKernel
from moray.runtime.kernels.pool import current_pool

NO_NORMS: Ints = np.zeros(attention.NUM_NORMS, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """How the kernels see the attention of one layer."""

    fields: Ints  # [NUM_FIELDS], see attention.py
    queries: MatrixKernel  # of H * D rows
    part: MatrixKernel  # of V * D rows: keys, values, and each of G parts of the queries
    parts: Ints  # [G + 2] addresses: the queries' parts, keys, values
    output: MatrixKernel
    output_at: int


def attention_at(
    kernel: AttentionKernel,
    x: int,
    rotary: tuple[int, int, int],
    cache: tuple[int, int, int],
    length: int,
    out: tuple[int, int, int],
    norms: Ints = NO_NORMS,
) -> None:
    """Attention of one token, which becomes the last of ``length`` in the cache; by addresses, as attention.py says.

    rotary: cosines, sines, how many; cache: keys, values, bytes from head to head; out: attended, y and z, written.
    """
    pool = current_pool()
    with pool.lock:
        part, output = kernel.part.fields, kernel.output.fields
        needed = int(attention.step_bytes(kernel.fields, part, output, len(kernel.parts), length))
        attention.attention_step(
            pool.address, FUNCTIONS, kernel.fields, part, kernel.parts, output, kernel.output_at, norms, x, *rotary,
            *cache, length, *out, SCRATCH.address(needed + PANEL_SLACK),
        )  # fmt: skip


def prompt_attention_at(
    kernel: AttentionKernel,
    x: int,
    rotary: tuple[int, int, int],
    cache: tuple[int, int, int],
    length: int,
    out: tuple[int, int, int],
    norms: Ints,
    num_tokens: int,
) -> None:
    """Attention of tokens which become the last of ``length`` in the cache; by addresses, as attention_prompt.py says.

    rotary, cache and out: as in ``attention_at``.
    """
    pool = current_pool()
    with pool.lock:
        query, output = kernel.queries.fields, kernel.output.fields
        needed = int(attention_prompt.prompt_bytes(kernel.fields, query, output, num_tokens))
        attention_prompt.attention_prompt(
            pool.address, FUNCTIONS, kernel.fields, query, kernel.part.fields, kernel.parts, output, kernel.output_at,
            norms, x, num_tokens, *rotary, *cache, length, *out, SCRATCH.address(needed + PANEL_SLACK),
        )  # fmt: skip


def batch_attention_at(
    kernel: AttentionKernel,
    x: int,
    rotary: tuple[int, int, int],
    rows: Ints,
    out: tuple[int, int, int],
    norms: Ints = NO_NORMS,
) -> None:
    """Attention of one token of each of several caches; by addresses, as attention_batch.py says.

    rows: int64 [T, NUM_ROW_FIELDS]; rotary and out: as in ``attention_at``, a row for each token.
    """
    pool = current_pool()
    with pool.lock:
        query, output = kernel.queries.fields, kernel.output.fields
        needed = int(attention_batch.batch_bytes(kernel.fields, query, output, rows))
        attention_batch.attention_batch(
            pool.address, FUNCTIONS, kernel.fields, query, kernel.part.fields, kernel.parts, output, kernel.output_at,
            norms, x, *rotary, rows, *out, SCRATCH.address(needed + PANEL_SLACK),
        )  # fmt: skip


def route_at(
    kernel: MatrixKernel,
    packed: int,
    bias: int,
    kind: int,
    x: int,
    num_tokens: int,
    top_k: int,
    out: tuple[int, int, int],
) -> None:
    """Route float32 [T, C]; ``out``: addresses of logits [T, E], ids [T, K] and weights [T, K], written (router.py)."""
    pool = current_pool()
    if num_tokens:
        with pool.lock:
            scratch = SCRATCH.address(kernel.panel_row_bytes * num_tokens + PANEL_SLACK)
            shape = (kernel.spec.rows, top_k)
            router.route(
                pool.address, FUNCTIONS, kernel.fields, packed, bias, kind, x, num_tokens, shape, *out, scratch
            )


@dataclass(frozen=True, slots=True)
class RoutedKernel:
    """How the kernels see a MoE block: its router and its experts."""

    fields: Ints  # [NUM_FIELDS], see routed.py
    router: MatrixKernel
    layer: LayerKernel


def routed_at(
    kernel: RoutedKernel,
    leases: tuple[Ints, Ints, Ints],
    counts: tuple[Ints, Ints, Ints],
    x: int,
    num_tokens: int,
    out: int,
    times: Ints,
    used: Ints,
) -> bool:
    """out = experts(x, router(x)) for x float32 [T, H], both by address; False if a lease has moved.

    leases: addresses, counters and generations of the layer's leases (experts/source.py).
    counts: the owner of each expert, and what is added to: tokens of each expert, bytes of each owner. times [3]: ns
    of grouping, leases and computing, added to. used [1 + 2 E]: the experts and tokens of this call (routed.py).
    """
    pool, layer = current_pool(), kernel.layer
    num_pairs = num_tokens * int(kernel.fields[routed.TOP_K])
    needed = max(layer.scratch_bytes(num_pairs), kernel.router.panel_row_bytes * num_tokens + PANEL_SLACK)
    with pool.lock:
        return bool(
            routed.routed_layer(
                pool.address, FUNCTIONS, kernel.fields, kernel.router.fields, layer.gate_up.fields, layer.down.fields,
                layer.gate.fields, *leases, *counts, x, num_tokens, out,
                SCRATCH.address(needed), times, used,
            )
        )  # fmt: skip
