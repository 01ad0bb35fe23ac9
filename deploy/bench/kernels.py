"""``moray bench kernels``: the kernels against what this machine's memory gives, and against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moray.deploy.bench.machine import describe_machine
from moray.deploy.bench.options import BATCH_1_TARGETS, PREFILL_TARGET, Coding, KernelsOptions, Layer
from moray.deploy.bench.pairs import Spread, ratios, time_in_turns
from moray.deploy.bench.working_set import WorkingSet, describe_pages, make_finite, working_set
from moray.runtime.errors import ConfigError, ResourceError
from moray.runtime.kernels import ops, readers
from moray.runtime.kernels.dequantize import dequantize
from moray.runtime.kernels.ops import LayerKernel, MatrixKernel
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.layout.packed import Numerics, PackedSpec
from moray.runtime.memory import available_memory, format_bytes


@dataclass(frozen=True)
class Streamed:
    """Products of one token with a working set, against the readers. Rates are bytes a second."""

    coding: Coding
    layer: Layer | None  # None: single matrices
    num_bytes: int  # of the working set
    call_bytes: int  # read by one call
    rate: Spread
    reader_rates: dict[str, Spread]
    ratio: Spread  # to the faster reader of each pair

    @property
    def target(self) -> float | None:
        return None if self.layer else BATCH_1_TARGETS.get(self.coding.encoding)

    @property
    def call_s(self) -> float:
        return self.call_bytes / self.rate.median

    @property
    def reader_s(self) -> float:
        """Seconds of the faster reader for the same bytes."""
        return self.call_bytes / self.reader_rate.median

    @property
    def reader_rate(self) -> Spread:
        """Of the faster reader."""
        return max(self.reader_rates.values(), key=lambda rate: rate.median)


@dataclass(frozen=True)
class Prefill:
    """Products of several tokens with one matrix, against torch. Rates are products and sums a second."""

    coding: Coding
    tokens: int
    rate: Spread
    dequantized_rate: Spread  # dequantizing included
    gemm_rate: Spread
    ratio: Spread  # to dequantizing and torch's product, pair by pair
    gemm_ratio: Spread  # to torch's product alone

    @property
    def target(self) -> float | None:
        return PREFILL_TARGET if self.coding.group else None


@dataclass(frozen=True)
class KernelsReport:
    """One run."""

    options: KernelsOptions
    machine: dict[str, Any]
    pages: str
    skipped: tuple[Coding, ...]
    batch_1: list[Streamed]
    prefill: list[Prefill]
    layers: list[Streamed]

    @property
    def reader_variation(self) -> float:
        """How far apart the rates of a reader on the same memory were: 1 on a machine that does nothing else."""
        return max(result.reader_rate.variation for result in (*self.batch_1, *self.layers))


def measure_kernels(options: KernelsOptions, console: Console, *, skip_unsupported: bool) -> KernelsReport:
    """Measure everything that was asked for; progress goes to ``console``.

    Raises ConfigError if the kernels cannot compute with an encoding (``skip_unsupported``: leave it out and say
    so), ResourceError if memory is too small.
    """
    _require_room(options)
    machine = describe_machine()
    set_num_threads(options.threads)
    usable = tuple(coding for coding in options.codings if is_supported(coding, options.numerics))
    skipped = tuple(coding for coding in options.codings if coding not in usable)
    if skipped and not skip_unsupported:
        raise ConfigError(f"the kernels of this version do not compute with {', '.join(map(str, skipped))}")
    report = KernelsReport(replace(options, codings=usable), machine, "", skipped, [], [], [])
    pages = ""
    with console.status("measuring") as status:
        for coding in usable:
            spec = coding.spec(options.rows, options.columns)
            status.update(f"{coding}: single matrices")
            with working_set([spec], options.num_matrices(coding)) as matrices:
                pages = describe_pages(int(matrices.addresses[0, 0]))
                report.batch_1.append(_batch_1(coding, spec, matrices, options))
                for tokens in options.tokens:
                    status.update(f"{coding}: {tokens} tokens")
                    report.prefill.append(_prefill(coding, spec, matrices, tokens, options))
            for layer in options.layers:
                status.update(f"{coding}: layers of {layer.name}")
                report.layers.append(_layer(coding, layer, options))
    return replace(report, pages=pages)


def is_supported(coding: Coding, numerics: Numerics) -> bool:
    """Whether the kernels give about the right product: a small one, against the dequantized matrix."""
    columns = 4 * max(coding.group, 64)
    spec = coding.spec(32, columns)
    random = np.random.default_rng(2)
    # Twice the bytes, so that a kernel that knows another layout stays within them.
    packed = np.frombuffer(bytearray(random.bytes(2 * spec.num_bytes)), dtype=np.uint8)
    make_finite(packed[: spec.num_bytes], spec)
    x = random.standard_normal((3, columns)).astype(np.float32)
    try:
        y = ops.linear(x, packed, MatrixKernel.of(spec, numerics))
    except (ValueError, NotImplementedError, AssertionError):
        return False
    expected = x @ dequantize(torch.from_numpy(packed[: spec.num_bytes]), spec, torch.float32).numpy().T
    return bool(np.linalg.norm(y - expected) < 0.05 * np.linalg.norm(expected))


def _require_room(options: KernelsOptions) -> None:
    needed, free = options.needed_bytes, available_memory()
    if needed > free:
        raise ResourceError(
            f"these measurements need {format_bytes(needed)} of memory, {format_bytes(free)} are free; give a smaller "
            "--working-set or --shape, or fewer --encodings"
        )


def _batch_1(coding: Coding, spec: PackedSpec, matrices: WorkingSet, options: KernelsOptions) -> Streamed:
    kernel = MatrixKernel.of(spec, options.numerics)
    x = np.random.default_rng(3).standard_normal((1, spec.columns)).astype(np.float32)

    def run() -> None:
        for (matrix,) in matrices.items:
            ops.linear(x, matrix, kernel)

    return _stream(coding, None, matrices, spec.num_bytes, run, options)


def _layer(coding: Coding, layer: Layer, options: KernelsOptions) -> Streamed:
    specs = layer.specs(coding)
    gate_up, down = (MatrixKernel.of(spec, options.numerics) for spec in specs)
    kernel = LayerKernel(gate_up, down)
    copies = layer.num_copies(coding, options.working_set_bytes)
    x = np.random.default_rng(4).standard_normal((1, layer.hidden)).astype(np.float32)
    weights = np.full((1, layer.top_k), 1 / layer.top_k, dtype=np.float32)
    choices = np.random.default_rng(5).permutation(layer.num_experts).reshape(-1, 1, layer.top_k)
    with working_set(specs, copies * layer.num_experts) as experts:
        table = experts.addresses.reshape(copies, layer.num_experts, 2)

        def run() -> None:
            for addresses in table:
                for ids in choices:
                    grouping = ops.group_by_expert(ids, layer.num_experts)
                    gate_up_at, down_at = np.ascontiguousarray(addresses[grouping.active].T)
                    ops.moe_layer(x, weights, grouping, kernel, gate_up_at, down_at)

        call_bytes = layer.top_k * layer.expert_bytes(coding)
        return _stream(coding, layer, experts, call_bytes, run, options)


def _stream(
    coding: Coding,
    layer: Layer | None,
    data: WorkingSet,
    call_bytes: int,
    run: Callable[[], None],
    options: KernelsOptions,
) -> Streamed:
    """``run`` reads the whole working set once, and so does each reader."""

    def reading(reader: str) -> Callable[[], object]:
        return lambda: readers.read(data.buffer, options.threads, reader)

    seconds = time_in_turns({"": run} | {name: reading(name) for name in readers.READERS}, options.pairs)
    size, own = data.num_bytes, seconds.pop("")
    return Streamed(
        coding=coding,
        layer=layer,
        num_bytes=size,
        call_bytes=call_bytes,
        rate=Spread.of([size / s for s in own]),
        reader_rates={name: Spread.of([size / s for s in taken]) for name, taken in seconds.items()},
        ratio=Spread.of(ratios(size, own, [(size, taken) for taken in seconds.values()])),
    )


def _prefill(coding: Coding, spec: PackedSpec, matrices: WorkingSet, tokens: int, options: KernelsOptions) -> Prefill:
    kernel = MatrixKernel.of(spec, options.numerics)
    turn = cycle(range(len(matrices.items)))
    x = np.random.default_rng(6).standard_normal((tokens, spec.columns)).astype(np.float32)
    x_bf16 = torch.from_numpy(x).to(torch.bfloat16)
    weight = dequantize(torch.from_numpy(matrices.items[0][0]), spec, torch.bfloat16)

    def multiply_dequantized() -> None:
        packed = torch.from_numpy(matrices.items[next(turn)][0])
        torch.nn.functional.linear(x_bf16, dequantize(packed, spec, torch.bfloat16))

    with torch.inference_mode():
        seconds = time_in_turns(
            {
                "kernel": lambda: ops.linear(x, matrices.items[next(turn)][0], kernel),
                "dequantized": multiply_dequantized,
                "gemm": lambda: torch.nn.functional.linear(x_bf16, weight),
            },
            options.pairs,
        )
    work = 2 * tokens * spec.rows * spec.columns
    own, dequantized, gemm = seconds.values()
    return Prefill(
        coding=coding,
        tokens=tokens,
        rate=Spread.of([work / s for s in own]),
        dequantized_rate=Spread.of([work / s for s in dequantized]),
        gemm_rate=Spread.of([work / s for s in gemm]),
        ratio=Spread.of(ratios(work, own, [(work, dequantized)])),
        gemm_ratio=Spread.of(ratios(work, own, [(work, gemm)])),
    )
