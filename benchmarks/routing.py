"""The flag --routing of programs that make models: from traces or uniform choices to what each token chooses."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from geometry import Geometry
from replay import Choices, Replay, Trace, replay_random, replay_traces

from moray.runtime.arrays import Ints
from moray.runtime.trace.format import read_trace


def add_routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--routing",
        default="none",
        help="trace:FILE[,FILE...]: as recorded traces; random: each token uniformly; none: random routers (none)",
    )


def replay_of(routing: str, geometry: Geometry, *, seed: int = 0) -> Replay | None:
    """None for ``none``."""
    sizes = {"tokens": geometry.vocab, "layers": geometry.layers}
    sizes |= {"experts": geometry.experts, "active": geometry.active, "seed": seed}
    kind, _, files = routing.partition(":")
    if kind == "trace" and files:
        return replay_traces(read_traces([Path(file) for file in files.split(",")]), **sizes)
    if routing == "random":
        return replay_random(**sizes)
    if routing != "none":
        raise SystemExit(f"--routing {routing}: expected trace:FILE[,FILE...], random or none")
    return None


def read_traces(files: Iterable[Path]) -> list[Trace]:
    """The decoded tokens of recorded traces: calls with several tokens do not say which token chose what."""
    return [_read(file) for file in files]


def _read(file: Path) -> Trace:
    trace = read_trace(file)
    layers, top_k = len(trace.header.num_experts), trace.header.top_k
    calls = np.flatnonzero(trace.num_tokens_C == 1)
    calls = calls[: len(calls) // layers * layers]  # the last token of a torn file is left out
    is_regular = np.array_equal(trace.layers_C[calls], np.tile(np.arange(layers), len(calls) // layers))
    if top_k is None or len(set(trace.header.num_experts)) > 1 or not is_regular or not len(calls):
        raise SystemExit(f"{file}: expected decoded tokens of a model whose layers have the same experts, top K")

    def choices(starts: Ints, values: Ints, ahead: int) -> Choices:
        """[T, L, K] of the layer that they are for; -1 where a call has not exactly K."""
        out = np.full((len(calls), top_k), -1, dtype=np.int16)
        fits = starts[calls + 1] - starts[calls] == top_k
        out[fits] = values[starts[calls[fits]][:, None] + np.arange(top_k)]
        table = np.full((len(calls) // layers, layers, top_k), -1, dtype=np.int16)
        table[:, ahead:] = np.sort(out.reshape(table.shape)[:, : layers - ahead], axis=2)
        return table

    return Trace(
        file.stem,
        trace.header.num_experts[0],
        choices(trace.starts, trace.experts_U, 0),
        {ahead: choices(ragged.starts, ragged.values, ahead) for ahead, ragged in trace.predicted.items()},
    )
