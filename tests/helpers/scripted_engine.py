"""The server's application over an engine that says what it is told to, of any number of experts."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn

from moray.actors.messages import EngineView
from moray.cluster.residency import Place
from moray.deploy.serving.api import make_api
from moray.deploy.serving.args import make_args
from moray.deploy.serving.keys import KeyFile
from moray.deploy.serving.service import Service
from moray.runtime.errors import ClusterError
from moray.runtime.generation.request import Finished, Timings, TokenEvent, Usage
from moray.runtime.generation.stats import GenerationStats

PLACES = (
    Place("disk", "", ""),
    Place("arena", "host-0", "desk"),
    Place("arena", "host-1", "desk"),
    Place("remote", "remote-1", "attic"),
    Place("remote", "remote-2", "cellar"),
)


@dataclass
class Access:
    fingerprint: str = "scripted"
    context_length: int = 4096


@dataclass
class ScriptedEngine:
    """Stands for an ``EngineClient``."""

    layers: list[int] = field(default_factory=lambda: [8, 8])
    answer: list[str] = field(default_factory=list)
    is_chat: bool = True
    pause_s: float = 0.0
    is_lost: bool = False
    num_views: int = 0
    num_tokens: int = 0
    cancelled: int = 0
    access: Access = field(default_factory=Access)

    async def view(self) -> EngineView:
        if self.is_lost:
            raise ClusterError("the compute actor is gone")
        self.num_views += 1
        rng, now = np.random.default_rng(self.num_views), asyncio.get_running_loop().time()
        tiers = [
            np.random.default_rng(layer).choice(5, n, p=[0.3, 0.25, 0.2, 0.15, 0.1])
            for layer, n in enumerate(self.layers)
        ]
        return EngineView(
            time_s=now,
            num_restarts=0,
            has_chat_template=self.is_chat,
            places=PLACES,
            tiers=tuple(held.astype(np.uint8).tobytes() for held in tiers),
            recent=tuple((255 * rng.beta(0.4, 1.5, n)).astype(np.uint8).tobytes() for n in self.layers),
            uses=1000 * self.num_views,
            misses=37 * self.num_views,
            lanes=(
                ("host-cpu", 900_000_000 * self.num_views),
                ("disk-load", 90_000_000 * self.num_views),
                ("remote-compute", 200_000_000 * self.num_views),
            ),
            generation=GenerationStats("fused", 2, 1, 0, 500, 120, 40, self.num_tokens, 3, 0, 0, 3 << 20, 64 << 20),
        )

    async def prepare(self, *asked: Any) -> tuple[int, ...]:
        return (1, 2, 3)

    async def stream(self, generation: Any, timeout_s: float) -> AsyncGenerator[TokenEvent]:
        finished = False
        try:
            for number, text in enumerate(self.answer):
                await asyncio.sleep(self.pause_s)
                self.num_tokens += 1
                last = number == len(self.answer) - 1
                end = Finished("stop", Usage(3, 1, len(self.answer)), Timings(0.1, 0.1)) if last else None
                finished = last
                yield TokenEvent("scripted", (number,), text, end)
        finally:
            self.cancelled += not finished


def make_service(engine: ScriptedEngine) -> Service:
    return Service(make_args({"model_name": "tiny-mixtral"}), engine)  # type: ignore[arg-type]


@contextmanager
def listening(engine: ScriptedEngine, keys: KeyFile | None = None) -> Iterator[str]:
    """The URL of a server over HTTP, in a thread."""
    api = make_api(make_service(engine), keys)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(api, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
