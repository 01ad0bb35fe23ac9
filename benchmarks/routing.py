"""The flag --routing of programs that make models: from traces or uniform choices to what each token chooses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from geometry import Geometry
from replay import Replay, Trace, replay_random, replay_traces


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
