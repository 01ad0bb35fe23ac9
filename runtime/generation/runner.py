"""A loaded store that generates: model, tokenizer and step loop, driven by one thread.

``ComputeActor`` wraps this one class; tests and benchmarks use it without Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from transformers import PreTrainedModel

from moray.runtime.errors import MorayError, RequestError
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.experts.source import ExpertSource
from moray.runtime.generation.request import GenerationRequest, Prompt, TokenEvent
from moray.runtime.generation.step_loop import StepLoop
from moray.runtime.generation.text import encode_prompt, end_token_ids, load_tokenizer
from moray.runtime.layout.packed import Numerics
from moray.runtime.model.loader import bind_experts
from moray.runtime.store.store import Store

Events = SimpleQueue[TokenEvent | BaseException]


class Runner:
    """Generates from a store whose experts come from ``source``. Public methods may be called from any thread.

    Closes neither the store nor the source.
    """

    def __init__(self, store: Store, source: ExpertSource, model: PreTrainedModel, numerics: Numerics = "int8") -> None:
        """``model`` is ``load_model(store, ...)``'s; its experts are bound to ``source`` here."""
        self.model = model
        self._meter = bind_experts(model, store, source, numerics)
        self.tokenizer = load_tokenizer(store.path)
        _warm_up(model)
        self._meter.reset()
        self._loop = StepLoop(self.model, self.tokenizer, end_token_ids(store.path, self.model.config))
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._outboxes: dict[str, Events] = {}
        self._thread = threading.Thread(target=self._run, name="moray-step-loop", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        return self._loop.context_length

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises RequestError."""
        return encode_prompt(self.tokenizer, prompt)

    def stream(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        """Yield the request's events; the last has ``finished``. Closing the iterator cancels the request.

        Raises RequestError before anything is computed, or whatever made a step fail.
        """
        self._loop.check(request)
        outbox: Events = SimpleQueue()

        def start() -> None:
            if request.request_id in self._outboxes:
                outbox.put(RequestError(f"request id {request.request_id} is in use"))
                return
            self._outboxes[request.request_id] = outbox
            self._loop.add(request)

        self._inbox.put(start)
        return self._events(request.request_id, outbox)

    def cancel(self, request_id: str) -> None:
        """End a request after the step in flight; its stream ends with reason "cancelled"."""
        self._inbox.put(lambda: self._loop.cancel(request_id))

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, V] over the whole sequence. Raises RequestError."""
        self._loop.check(GenerationRequest("logits", tuple(token_ids[:-1] or token_ids), 1))
        answer: Future[torch.Tensor] = Future()

        def compute() -> None:
            try:
                answer.set_result(self._loop.logits(token_ids))
            except BaseException as error:
                answer.set_exception(error)

        self._inbox.put(compute)
        return answer.result()

    def stats(self) -> ExpertsStats:
        return self._meter.snapshot()

    def close(self) -> None:
        """Stop the thread; open streams end with an error."""
        self._inbox.put(None)
        self._thread.join()

    def _events(self, request_id: str, outbox: Events) -> Iterator[TokenEvent]:
        finished = False
        try:
            while not finished:
                event = outbox.get()
                if isinstance(event, BaseException):
                    finished = True
                    raise event
                finished = event.finished is not None
                yield event
        finally:
            if not finished:
                self.cancel(request_id)

    def _run(self) -> None:
        while True:
            while self._loop.is_idle or not self._inbox.empty():
                command = self._inbox.get()  # blocks while idle: no CPU is used
                if command is None:
                    self._fail(self._loop.abort(), MorayError("the engine was closed"))
                    return
                command()
            try:
                events = self._loop.step()
            except Exception as error:
                self._fail(self._loop.abort(), error)
                continue
            for event in events:
                self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        outbox = self._outboxes.pop(event.request_id) if event.finished else self._outboxes[event.request_id]
        outbox.put(event)

    def _fail(self, request_ids: list[str], error: BaseException) -> None:
        for request_id in request_ids:
            self._outboxes.pop(request_id).put(error)


@torch.inference_mode()
def _warm_up(model: PreTrainedModel) -> None:
    """Compile or load every kernel now, not in the first request: single tokens and tiles of tokens."""
    for length in (1, 5):
        model(input_ids=torch.zeros((1, length), dtype=torch.long, device=model.device), use_cache=False)
