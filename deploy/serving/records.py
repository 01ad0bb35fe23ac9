"""What is known of one request while it runs, for metrics and logs."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Literal

from moray.runtime.generation.request import TokenEvent

#: ok; refused: 4xx; limited: 429; failed: 5xx, or an error in the stream; gone: the client left before the end.
Outcome = Literal["ok", "refused", "limited", "failed", "gone"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "limited", "failed", "gone")

_LONGEST = 200  # of what a client may choose, in logs


@dataclass(slots=True)
class Choice:
    """When the first and the last token of a choice came, monotonic seconds."""

    first_s: float
    last_s: float
    num_tokens: int
    num_first: int  # tokens that came with the first

    @property
    def token_s(self) -> float | None:
        """Mean seconds a token after the first to come; None if there is none."""
        after = self.num_tokens - self.num_first
        return (self.last_s - self.first_s) / after if after else None


@dataclass(slots=True)
class RequestRecord:
    """One request from its arrival to the end of its answer."""

    request_id: str
    method: str = ""
    path: str = ""
    started_at: float = field(default_factory=time)
    started_s: float = field(default_factory=monotonic)
    ended_s: float | None = None
    status: int | None = None  # None: nothing was answered
    is_complete: bool = False  # the whole answer was handed on
    has_failed: bool = False  # with an exception
    num_choices: int = 0
    num_finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    _per_prompt: int = 1  # choices of each prompt

    @classmethod
    def make(cls, request_id: str | None, method: str = "", path: str = "") -> RequestRecord:
        return cls((request_id or secrets.token_hex(16))[:_LONGEST], method[:_LONGEST], path[:_LONGEST])

    def begin(self, prompt_lengths: list[int], num_choices: int) -> None:
        """It was admitted: tokens of each prompt, and choices of all prompts together."""
        self.prompt_tokens, self.num_choices = sum(prompt_lengths), num_choices
        self._per_prompt = num_choices // len(prompt_lengths)

    def note(self, index: int, event: TokenEvent) -> None:
        """What came of choice ``index``."""
        if event.token_ids:
            now, count = monotonic(), len(event.token_ids)
            choice = self.choices.get(index)
            if choice is None:
                self.choices[index] = Choice(now, now, count, count)
            else:
                choice.last_s, choice.num_tokens = now, choice.num_tokens + count
        if event.finished is not None:
            self.num_finished += 1
            if index % self._per_prompt == 0:  # a prompt counts once, as in OpenAI's usage
                self.cached_tokens += event.finished.usage.cached_tokens

    @property
    def outcome(self) -> Outcome:
        if self.has_failed or (self.status or 0) >= 500:
            return "failed"
        if self.status is not None and self.status >= 400:
            return "limited" if self.status == 429 else "refused"
        if not self.is_complete:
            return "gone"
        return "ok" if self.num_finished == self.num_choices else "failed"

    @property
    def output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices.values())

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the arrival to the first token of any choice."""
        if not self.choices:
            return None
        return min(choice.first_s for choice in self.choices.values()) - self.started_s

    @property
    def token_s(self) -> list[float]:
        """Mean seconds a token, of each choice that has more than came at first."""
        return [value for choice in self.choices.values() if (value := choice.token_s) is not None]

    @property
    def seconds(self) -> float:
        return (monotonic() if self.ended_s is None else self.ended_s) - self.started_s


_CURRENT: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def current_record() -> RequestRecord:
    """Of the request that this task works on; a new one, seen by nobody, outside of requests."""
    return _CURRENT.get() or RequestRecord.make(None)


def set_current(record: RequestRecord) -> None:
    _CURRENT.set(record)
