"""The step loop: prefill and decode steps over the model's forward, for several sequences at once.

One call of ``step`` advances every decoding sequence by one token and computes one chunk of one prompt. Nothing here
blocks or starts threads: ``runner.py`` drives it. Requests join and leave between steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moray.runtime.errors import RequestError
from moray.runtime.evaluation import Ids, TokenScores
from moray.runtime.generation.detokenizer import Detokenizer, Tokenizer
from moray.runtime.generation.kv import KeptCaches
from moray.runtime.generation.request import GenerationRequest, TokenEvent
from moray.runtime.generation.sampler import Sampler
from moray.runtime.generation.scoring import score_logits
from moray.runtime.generation.sequence import Sequence
from moray.runtime.model.attention_modules import is_all_fused
from moray.runtime.model.families import context_length

PREFILL_CHUNK = 512  # prompt tokens in one forward pass: bounds activations, and how long a decode waits
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
    ) -> None:
        self._model = model
        self._config = model.config.get_text_config()
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
        return context_length(self._config)

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served. Thread-safe: reads constants only."""
        length = len(request.prompt_ids)
        if length >= self.context_length:
            raise RequestError(
                f"the prompt has {length} tokens, the model's context holds {self.context_length} with at least one "
                "to generate; shorten the prompt"
            )
        self.check_ids(request.prompt_ids)
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
        while self._waiting and len(self._running) < MAX_RUNNING:
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

    def _admit(self, request: GenerationRequest) -> None:
        room = self.context_length - len(request.prompt_ids)
        if request.max_new_tokens > room:
            request = GenerationRequest(request.request_id, request.prompt_ids, room, request.sampling, request.stop)
        self._running[request.request_id] = Sequence(
            request,
            self._kept.take(request.prompt_ids, self._config),
            Detokenizer(self._tokenizer, request.prompt_ids, request.stop),
            Sampler(request.sampling),
            self._end_ids,
        )

    def _advance(self, sequence: Sequence) -> list[TokenEvent]:
        """One forward pass of one sequence; an event if it reached the end of the known tokens."""
        pending = sequence.pending
        chunk = pending[:PREFILL_CHUNK] if sequence.kv.can_chunk else pending
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
            self._admit(request)
        for request_id in [r for r in self._running if r in cancelled]:
            sequence = self._running[request_id]
            events.append(sequence.cancel())
            self._retire(sequence)
        return events
