"""What the server accepts: OpenAI's requests, as far as they are supported, and nothing else.

Strict: no value is converted and no key is ignored. Keys that ask for nothing unusual (``store: false``) are accepted
with that one value, because clients send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from moray.runtime.generation.request import Message, Prompt, SamplingParams

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_LEGACY_MAX_TOKENS = 16  # OpenAI's default of /v1/completions


def _is_text(text: str) -> str:
    """JSON can write half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode: half of a surrogate pair at {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
StopText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = _STRICT

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn of a chat."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def message(self) -> Message:
        """For the chat template: ``developer`` is the newer name of ``system``."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class TextFormat(BaseModel):
    """The only format of answers."""

    model_config = _STRICT

    type: Literal["text"]


class _SamplingRequest(BaseModel):
    """What both endpoints share."""

    model_config = _STRICT

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenText, Bias] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Text | None = Field(None, description="Accepted and not used: every caller is treated alike.")

    @model_validator(mode="after")
    def _options_of_streams(self) -> _SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are only allowed with stream: true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_log_probs(self) -> int | None:
        """Most likely tokens to tell beside each token; None: tell nothing."""
        raise NotImplementedError

    def sampling(self, choice: int) -> SamplingParams:
        """Of one of the ``n`` choices. With a seed, each has its own: seed + choice."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed + choice,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            num_log_probs=self.num_log_probs,
        )


class ChatRequest(_SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        return self

    @property
    def num_log_probs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompts(self) -> list[Prompt]:
        return [[message.message for message in self.messages]]

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as the context holds."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _goes_together(self) -> CompletionRequest:
        if self.best_of is not None and self.num_choices > self.best_of:
            raise ValueError("best_of must not be less than n; leave it out")
        return self

    @property
    def num_log_probs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[Prompt]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens or _LEGACY_MAX_TOKENS
