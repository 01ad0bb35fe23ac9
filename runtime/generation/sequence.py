"""One request on its way through the step loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

from moray.runtime.generation.detokenizer import Detokenizer
from moray.runtime.generation.kv import KVCache
from moray.runtime.generation.request import (
    Finished,
    FinishReason,
    GenerationRequest,
    Timings,
    TokenEvent,
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
        self.ids = [*self.request.prompt_ids, *self.request.generated]
        self.cached_tokens = len(self.kv.ids)
        for token_id in self.request.generated:
            self.detokenizer.push(token_id)  # its text was given before

    @property
    def pending(self) -> list[int]:
        """Tokens known but not yet in the cache: what the next forward passes compute."""
        return self.ids[len(self.kv.ids) :]

    @property
    def next_chunk(self) -> list[int]:
        """Those of them that go through the model together: the prompt's, or one generated token.

        So replayed tokens have the bits that they had: a prompt's attention rounds otherwise than one token's.
        """
        left = len(self.request.prompt_ids) - len(self.kv.ids)
        return self.pending[: max(left, 1)]

    @property
    def num_generated(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    def push(self, token_id: int) -> TokenEvent:
        """Take the sampled token. The event says if it was the last."""
        self.last_token_s = perf_counter()
        if not self.first_token_s:
            self.first_token_s = self.last_token_s
        self.ids.append(token_id)
        if token_id in self.end_ids:
            return self._event((token_id,), self.detokenizer.finish(), "stop")
        text = self.detokenizer.push(token_id)
        if self.detokenizer.stopped:
            return self._event((token_id,), text, "stop")
        if self.num_generated >= self.request.max_new_tokens:
            return self._event((token_id,), text + self.detokenizer.finish(), "length")
        return TokenEvent(self.request.request_id, (token_id,), text)

    def cancel(self) -> TokenEvent:
        return self._event((), self.detokenizer.finish(), "cancelled")

    def _event(self, token_ids: tuple[int, ...], text: str, reason: FinishReason) -> TokenEvent:
        usage = Usage(len(self.request.prompt_ids), self.cached_tokens, self.num_generated)
        first = self.first_token_s or perf_counter()
        timings = Timings(first - self.started_s, max(0.0, self.last_token_s - first))
        return TokenEvent(self.request.request_id, token_ids, text, Finished(reason, usage, timings))
