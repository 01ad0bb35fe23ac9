"""Answers in OpenAI's types, whole and in pieces."""

from __future__ import annotations

import codecs
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails

from moray.runtime.generation.request import Finished, TokenEvent, TokenLogProbs
from moray.runtime.generation.vocabulary import Vocabulary

_LEAST_LOG_PROB = -9999.0  # OpenAI's, for what is next to impossible; JSON knows no infinity


@dataclass(slots=True)
class Collected:
    """What came of one choice so far."""

    text: str = ""
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    finished: Finished | None = None
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    num_characters: int = 0  # written by tokens that were told of, for their offsets

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        self.log_probs += event.log_probs
        self.finished = event.finished

    @property
    def reason(self) -> Any:
        """OpenAI's word: of ours, only "stop" and "length" get here."""
        return None if self.finished is None else self.finished.reason


@dataclass(frozen=True, slots=True)
class Head:
    """What all pieces of an answer have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def make(cls, prefix: str, model: str, fingerprint: str) -> Head:
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, fingerprint)

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def usage_of(choices: list[Finished], num_choices: int) -> CompletionUsage:
    """Of all choices together. A prompt counts once, however many choices it has."""
    prompts = [finished.usage for finished in choices[::num_choices]]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(finished.usage.completion_tokens for finished in choices)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in prompts)),
    )


# ----------------------------------------------------------------------------------------- chat


def chat_answer(
    head: Head, choices: list[Collected], vocabulary: Vocabulary | None, usage: CompletionUsage
) -> ChatCompletion:
    made = [
        chat_completion.Choice(
            index=index,
            finish_reason=choice.reason,
            message=ChatCompletionMessage(role="assistant", content=choice.text, refusal=None),
            logprobs=_chat_logprobs(choice.log_probs, vocabulary, chat_completion.ChoiceLogprobs),
        )
        for index, choice in enumerate(choices)
    ]
    return ChatCompletion(object="chat.completion", choices=made, usage=usage, **head.fields)


def chat_chunk(
    head: Head, index: int, piece: Collected, vocabulary: Vocabulary | None, *, is_first: bool
) -> ChatCompletionChunk:
    delta = {"role": "assistant", "content": piece.text, "refusal": None} if is_first else {"content": piece.text}
    choice = chat_completion_chunk.Choice(
        index=index,
        finish_reason=piece.reason,
        delta=chat_completion_chunk.ChoiceDelta(**delta),
        logprobs=_chat_logprobs(piece.log_probs, vocabulary, chat_completion_chunk.ChoiceLogprobs),
    )
    return ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **head.fields)


def chat_usage_chunk(head: Head, usage: CompletionUsage) -> ChatCompletionChunk:
    return ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **head.fields)


def _chat_logprobs(entries: list[TokenLogProbs], vocabulary: Vocabulary | None, kind: Any) -> Any:
    if vocabulary is None:
        return None
    return kind(
        content=[
            ChatCompletionTokenLogprob(
                **_told(entry.token_id, entry.log_prob, vocabulary),
                top_logprobs=[TopLogprob(**_told(token_id, value, vocabulary)) for token_id, value in entry.top],
            )
            for entry in entries
            if entry.token_id not in vocabulary.end_ids
        ],
        refusal=None,
    )


def _told(token_id: int, log_prob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    piece = vocabulary.pieces[token_id]
    return {"token": _name(piece), "bytes": list(piece), "logprob": max(log_prob, _LEAST_LOG_PROB)}


def _name(piece: bytes) -> str:
    """A token's text; bytes that are no text are written out, as OpenAI does: ``\\xe2\\x9c``."""
    return piece.decode("utf-8", errors="backslashreplace")


# ----------------------------------------------------------------------------------- completions


def text_answer(
    head: Head, choices: list[Collected], vocabulary: Vocabulary | None, usage: CompletionUsage
) -> Completion:
    made = [text_choice(index, choice, vocabulary) for index, choice in enumerate(choices)]
    return Completion(object="text_completion", choices=made, usage=usage, **head.fields)


def text_chunk(head: Head, index: int, piece: Collected, vocabulary: Vocabulary | None) -> Completion:
    return Completion(object="text_completion", choices=[text_choice(index, piece, vocabulary)], **head.fields)


def text_usage_chunk(head: Head, usage: CompletionUsage) -> Completion:
    return Completion(object="text_completion", choices=[], usage=usage, **head.fields)


def text_choice(index: int, piece: Collected, vocabulary: Vocabulary | None) -> CompletionChoice:
    """A choice, or a piece of it: then ``finish_reason`` is None, which OpenAI sends and its type does not have."""
    return CompletionChoice.model_construct(
        index=index, text=piece.text, finish_reason=piece.reason, logprobs=_text_logprobs(piece, vocabulary)
    )


def _text_logprobs(piece: Collected, vocabulary: Vocabulary | None) -> Logprobs | None:
    if vocabulary is None:
        return None
    entries = [entry for entry in piece.log_probs if entry.token_id not in vocabulary.end_ids]
    offsets = []
    for entry in entries:
        offsets.append(piece.num_characters)
        piece.num_characters += len(piece.decoder.decode(vocabulary.pieces[entry.token_id]))
    return Logprobs(
        tokens=[_name(vocabulary.pieces[entry.token_id]) for entry in entries],
        token_logprobs=[max(entry.log_prob, _LEAST_LOG_PROB) for entry in entries],
        top_logprobs=[
            {_name(vocabulary.pieces[token_id]): max(value, _LEAST_LOG_PROB) for token_id, value in entry.top}
            for entry in entries
        ],
        text_offset=offsets,
    )
