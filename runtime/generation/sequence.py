"""One request on its way through the step loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import torch

from moray.runtime.generation.detokenizer import Detokenizer
from moray.runtime.generation.kv import KVCache
from moray.runtime.generation.request import (
    Finished,
    FinishReason,
    GenerationRequest,
    Timings,
    TokenEvent,
    TokenLogProbs,
    Usage,
)
from moray.runtime.generation.sampler import Sampler


@dataclass(slots=True)
class Sequence:
    """A request, its KV cache and what it has generated.

    Three lengths are always in this order: tokens in the cache < tokens known <= prompt + max_new_tokens.
    """

    request: GenerationRequest
    kv: KVCache
    detokenizer: Detokenizer
    sampler: Sampler
    end_ids: frozenset[int]
    ids: list[int] = field(default_factory=list)  # prompt and generated tokens
    cached_tokens: int = 0
    started_s: float = field(default_factory=perf_counter)
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        self.cached_tokens = len(self.kv.ids)

    @property
    def pending(self) -> list[int]:
        """Tokens known but not yet in the cache: what the next forward passes compute."""
        return self.ids[len(self.kv.ids) :]

    @property
    def num_generated(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    def take(self, logits_V: torch.Tensor) -> TokenEvent:
        """Sample the next token from the logits [V] after the last known one. The event says if it was the last."""
        token_id = self.sampler.sample(self.ids, logits_V)
        return self.push(token_id, self.sampler.explain(token_id, logits_V))

    def push(self, token_id: int, log_probs: tuple[TokenLogProbs, ...] = ()) -> TokenEvent:
        """Take the sampled token. The event says if it was the last."""
        self.last_token_s = perf_counter()
        if not self.num_generated:
            self.first_token_s = self.last_token_s
        self.ids.append(token_id)
        if token_id in self.end_ids:
            return self._event((token_id,), self.detokenizer.finish(), "stop", log_probs)
        text = self.detokenizer.push(token_id)
        if self.detokenizer.stopped:
            return self._event((token_id,), text, "stop", log_probs)
        if self.num_generated >= self.request.max_new_tokens:
            return self._event((token_id,), text + self.detokenizer.finish(), "length", log_probs)
        return TokenEvent(self.request.request_id, (token_id,), text, None, log_probs)

    def cancel(self) -> TokenEvent:
        return self._event((), self.detokenizer.finish(), "cancelled")

    def _event(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason,
        log_probs: tuple[TokenLogProbs, ...] = (),
    ) -> TokenEvent:
        usage = Usage(len(self.request.prompt_ids), self.cached_tokens, self.num_generated)
        first = self.first_token_s or perf_counter()
        timings = Timings(first - self.started_s, max(0.0, self.last_token_s - first))
        return TokenEvent(self.request.request_id, token_ids, text, Finished(reason, usage, timings), log_probs)
