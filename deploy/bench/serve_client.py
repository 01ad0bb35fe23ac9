"""One streamed request to an OpenAI-compatible server, and when its parts came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import httpx2

Api = Literal["completions", "chat"]


class BrokenAnswer(Exception):
    """What a server sent that is no answer. ``kind`` is counted."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(slots=True)
class Answer:
    """What came of one request. Seconds are perf_counter's."""

    arrived_s: float  # when it was due
    sent_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)  # each piece of text as it came
    ended_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    output_tokens: int = 0
    error: str | None = None  # its kind; None: a whole answer
    detail: str = ""

    @property
    def first_s(self) -> float:
        """Seconds from the arrival to the first piece of text."""
        return self.pieces_s[0] - self.arrived_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.pieces_s, self.pieces_s[1:], strict=False)]

    @property
    def token_s(self) -> float | None:
        """Mean seconds a token after the first; None if there is none."""
        if self.output_tokens < 2:
            return None
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask. ``client`` has the base URL and the key."""

    client: httpx2.AsyncClient
    api: Api
    model: str
    timeout_s: float  # of a whole answer

    async def ask(self, text: str, max_tokens: int, answer: Answer) -> None:
        """Stream one answer into ``answer``, errors of every kind included."""
        answer.sent_s = perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._ask(text, max_tokens, answer)
            if not answer.pieces_s:
                raise BrokenAnswer("no text")
        except BrokenAnswer as error:
            answer.error, answer.detail = error.kind, str(error)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # JSON of another shape
            answer.error, answer.detail = "bad event", f"{type(error).__name__} {error}"
        except (TimeoutError, httpx2.TimeoutException):
            answer.error, answer.detail = "timeout", f"no whole answer within {self.timeout_s:g} s"
        except httpx2.HTTPError as error:
            kind = "no connection" if isinstance(error, httpx2.ConnectError) else "connection lost"
            answer.error, answer.detail = kind, f"{type(error).__name__} {error}".strip()
        answer.ended_s = perf_counter()

    async def _ask(self, text: str, max_tokens: int, answer: Answer) -> None:
        path, body = self._request(text, max_tokens)
        usage: dict[str, Any] = {}
        async with self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise BrokenAnswer(f"HTTP {response.status_code}", _message(await response.aread()))
            async for event in _events(response):
                usage = event.get("usage") or usage
                if _text_of(event, self.api):
                    answer.pieces_s.append(perf_counter())
        answer.output_tokens = int(usage.get("completion_tokens", len(answer.pieces_s)))
        answer.prompt_tokens = int(usage.get("prompt_tokens", 0))
        answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def _request(self, text: str, max_tokens: int) -> tuple[str, dict[str, Any]]:
        body = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.api == "chat":
            return "chat/completions", body | {"messages": [{"role": "user", "content": text}]}
        return "completions", body | {"prompt": text}


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Of a stream, up to [DONE]. Raises BrokenAnswer."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # comments, empty lines, names of events
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise BrokenAnswer("bad event", data[:100]) from error
        if not isinstance(event, dict):
            raise BrokenAnswer("bad event", data[:100])
        if "error" in event:
            raise BrokenAnswer("error in the stream", _message(data.encode()))
        yield event
    raise BrokenAnswer("stream without an end")


def _text_of(event: dict[str, Any], api: Api) -> str:
    choices = event.get("choices") or [{}]
    if api == "completions":
        return choices[0].get("text") or ""
    delta = choices[0].get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or ""


def _message(body: bytes) -> str:
    """Of an error body: OpenAI's shape, or the beginning of whatever it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
