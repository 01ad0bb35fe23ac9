"""Fused parts of a decode step as functions on addresses: attention of one token, routing, MoE blocks, layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moray.runtime.arrays import Ints
from moray.runtime.kernels import attention, attention_batch, attention_prompt, layers, routed, router
from moray.runtime.kernels.ops import FUNCTIONS, PANEL_SLACK, SCRATCH, LayerKernel, MatrixKernel
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

    def step_bytes(self, length: int) -> int:
        """Scratch of ``attention_at``."""
        part, output = self.part.fields, self.output.fields
        return int(attention.step_bytes(self.fields, part, output, len(self.parts), length)) + PANEL_SLACK

    def batch_bytes(self, rows: Ints) -> int:
        """Scratch of ``batch_attention_at``."""
        query, output = self.queries.fields, self.output.fields
        return int(attention_batch.batch_bytes(self.fields, query, output, rows)) + PANEL_SLACK


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
        attention.attention_step(
            pool.address, FUNCTIONS, kernel.fields, part, kernel.parts, output, kernel.output_at, norms, x, *rotary,
            *cache, length, *out, SCRATCH.address(kernel.step_bytes(length)),
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
        attention_batch.attention_batch(
            pool.address, FUNCTIONS, kernel.fields, query, kernel.part.fields, kernel.parts, output, kernel.output_at,
            norms, x, *rotary, rows, *out, SCRATCH.address(kernel.batch_bytes(rows)),
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

    @property
    def top_k(self) -> int:
        return int(self.fields[routed.TOP_K])

    def scratch_bytes(self, num_tokens: int) -> int:
        routing = self.router.panel_row_bytes * num_tokens + PANEL_SLACK
        return max(self.layer.scratch_bytes(num_tokens * self.top_k), routing)


def routed_at(
    kernel: RoutedKernel,
    leases: Ints,
    counts: tuple[Ints, Ints, Ints],
    x: int,
    num_tokens: int,
    chosen: tuple[int, int],
    out: int,
    times: Ints,
    used: Ints,
) -> bool:
    """out = experts(x, router(x)) for x float32 [T, H], both by address; False if some expert is not there.

    leases: [.., E], the layer's (experts/source.py). chosen: addresses of int64 and float32 [T, K], ids and weights,
    written in any case.
    counts: the owner of each expert, and what is added to: tokens of each expert, bytes of each owner. times [3]: ns
    of grouping, leases and computing, added to. used [1 + 2 E]: the experts and tokens of this call (routed.py).
    """
    pool, layer = current_pool(), kernel.layer
    with pool.lock:
        return bool(
            routed.routed_layer(
                pool.address, FUNCTIONS, kernel.fields, kernel.router.fields, layer.gate_up.fields, layer.down.fields,
                layer.gate.fields, leases, *counts, x, num_tokens, chosen, out,
                SCRATCH.address(kernel.scratch_bytes(num_tokens)), times, used,
            )
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayersKernel:
    """How the kernels see consecutive layers. Addresses of leases, counts and caches are put into ``rows`` later."""

    rows: Ints  # [L, NUM_WORDS], see layers.py
    layers: Sequence[tuple[AttentionKernel, Ints, RoutedKernel]]  # attention, norms around it, block
    shapes: Sequence[AttentionKernel]  # one of each
    blocks: Sequence[RoutedKernel]  # one of each
    attended_floats: int  # a token

    @classmethod
    def of(cls, parts: Sequence[tuple[AttentionKernel, Ints, RoutedKernel]]) -> LayersKernel:
        rows = np.zeros((len(parts), layers.NUM_WORDS), dtype=np.int64)
        shapes: dict[tuple[int, ...], AttentionKernel] = {}
        blocks: dict[tuple[int, ...], RoutedKernel] = {}
        for row, (kernel, norms, block) in zip(rows, parts, strict=True):
            products = (kernel.queries.fields, kernel.part.fields, kernel.output.fields)
            experts = (block.layer.gate_up.fields, block.layer.down.fields, block.layer.gate.fields)
            row[: layers.WORDS] = np.concatenate(
                (kernel.fields, *products, norms, block.fields, block.router.fields, *experts)
            )
            row[layers.PARTS_AT], row[layers.NUM_PARTS] = kernel.parts.ctypes.data, len(kernel.parts)
            row[layers.OUTPUT_AT] = kernel.output_at
            sizes = kernel.fields[[attention.HEADS, attention.KV_HEADS, attention.DIM]]
            shapes[(*sizes.tolist(), *np.concatenate(products).tolist())] = kernel
            matrices = (block.router.fields, *experts[:2])
            blocks[(block.top_k, *np.concatenate(matrices).tolist())] = block
        attended = max(kernel.output.spec.columns for kernel in shapes.values())
        return cls(rows, parts, list(shapes.values()), list(blocks.values()), attended)


def layers_at(
    kernel: LayersKernel,
    first: int,
    rotary: tuple[int, int, int],
    length: int,
    work: tuple[Ints, int, int, int, tuple[int, int]],
    counts: tuple[Ints, Ints, Ints],
) -> int:
    """A token through layers ``first``, ...: the first whose block misses an expert, or how many layers there are.

    work: addresses of two states, of the heads' results, z, what a block gives, and a block's ids and weights
    (layers.py); counts: bytes of each owner and ns as in ``routed_at``, added to, and what each layer used, written.
    rotary and length: as in ``attention_at``.
    """
    needed = max(shape.step_bytes(length) for shape in kernel.shapes)
    return _compute_layers(layers.layers_step, kernel, needed, 1, (first, *rotary, length, *work, *counts))


def batch_layers_at(
    kernel: LayersKernel,
    first: int,
    rotary: tuple[int, int, int],
    caches: Ints,
    work: tuple[Ints, int, int, int, tuple[int, int]],
    counts: tuple[Ints, Ints, Ints],
) -> int:
    """``layers_at`` for T new tokens. caches: each layer's rows [L, T, NUM_ROW_FIELDS], as in attention_batch.py."""
    needed, num_tokens = max(shape.batch_bytes(caches[0]) for shape in kernel.shapes), caches.shape[1]
    return _compute_layers(layers.layers_batch, kernel, needed, num_tokens, (first, *rotary, caches, *work, *counts))


def _compute_layers(
    compute: Callable[..., int], kernel: LayersKernel, attention_bytes: int, num_tokens: int, given: Sequence[Any]
) -> int:
    pool = current_pool()
    with pool.lock:
        needed = max(attention_bytes, *(block.scratch_bytes(num_tokens) for block in kernel.blocks))
        *given, bytes_by_owner, times, uses = given
        return int(
            compute(pool.address, FUNCTIONS, kernel.rows, *given, SCRATCH.address(needed), bytes_by_owner, times, uses)
        )
