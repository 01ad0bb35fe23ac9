"""A loaded store that generates: model, tokenizer and step loop, driven by one thread.

``ComputeActor`` wraps this one class; tests and benchmarks use it without Ray.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from moray.runtime.arrays import Bools, Bytes
from moray.runtime.device.stats import DeviceStats
from moray.runtime.device.tier import DeviceTier, default_budget
from moray.runtime.errors import MorayError, RequestError
from moray.runtime.evaluation import Ids, TokenScores
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.experts.recent_use import RecentUse
from moray.runtime.experts.source import ExpertSource
from moray.runtime.experts.watch import WatchOptions, watch_layers
from moray.runtime.generation.request import GenerationRequest, Prompt, TokenEvent, joined
from moray.runtime.generation.stats import GenerationStats
from moray.runtime.generation.step_loop import StepLoop
from moray.runtime.generation.text import encode_prompt, end_token_ids, load_tokenizer
from moray.runtime.generation.vocabulary import Vocabulary, token_bytes
from moray.runtime.layout.packed import Numerics
from moray.runtime.model.batch import cache_kind_of, make_batch_forward
from moray.runtime.model.loader import bind_experts, blank_experts
from moray.runtime.planning.profile import GenerationLimits
from moray.runtime.store.store import Store

T = TypeVar("T")

_MAX_EARLY_CANCELS = 256
_CLOSED = "the engine was closed"


class _Outbox:
    """A request's events on their way from the loop's thread to the one that reads them, about ``interval_s`` apart."""

    def __init__(self, interval_s: float) -> None:
        self._queue: SimpleQueue[TokenEvent | BaseException] = SimpleQueue()
        self._has_ended = threading.Event()
        self._interval_s = interval_s
        self._put_s, self._gap_s = -math.inf, math.inf  # when the last event came, and how long after the one before
        self._due_s = -math.inf  # when the next is to be taken, if others come meanwhile

    def put(self, event: TokenEvent | BaseException) -> None:
        now = perf_counter()
        self._gap_s, self._put_s = now - self._put_s, now
        self._queue.put(event)
        if _is_last(event):
            self._has_ended.set()

    def take(self) -> TokenEvent | BaseException:
        """The first event; then what came since the last time, joined, or if nothing did, the next event. Or an error.

        Sleeps until the interval is over, unless the request ends: to be woken by every token would cost the loop's
        thread its time. Events so far apart that there would be nothing to join are not held back.
        """
        left_s = self._due_s - perf_counter()
        if left_s > 0 and 2 * self._gap_s <= self._interval_s:
            self._has_ended.wait(left_s)
        is_first, event = self._due_s == -math.inf, self._queue.get()
        while self._interval_s and not is_first and isinstance(event, TokenEvent) and not self._queue.empty():
            later = self._queue.get()
            event = joined(event, later) if isinstance(later, TokenEvent) else later
        self._due_s = perf_counter() + self._interval_s
        return event


def _is_last(event: TokenEvent | BaseException) -> bool:
    return isinstance(event, BaseException) or event.finished is not None


class Runner:
    """Generates from a store whose experts come from ``source``. Public methods may be called from any thread.

    Closes neither the store nor the source, which must outlive it.
    """

    def __init__(
        self,
        store: Store,
        source: ExpertSource,
        model: PreTrainedModel,
        numerics: Numerics = "int8",
        limits: GenerationLimits | None = None,
        watch: WatchOptions | None = None,
        tier: DeviceTier | None = None,
    ) -> None:
        """``model`` is ``load_model(store, ...)``'s; its experts are bound to ``source`` here. Raises TraceError.

        ``limits`` None: the model's own context and no limit of memory. ``tier``: the experts on the model's device,
        closed with the runner. On a GPU, by default, half of what is free.
        """
        self.model = model
        if tier is None and model.device.type != "cpu":
            tier = DeviceTier.of(store.manifest, model.device, default_budget(store.manifest, model.device))
        self._tier = tier
        self._meter = bind_experts(model, store, source, numerics, tier)
        self.tokenizer = load_tokenizer(store.path)
        with blank_experts(model, store.manifest):
            # Touches everything that a first request would wait for, too: single tokens, prompts, a batch.
            cache_kind = cache_kind_of(model)
            batch = make_batch_forward(model, cache_kind)
            if tier is not None and tier.cache is not None:
                tier.cache.clear()
        self._watch = watch_layers(model, store, source, watch or WatchOptions())
        self._meter.reset()
        self._recent = RecentUse(self._meter.tokens, perf_counter())
        self._end_ids = end_token_ids(store.path, self.model.config)
        self._loop = StepLoop(self.model, self.tokenizer, self._end_ids, cache_kind, limits, batch)
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._outboxes: dict[str, _Outbox] = {}
        self._early_cancels: deque[str] = deque(maxlen=_MAX_EARLY_CANCELS)
        self._due: dict[str, float] = {}  # request id -> perf_counter when it is ended
        self._overdue: set[str] = set()
        self._closing = threading.RLock()  # held to queue a command; reentrant: collected streams cancel themselves
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="moray-step-loop", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        return self._loop.context_length

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises RequestError."""
        return encode_prompt(self.tokenizer, prompt)

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served."""
        self._loop.check(request)

    def vocabulary(self) -> Vocabulary:
        """What each token writes, and which ones end a text. Raises RequestError if the store has no tokenizer."""
        if self.tokenizer is None:
            raise RequestError("this store has no tokenizer, so tokens have no text")
        return Vocabulary(token_bytes(self.tokenizer, self._loop.vocabulary_size), self._end_ids)

    def stream(self, request: GenerationRequest, interval_s: float = 0.0) -> Iterator[TokenEvent]:
        """Yield the request's events; the last has ``finished``. Closing the iterator cancels the request.

        Events that come faster than two in ``interval_s`` are joined, and yielded so far apart; 0: none are.
        Raises RequestError before anything is computed, MorayError after ``close``, or whatever made a step fail.
        """
        self._loop.check(request)
        outbox, arrived = _Outbox(interval_s), perf_counter()

        def start() -> None:
            if request.request_id in self._outboxes:
                outbox.put(RequestError(f"request id {request.request_id} is in use"))
                return
            self._outboxes[request.request_id] = outbox
            self._loop.add(request)
            if request.timeout_s is not None:
                self._due[request.request_id] = arrived + request.timeout_s
            if request.request_id in self._early_cancels:
                self._loop.cancel(request.request_id)

        if not self._post(start):
            raise MorayError(_CLOSED)
        return self._events(request.request_id, outbox)

    def cancel(self, request_id: str) -> None:
        """End a request after the step in flight; its stream ends with reason "cancelled".

        A cancel may overtake its request: it is kept for a while.
        """

        def end() -> None:
            if request_id in self._outboxes:
                self._loop.cancel(request_id)
            else:
                self._early_cancels.append(request_id)

        self._post(end)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, V] over the whole sequence. Raises RequestError, and MorayError after ``close``."""
        self._check_sequence(token_ids)
        return self._compute(lambda: self._loop.logits(token_ids))

    def score(self, token_ids: list[int], candidates: Ids | None = None) -> TokenScores:
        """How well the model predicts T tokens, at least 2, in one forward pass over the whole sequence.

        ``candidates`` [T-1, K], the same K in each row: token ids whose log-probabilities are wanted as well.
        Raises RequestError, and MorayError after ``close``.
        """
        self._check_sequence(token_ids)
        if len(token_ids) < 2:
            raise RequestError("a sequence of 1 token has nothing to score, expected at least 2: the first is context")
        if candidates is not None:
            if candidates.ndim != 2 or len(candidates) != len(token_ids) - 1:
                raise RequestError(
                    f"candidates have shape {list(candidates.shape)}, expected [{len(token_ids) - 1}, K]: a row for "
                    "each token but the first"
                )
            self._loop.check_ids(np.unique(candidates).tolist())
        return self._compute(lambda: self._loop.score(token_ids, candidates))

    def stats(self) -> ExpertsStats:
        return self._meter.snapshot()

    def recent_use(self) -> list[Bytes]:
        """uint8 [E] of each layer: see ``RecentUse.levels``."""
        return self._recent.levels(perf_counter())

    def prefetch(self) -> str:
        """Whether experts are loaded ahead of need, and why."""
        return "off" if self._watch is None else self._watch.prefetch

    def generation_stats(self) -> GenerationStats:
        return self._loop.stats()

    def device_stats(self) -> DeviceStats | None:
        """Of the experts on a device; None if all are computed on the CPU anyway."""
        return None if self._tier is None else self._tier.stats()

    def on_device(self) -> list[Bools] | None:
        """bool [E] of each layer: experts on a device; None if there is none for them."""
        return None if self._tier is None else self._tier.resident()

    def close(self) -> None:
        """Stop the thread; open streams end with an error."""
        with self._closing:
            self._is_closed = True
            self._inbox.put(None)
        self._thread.join()
        if self._watch is not None:
            self._watch.close()
        if self._tier is not None:
            self._tier.close()

    def _check_sequence(self, token_ids: list[int]) -> None:
        """Raise RequestError if the model cannot take these tokens: one more than a prompt may have."""
        self._loop.check(GenerationRequest("sequence", tuple(token_ids[:-1] or token_ids), 1))
        self._loop.check_ids(token_ids)

    def _compute(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the loop's thread, between steps, and wait for what it gives or raises."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(error)

        if not self._post(run):
            raise MorayError(_CLOSED)
        return answer.result()

    def _post(self, command: Callable[[], None]) -> bool:
        """Queue a command for the loop's thread; False after ``close``."""
        with self._closing:
            if not self._is_closed:
                self._inbox.put(command)
            return not self._is_closed

    def _events(self, request_id: str, outbox: _Outbox) -> Iterator[TokenEvent]:
        finished = False
        try:
            while not finished:
                event = outbox.take()
                finished = _is_last(event)
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if not finished:
                self.cancel(request_id)

    def _run(self) -> None:
        while True:
            while self._loop.is_idle or not self._inbox.empty():
                command = self._inbox.get()  # blocks while idle: no CPU is used
                if command is None:
                    self._fail(MorayError(_CLOSED))
                    return
                command()
            self._end_overdue()
            try:
                events = self._loop.step()
            except Exception as error:
                self._fail(error)
                continue
            for event in events:
                self._deliver(event)
            for request_id, failure in self._loop.take_failures().items():
                self._due.pop(request_id, None)
                self._overdue.discard(request_id)
                self._outboxes.pop(request_id).put(failure)

    def _end_overdue(self) -> None:
        now = perf_counter()
        for request_id in [request_id for request_id, due in self._due.items() if due <= now]:
            del self._due[request_id]
            self._overdue.add(request_id)
            self._loop.cancel(request_id)

    def _deliver(self, event: TokenEvent) -> None:
        if event.finished:
            self._due.pop(event.request_id, None)
            if event.request_id in self._overdue:
                self._overdue.remove(event.request_id)
                if event.finished.reason == "cancelled":
                    event = replace(event, finished=replace(event.finished, reason="deadline"))
        outbox = self._outboxes.pop(event.request_id) if event.finished else self._outboxes[event.request_id]
        outbox.put(event)

    def _fail(self, error: BaseException) -> None:
        """End every stream: the loop is closed, or wrong in itself. What fails in a model ends fewer."""
        self._loop.abort()
        self._due.clear()
        self._overdue.clear()
        while self._outboxes:
            self._outboxes.popitem()[1].put(error)
