"""An empty Serve application for serve_overhead.py: it sends chunks that say when they were made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

CHUNK_PATH = "/floor"
_PADDING = "x" * 180  # about what a chunk of a completion takes


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Floor:
    """Answers with ``count`` events, one a ``pace_s``."""

    async def __call__(self, request: Request) -> StreamingResponse:
        count, pace_s = int(request.query_params["count"]), float(request.query_params["pace_s"])
        return StreamingResponse(_events(count, pace_s), media_type="text/event-stream")


async def _events(count: int, pace_s: float) -> AsyncIterator[str]:
    due = perf_counter()
    for _ in range(count):
        due += pace_s
        await asyncio.sleep(max(0.0, due - perf_counter()))
        yield f"data: {perf_counter()!r} {_PADDING}\n\n"


def make_floor() -> Any:
    return Floor.bind()  # type: ignore[attr-defined]  # the decorator makes a deployment of it
