"""One request on its way through the step loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import torch

from moray.runtime.generation.detokenizer import Detokenizer
from moray.runtime.generation.kv import AS_PROMPT, AS_STEP, KVCache
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
from moray.runtime.generation.speculation import PromptLookup


@dataclass(slots=True)
class Sequence:
    """A request, its KV cache, which is empty while it waits, and what it has generated.

    Three lengths are always in this order: tokens in the cache < tokens known <= prompt + max_new_tokens.
    """

    request: GenerationRequest
    detokenizer: Detokenizer
    sampler: Sampler
    end_ids: frozenset[int]
    kv: KVCache = field(default_factory=KVCache)
    ids: list[int] = field(default_factory=list)  # prompt and generated tokens
    cached_tokens: int = 0
    kinds: bytearray = field(default_factory=bytearray)  # how each of ``ids`` is computed: kv.AS_PROMPT or AS_STEP
    lookup: PromptLookup | None = None  # proposes tokens; None: nothing is to be tried
    started_s: float = 0.0  # 0: it waits
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def __post_init__(self) -> None:
        prompt, generated = self.request.prompt_ids, self.request.generated
        self.ids = [*prompt, *generated]
        self.kinds = bytearray([AS_PROMPT] * len(prompt) + [AS_STEP] * len(generated))
        for token_id in generated:
            self.detokenizer.push(token_id)  # its text was given before

    def start(self, kv: KVCache) -> int:
        """Leave the queue with a cache that may hold some first tokens; returns how many. Again after a preemption."""
        self.kv, reused = kv, len(kv.ids)
        if not self.started_s:
            self.started_s, self.cached_tokens = perf_counter(), reused
        self.kinds[:reused] = kv.kinds
        if self.kinds[reused] == AS_PROMPT and self._end_of_kind(reused) == reused + 1:
            self.kinds[reused] = AS_STEP  # a chunk of one token is a step
        return reused

    def stop(self) -> None:
        """Go back to the queue without the cache, which will be computed again in the same way."""
        self.kv = KVCache()

    @property
    def is_prompt(self) -> bool:
        """Whether its next tokens are computed as a chunk of a prompt; so is a first token."""
        return not self.kv.ids or self.kinds[len(self.kv.ids)] == AS_PROMPT

    def next_chunk(self, most: int | None) -> list[int]:
        """Tokens of a prompt to compute at once, at most ``most`` (2 or more, give or take one); None: all of them."""
        start = len(self.kv.ids)
        if self.kinds[start] == AS_STEP:  # the first of all
            return self.ids[start : start + 1]
        end = self._end_of_kind(start)
        if most is not None and end - start > most:
            left = end - start - most
            end = start + (most if left > 1 else most - 1 if most > 2 else most + 1)
        return self.ids[start:end]

    def next_steps(self, most: int) -> list[int]:
        """Known tokens to compute as steps, at most ``most``."""
        start = len(self.kv.ids)
        return self.ids[start : min(self._end_of_kind(start), start + most)]

    def _end_of_kind(self, start: int) -> int:
        end = self.kinds.find(1 - self.kinds[start], start)
        return len(self.ids) if end < 0 else end

    @property
    def most_tokens(self) -> int:
        """Tokens in its cache at the end: the last one is never computed."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - 1

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
        if not self.first_token_s:
            self.first_token_s = self.last_token_s
        self.ids.append(token_id)
        self.kinds.append(AS_STEP)
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
        timings = Timings(first - (self.started_s or first), max(0.0, self.last_token_s - first))
        return TokenEvent(self.request.request_id, token_ids, text, Finished(reason, usage, timings), log_probs)
