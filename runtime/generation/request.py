"""What a caller asks for and what comes back, token by token. Plain values: they cross process boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moray.runtime.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "deadline"]

MAX_TOP_LOG_PROBS = 20


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. Roles are the chat template's: usually system, user, assistant.

    ``token_ids`` are an answer's own tokens. A model without a chat template gets them back as they were, so its
    kept KV cache fits to the last token; a template writes the text anew.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] = ()


Prompt = str | Sequence[int] | Sequence[Message]  # a text, ready token ids, or a chat


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and what is told of it. Temperature 0 is greedy.

    Penalties and biases are OpenAI's: from each token's logit its count among the generated tokens times
    ``frequency_penalty`` is subtracted, and ``presence_penalty`` if it is among them; ``logit_bias`` is added.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added
    num_log_probs: int | None = None  # tell log-probabilities, of so many most likely tokens as well; None: tell none

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature is {self.temperature}, expected 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}, expected a whole number, 0 (all) or more")
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**64):
            raise RequestError(f"seed is {self.seed}, expected a whole number of at most 64 bits")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name} is {getattr(self, name)}, expected -2 to 2")
        for token_id, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token_id} is {bias}, expected -100 to 100")
        if self.num_log_probs is not None and not 0 <= self.num_log_probs <= MAX_TOP_LOG_PROBS:
            raise RequestError(f"num_log_probs is {self.num_log_probs}, expected 0 to {MAX_TOP_LOG_PROBS}")

    @property
    def shifts_logits(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. ``prompt_ids`` are the tokens as the model sees them, special ones included.

    ``generated``: tokens of the answer that the caller already has, of an engine that died: what follows is what it
    would have given, text and end included. ``max_new_tokens`` counts them.
    ``timeout_s``: seconds from its arrival after which it is ended, with reason "deadline". None: never.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    generated: tuple[int, ...] = ()
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty, expected at least one token")
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty, expected at least one character")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise RequestError(f"timeout_s is {self.timeout_s}, expected more than 0")
        if len(self.generated) >= self.max_new_tokens:
            raise RequestError(
                f"{len(self.generated)} tokens are generated already, expected fewer than max_new_tokens "
                f"({self.max_new_tokens})"
            )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. ``cached_tokens`` of the prompt were taken from a kept KV cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request, measured in the step loop."""

    prefill_s: float  # from admission to the first token
    decode_s: float  # from the first token to the last

    def prefill_rate(self, usage: Usage) -> float:
        """Prompt tokens computed a second."""
        return (usage.prompt_tokens - usage.cached_tokens) / self.prefill_s if self.prefill_s else 0.0

    def decode_rate(self, usage: Usage) -> float:
        """Tokens a second after the first."""
        return (usage.completion_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """Why and how a request ended."""

    reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Natural logarithms of the model's own probabilities, before temperature, penalties and biases."""

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]  # token id, log-probability; the most likely first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One or more steps of one request: new tokens, the text they complete, and the end if this is it.

    ``text`` never holds half a character; text that might begin a stop string is held back until it is decided.
    ``log_probs``: one for each of ``token_ids`` if the request asked for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finished: Finished | None = None
    log_probs: tuple[TokenLogProbs, ...] = ()


def joined(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """Two events of a request, one after the other, as one."""
    tokens, text = first.token_ids + second.token_ids, first.text + second.text
    return TokenEvent(second.request_id, tokens, text, second.finished, first.log_probs + second.log_probs)
