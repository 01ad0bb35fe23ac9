"""The step loop: prefill and decode steps over the model's forward, for several sequences at once.

One call of ``step`` advances every decoding sequence by one token and computes one chunk of one prompt. Nothing here
blocks or starts threads: ``runner.py`` drives it. Requests join and leave between steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moray.runtime.errors import RequestError
from moray.runtime.evaluation import Ids, TokenScores
from moray.runtime.generation.detokenizer import Detokenizer, Tokenizer
from moray.runtime.generation.kv import KeptCaches, KVCache
from moray.runtime.generation.request import GenerationRequest, TokenEvent
from moray.runtime.generation.sampler import Sampler
from moray.runtime.generation.scoring import score_logits
from moray.runtime.generation.sequence import Sequence
from moray.runtime.model.attention_modules import is_all_fused
from moray.runtime.model.families import context_length
from moray.runtime.planning.profile import GenerationLimits

MAX_RUNNING = 8
KEPT_CACHES = 4
_SMALL_ATTENTION = 128 << 10  # pairs of a token and a key, of one head


class StepLoop:
    """Owns the running sequences and their KV caches. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        end_ids: frozenset[int],
        cache_kind: type[DynamicCache] = DynamicCache,
        limits: GenerationLimits | None = None,
    ) -> None:
        """``limits`` None: the model's own context and no limit of memory."""
        self._model = model
        self._config = model.config.get_text_config()
        self._limits = limits or GenerationLimits(context_length(self._config))
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._waiting: deque[GenerationRequest] = deque()
        self._running: dict[str, Sequence] = {}
        self._cancelled: set[str] = set()
        self._kept = KeptCaches(KEPT_CACHES, cache_kind)
        self._num_threads = torch.get_num_threads()
        self._is_all_fused = is_all_fused(model)

    @property
    def context_length(self) -> int:
        return min(context_length(self._config), self._limits.context_length)

    @property
    def reserved_bytes(self) -> int:
        """What all KV caches, running and kept, may grow to: never more than the limit."""
        return self._running_bytes + self._kept.reserved_bytes

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served. Thread-safe: reads constants only."""
        length = len(request.prompt_ids) + len(request.generated)
        if length >= self.context_length:
            raise RequestError(self._too_long(length))
        self.check_ids(request.prompt_ids)
        self.check_ids(request.generated)
        if request.stop and self._tokenizer is None:
            raise RequestError("this store has no tokenizer, so a text cannot stop a request; leave out stop")

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise RequestError if an id is not a token of the model."""
        bad = [i for i in ids if not 0 <= i < self.vocabulary_size]
        if bad:
            raise RequestError(f"token id {bad[0]} is not in the vocabulary of {self.vocabulary_size}")

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Its id must not be in use."""
        self.check(request)
        assert request.request_id not in self._running
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown ids are ignored, they may just have ended."""
        if request_id in self._running or any(request.request_id == request_id for request in self._waiting):
            self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance. Returns what happened, in the order of arrival of the requests."""
        events = self._drop_cancelled()
        while self._waiting and len(self._running) < MAX_RUNNING and self._has_room(self._waiting[0]):
            self._admit(self._waiting.popleft())
        prefilled = False
        for sequence in list(self._running.values()):
            if len(sequence.pending) > 1:
                if prefilled:
                    continue
                prefilled = True
            events += self._advance(sequence)
        return events

    def abort(self) -> None:
        """Drop every request after a failed step, with their caches."""
        self._waiting.clear()
        self._running.clear()
        self._cancelled.clear()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, V] of the whole sequence, computed at once, beside whatever is running."""
        torch.set_num_threads(self._num_threads)
        ids = torch.tensor([token_ids], device=self._model.device)
        output = self._model(input_ids=ids, use_cache=False)
        logits: torch.Tensor = output.logits[0].float().cpu()
        return logits

    @torch.inference_mode()
    def score(self, token_ids: list[int], candidates: Ids | None = None) -> TokenScores:
        """Scores of a window of T > 1 tokens, computed at once, beside whatever is running. Holds one [T, V]."""
        torch.set_num_threads(self._num_threads)
        ids = torch.tensor([token_ids], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        return score_logits(logits, np.array(token_ids[1:], dtype=np.int32), candidates)

    def _too_long(self, length: int) -> str:
        own, planned = context_length(self._config), self.context_length
        if planned == own:
            holds, remedy = f"the model's context holds {own}", "shorten the prompt"
        else:
            holds = f"the context planned for this machine's memory holds {planned} (the model's own {own})"
            remedy = (
                f"shorten the prompt, or start the engine with a larger --context, up to {own}, and the memory for it"
            )
        return f"the prompt has {length} tokens, {holds} with at least one to generate; {remedy}"

    def _num_tokens(self, request: GenerationRequest) -> int:
        """Most tokens of the request's sequence."""
        return min(len(request.prompt_ids) + request.max_new_tokens, self.context_length)

    @property
    def _running_bytes(self) -> int:
        return sum(sequence.kv.reserved_bytes for sequence in self._running.values())

    def _has_room(self, request: GenerationRequest) -> bool:
        """Whether its KV cache fits beside those that run. The first waits until it does: none overtakes."""
        needed = self._limits.sequence_bytes(self._num_tokens(request))
        return self._limits.kv_bytes is None or self._running_bytes + needed <= self._limits.kv_bytes

    def _admit(self, request: GenerationRequest) -> None:
        """Start a request that has room, at the cost of the oldest kept caches."""
        tokens = self._num_tokens(request)
        kv, needed = self._kept.take(request.prompt_ids, self._config), self._limits.sequence_bytes(tokens)
        if self._limits.kv_bytes is not None:
            self._kept.shrink(self._limits.kv_bytes - self._running_bytes - needed)
        kv.reserve(tokens, needed)
        request = replace(request, max_new_tokens=tokens - len(request.prompt_ids))
        self._running[request.request_id] = self._sequence(request, kv)

    def _sequence(self, request: GenerationRequest, kv: KVCache) -> Sequence:
        detokenizer = Detokenizer(self._tokenizer, request.prompt_ids, request.stop)
        return Sequence(request, kv, detokenizer, Sampler(request.sampling, len(request.generated)), self._end_ids)

    def _advance(self, sequence: Sequence) -> list[TokenEvent]:
        """One forward pass of one sequence; an event if it reached the end of the known tokens."""
        pending, chunk = sequence.pending, sequence.next_chunk
        if sequence.kv.can_chunk:
            chunk = chunk[: self._limits.chunk]
        ids = torch.tensor([chunk], device=self._model.device)
        self._give_torch_threads(len(chunk), len(sequence.kv.ids) + len(chunk))
        output = self._model(input_ids=ids, past_key_values=sequence.kv.cache, use_cache=True, logits_to_keep=1)
        sequence.kv.ids += chunk
        if len(chunk) < len(pending):
            return []
        event = sequence.push(sequence.sampler.sample(sequence.ids, output.logits[0, -1]))
        if event.finished:
            self._retire(sequence)
        return [event]

    def _give_torch_threads(self, tokens: int, length: int) -> None:
        """All of them for a large attention of its own only: for less, waking them takes longer, and disturbs the
        kernels'.
        """
        is_large = tokens * length > _SMALL_ATTENTION and not self._is_all_fused
        torch.set_num_threads(self._num_threads if is_large else 1)

    def _retire(self, sequence: Sequence) -> None:
        del self._running[sequence.request.request_id]
        if sequence.kv.ids:
            self._kept.keep(sequence.kv)

    def _drop_cancelled(self) -> list[TokenEvent]:
        cancelled, self._cancelled = self._cancelled, set()
        events = []
        for request in [r for r in self._waiting if r.request_id in cancelled]:
            self._waiting.remove(request)
            events.append(self._sequence(request, KVCache.empty(self._config)).cancel())
        for request_id in [r for r in self._running if r in cancelled]:
            sequence = self._running[request_id]
            events.append(sequence.cancel())
            self._retire(sequence)
        return events
