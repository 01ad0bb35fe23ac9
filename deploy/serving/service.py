"""From a checked request to its choices, generated side by side, within the server's limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic

from moray.actors.compute import EVENT_INTERVAL_S
from moray.actors.messages import EngineView
from moray.deploy.serving.args import ServeArgs
from moray.deploy.serving.engine_client import EngineClient, Generation
from moray.deploy.serving.errors import ApiError
from moray.deploy.serving.records import current_record
from moray.deploy.serving.requests import ChatRequest, CompletionRequest
from moray.runtime.errors import ClusterError
from moray.runtime.generation.request import Prompt, TokenEvent
from moray.runtime.generation.vocabulary import Vocabulary

_FIRST_WAIT_S = 5.0  # told to those who are turned away before any request has ended
_LONGEST_WAIT_S = 60.0
_WHOLE_INTERVAL_S = 1.0  # between events of an answer that is sent as a whole


class Service:
    """One server: its engine, and how many choices it works on."""

    def __init__(self, args: ServeArgs, engine: EngineClient) -> None:
        self.args, self.engine = args, engine
        self._num_taken = 0
        self._usual_s = _FIRST_WAIT_S  # how long requests take, a moving average

    @property
    def fingerprint(self) -> str:
        return self.engine.access.fingerprint

    def check_model(self, name: str) -> None:
        """Raises ApiError 404."""
        if name != self.args.served_name:
            message = f"the model {name!r} does not exist; this server has {self.args.served_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def health(self) -> None:
        """Raises ApiError 503."""
        try:
            await self.engine.ping()
        except ClusterError as error:
            raise ApiError(503, f"the engine is not available: {error}", code="engine_unavailable") from error

    async def view(self) -> EngineView:
        """Raises ApiError 503."""
        try:
            return await self.engine.view()
        except ClusterError as error:
            raise ApiError(503, f"the engine is not available: {error}", code="engine_unavailable") from error

    @property
    def num_taken(self) -> int:
        """Choices that are generated or wait."""
        return self._num_taken

    async def begin(self, request: ChatRequest | CompletionRequest) -> Job:
        """Check and admit a request; ``Job.close`` gives its place back. Raises ApiError, RequestError."""
        self.check_model(request.model)
        prompts = request.prompts
        count = len(prompts) * request.num_choices
        self._take(count)
        interval_s = EVENT_INTERVAL_S if request.stream else _WHOLE_INTERVAL_S
        try:
            prepared = [await self._prepare(request, prompt) for prompt in prompts]
            generations = [
                Generation(ids, limit, request.sampling(choice), request.stops, interval_s)
                for ids, limit in prepared
                for choice in range(request.num_choices)
            ]
            vocabulary = None if request.num_log_probs is None else await self.engine.vocabulary()
        except BaseException:
            self._num_taken -= count
            raise
        return Job(self, generations, request.num_choices, vocabulary)

    def give_back(self, count: int, seconds: float) -> None:
        """A request ended that had ``count`` choices."""
        self._num_taken -= count
        self._usual_s += (seconds - self._usual_s) / 8

    def _take(self, count: int) -> None:
        most = self.args.max_requests
        if count > most:
            raise ApiError(400, f"the request has {count} choices, this server generates at most {most}", param="n")
        if self._num_taken + count > most:
            wait = math.ceil(min(max(self._usual_s, 1.0), _LONGEST_WAIT_S))
            message = f"the server has as many requests as it takes ({most}); try again in {wait} s"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(wait)})
        self._num_taken += count

    async def _prepare(self, request: ChatRequest | CompletionRequest, prompt: Prompt) -> tuple[tuple[int, ...], int]:
        """Token ids, and how many may follow. Raises RequestError; ApiError if more is asked than the context holds."""
        context, wanted = self.engine.access.context_length, request.max_new_tokens
        ids = await self.engine.prepare(prompt, wanted or context, request.sampling(0), request.stops)
        if wanted is not None and len(ids) + wanted > context:
            raise ApiError(
                400,
                f"the context holds {context} tokens, and {len(ids) + wanted} are asked for: {len(ids)} of the prompt "
                f"and {wanted} to generate; shorten one of them",
                code="context_length_exceeded",
            )
        return ids, wanted or context - len(ids)


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """What happened to one of a job's choices."""

    index: int
    event: TokenEvent


class Job:
    """An admitted request. ``close`` it, whatever happens."""

    def __init__(
        self, service: Service, generations: list[Generation], num_choices: int, vocabulary: Vocabulary | None
    ) -> None:
        self.generations = generations
        self.num_choices = num_choices  # of each prompt
        self.vocabulary = vocabulary  # None: no log-probabilities are wanted
        self._service = service
        self._started_s = monotonic()
        self._is_closed = False
        self._record = current_record()
        self._record.begin([len(of.prompt_ids) for of in generations[::num_choices]], len(generations))

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._service.give_back(len(self.generations), monotonic() - self._started_s)

    async def events(self) -> AsyncGenerator[ChoiceEvent]:
        """All choices' events as they come. Leaving the iterator cancels. Raises ApiError, MorayError."""
        if len(self.generations) == 1:
            async with aclosing(self._choice(0)) as events:
                async for event in events:
                    yield event
            return
        queue: asyncio.Queue[ChoiceEvent | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(index, queue)) for index in range(len(self.generations))]
        try:
            left = len(tasks)
            while left:
                found = await queue.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, index: int, queue: asyncio.Queue[ChoiceEvent | BaseException | None]) -> None:
        """None at the end, an error instead of it."""
        try:
            async with aclosing(self._choice(index)) as events:
                async for event in events:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def _choice(self, index: int) -> AsyncGenerator[ChoiceEvent]:
        timeout_s = self._service.args.request_timeout_s
        async with aclosing(self._service.engine.stream(self.generations[index], timeout_s)) as events:
            async for event in events:
                if event.finished is not None and event.finished.reason in ("deadline", "cancelled"):
                    raise _ended_early(event.finished.reason, timeout_s)
                self._record.note(index, event)
                yield ChoiceEvent(index, event)


def _ended_early(reason: str, timeout_s: float) -> ApiError:
    if reason == "deadline":
        return ApiError(503, f"the request was ended after {timeout_s:g} s, this server's limit", code="deadline")
    return ApiError(503, "the request was cancelled by the engine", code="cancelled")
