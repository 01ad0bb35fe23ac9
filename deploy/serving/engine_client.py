"""The server's end of an engine: asynchronous, token by token."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError

from moray.actors.calls import CONTROL, our_errors
from moray.actors.messages import EngineStats, EngineView
from moray.actors.spawn import keep
from moray.actors.streams import Replay, cancel, resume
from moray.deploy.config import EngineConfig
from moray.deploy.serving.keeper import KEEPER, EngineAccess, EngineKeeper
from moray.runtime.errors import ActorLostError, ClusterError
from moray.runtime.generation.request import Prompt, SamplingParams, TokenEvent
from moray.runtime.generation.vocabulary import Vocabulary

_PING_S = 10.0


@dataclass(frozen=True, slots=True)
class Generation:
    """One choice to generate."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    interval_s: float  # between events, at least, if they come faster


class EngineClient:
    """One server's access to the engine, which is found or started by ``connect``."""

    def __init__(self, keeper: Any, access: EngineAccess, linger_s: float) -> None:
        self.access = access
        self._keeper, self._compute = keeper, access.compute
        self._vocabulary: Vocabulary | None = None
        self._beat = asyncio.get_running_loop().create_task(self._tell_keeper(linger_s / 4))

    @classmethod
    async def connect(cls, config: EngineConfig, linger_s: float) -> EngineClient:
        """Raises MorayError: what keeps the engine from starting."""
        keeper = keep(EngineKeeper, KEEPER, linger_s, None)
        with our_errors():
            access: EngineAccess = await keeper.ensure.remote(config, linger_s)
        return cls(keeper, access, linger_s)

    async def prepare(
        self, prompt: Prompt, max_new_tokens: int, sampling: SamplingParams, stop: tuple[str, ...]
    ) -> tuple[int, ...]:
        """Token ids of a prompt. Raises RequestError if such a request can never be served."""
        prepare = self._compute.prepare.options(concurrency_group=CONTROL)
        with our_errors():
            ids: tuple[int, ...] = await prepare.remote(prompt, max_new_tokens, sampling, stop)
        return ids

    async def stream(self, generation: Generation, timeout_s: float) -> AsyncGenerator[TokenEvent]:
        """Events as they come, also after the compute actor was lost and came back. Leaving it cancels."""
        of = generation
        replay = Replay(
            secrets.token_hex(8), of.prompt_ids, of.max_new_tokens, of.sampling, of.stop, timeout_s, of.interval_s
        )
        is_over = False
        try:
            while not is_over:
                try:
                    async for event in self._attempt(replay):
                        is_over = event.finished is not None
                        yield event
                except ActorLostError as error:
                    await asyncio.to_thread(resume, self._compute, self.access.ledger, replay, error)
        finally:
            if not is_over:
                cancel(self._compute, replay.attempt_id)

    async def _attempt(self, replay: Replay) -> AsyncGenerator[TokenEvent]:
        with our_errors():
            async for reference in self._compute.generate.options(num_returns="streaming").remote(*replay.arguments):
                yield replay.take(await reference)

    async def vocabulary(self) -> Vocabulary:
        """Asked for once. Raises RequestError if the store has no tokenizer."""
        if self._vocabulary is None:
            with our_errors():
                self._vocabulary = await self._compute.vocabulary.options(concurrency_group=CONTROL).remote()
        return self._vocabulary

    async def ping(self) -> None:
        """Raises ClusterError if the engine does not answer, and is not being brought back either."""
        try:
            with our_errors():
                await asyncio.wait_for(self._compute.ping.options(concurrency_group=CONTROL).remote(), _PING_S)
        except ActorLostError as error:
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise
        except TimeoutError as error:
            raise ClusterError(f"the engine has not answered for {_PING_S:.0f} s") from error

    async def stats(self) -> EngineStats | None:
        """What the engine has done so far; None if it is being ended. Raises MorayError."""
        with our_errors():
            stats: EngineStats | None = await self._keeper.stats.remote()
        return stats

    async def view(self) -> EngineView:
        """What there is to see. Raises ClusterError, ActorLostError if the engine does not answer."""
        try:
            with our_errors():
                asked = self._compute.view.options(concurrency_group=CONTROL).remote()
                view: EngineView = await asyncio.wait_for(asked, _PING_S)
        except TimeoutError as error:
            raise ClusterError(f"the engine has not answered for {_PING_S:.0f} s") from error
        return view

    async def _tell_keeper(self, interval_s: float) -> None:
        while True:
            self._keeper.touch.remote()
            await asyncio.sleep(interval_s)
