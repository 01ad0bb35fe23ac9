"""Clients of a server that are not kind: they leave in the middle, read slowly, send what is no request.

What serve_load.py and tests share. Each client asks one thing after another, chosen at random by ``WEIGHTS``. Whoever
is turned away (429) waits as long as ``Retry-After`` says, or a part of it. What is wrong is kept in words: an answer
that is not the engine's own, an error other than the one that was asked for, a 5xx of any kind.
"""

from __future__ import annotations

import asyncio
import json
import socket
import string
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from typing import Any

import httpx2

from moray.runtime.generation.request import GenerationRequest, Message
from moray.runtime.generation.runner import Runner

WEIGHTS = {"whole": 25, "stream": 30, "slow": 10, "leave a stream": 10, "leave an answer": 5, "refused": 20}
_SLOW_BUFFER_BYTES = 4096  # of a slow reader's socket: the server soon cannot send
_LONGEST_ANSWER = 96
_WORDS = [
    "import",
    "os",
    "def",
    "main",
    "argv",
    "None",
    "return",
    "self",
    "class",
    "for",
    "in",
    "range",
    "print",
    "if",
    "else",
    "try",
    "with",
    "open",
    "path",
]


@dataclass(frozen=True)
class Question:
    """A request, and what the engine alone answers to it."""

    path: str
    body: dict[str, Any]
    text: str
    num_tokens: int


@dataclass(frozen=True)
class Bad:
    """What is no request, and the status that it deserves; what takes the engine to find out may be told 429."""

    name: str
    status: int
    options: dict[str, Any]
    path: str = "/v1/completions"
    takes_engine: bool = False


@dataclass
class Found:
    """What came of a load."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind of client
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0  # of answers that came whole
    first_s: list[float] = field(default_factory=list)  # to the first token of a stream that was admitted

    def compare(self, kind: str, question: Question, texts: Sequence[str], num_tokens: int) -> None:
        """A whole answer came: is it the right one?"""
        is_right = all(text == question.text for text in texts) and num_tokens == len(texts) * question.num_tokens
        self.outcomes[kind, "right" if is_right else "wrong"] += 1
        self.num_tokens += num_tokens
        if not is_right:
            told = f"{num_tokens} tokens {texts!r}, not {question.num_tokens} {question.text!r}"
            self.wrong.append(f"{kind}: {told}")

    def fail(self, kind: str, words: str) -> None:
        self.outcomes[kind, "failed"] += 1
        self.wrong.append(f"{kind}: {words}")


def make_questions(runner: Runner, model: str, count: int, random: Random) -> list[Question]:
    """Prompts of 1 to about 700 tokens, answers of 1 to 96, half of them chats; some begin alike. Greedy."""
    common, questions = _text(random, 200), []
    for number in range(count):
        text = (common if number % 4 == 0 else "") + _text(random, random.choice((1, 8, 40, 300)))
        length = random.choice((1, 5, 24, _LONGEST_ANSWER))
        body: dict[str, Any] = {"model": model, "max_tokens": length, "temperature": 0}
        prompt: Any = text
        if number % 2:
            body["messages"], prompt = [{"role": "user", "content": text}], [Message("user", text)]
        else:
            body["prompt"] = text
        made = list(runner.stream(GenerationRequest("alone", runner.encode(prompt), length)))
        whole, num_tokens = "".join(event.text for event in made), sum(len(event.token_ids) for event in made)
        path = "/v1/chat/completions" if number % 2 else "/v1/completions"
        questions.append(Question(path, body, whole, num_tokens))
    return questions


def _text(random: Random, num_words: int) -> str:
    return "".join(random.choice(_WORDS) + random.choice(" \n(_") for _ in range(num_words))


def bad_requests(model: str, max_body_bytes: int) -> list[Bad]:
    body = {"model": model, "prompt": "import os", "max_tokens": 2}
    is_json = {"Content-Type": "application/json"}
    return [
        Bad("half of JSON", 400, {"content": json.dumps(body)[:-9], "headers": is_json}),
        Bad("no text", 400, {"content": b"\xff\xfe\x00", "headers": is_json}),
        Bad("brackets", 400, {"content": b"[" * 5000, "headers": is_json}),
        Bad("a list", 400, {"json": [body]}),
        Bad("unknown field", 400, {"json": body | {"min_p": 0.1}}),
        Bad("wrong type", 400, {"json": body | {"max_tokens": "2"}}),
        Bad("too long a context", 400, {"json": body | {"max_tokens": 10**6}}, takes_engine=True),
        Bad("another model", 404, {"json": body | {"model": "gpt-4"}}),
        Bad("no such path", 404, {"json": body}, "/v1/nothing"),
        Bad("wrong key", 401, {"json": body, "headers": {"Authorization": "Bearer moray-wrong"}}),
        Bad("large", 413, {"json": body | {"prompt": "x" * max_body_bytes}}),
        Bad("large, of unknown length", 413, {"content": (max_body_bytes // 1000, b" " * 2000)}),
    ]


class Load:
    """So many clients at one server."""

    def __init__(
        self, url: str, key: str, questions: Sequence[Question], bad: Sequence[Bad], seed: int, num_clients: int
    ) -> None:
        self.found = Found()
        self._url, self._key, self._questions, self._bad = url, key, questions, bad
        self._seed, self._num_clients = seed, num_clients

    async def run(self, seconds: float) -> Found:
        """All clients until the time is over; each ends what it has begun."""
        ends_s = perf_counter() + seconds
        await asyncio.gather(*(self._client(number, ends_s) for number in range(self._num_clients)))
        return self.found

    async def _client(self, number: int, ends_s: float) -> None:
        random = Random(self._seed * 1000 + number)
        acts: dict[str, Callable[[httpx2.AsyncClient, str, Random], Awaitable[None]]] = {
            "whole": self._whole,
            "stream": self._stream,
            "slow": self._stream,
            "leave a stream": self._leave_stream,
            "leave an answer": self._leave_answer,
            "refused": self._refused,
        }
        async with self._connect(None) as http, self._connect(_SLOW_BUFFER_BYTES) as slow:
            while perf_counter() < ends_s:
                (kind,) = random.choices(list(WEIGHTS), list(WEIGHTS.values()))
                try:
                    await acts[kind](slow if kind == "slow" else http, kind, random)
                except httpx2.HTTPError as error:
                    self.found.fail(kind, f"{type(error).__name__} {error}")

    def _connect(self, buffer_bytes: int | None) -> httpx2.AsyncClient:
        options = [] if buffer_bytes is None else [(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)]
        return httpx2.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=None,
            transport=httpx2.AsyncHTTPTransport(socket_options=options),
        )

    async def _whole(self, http: httpx2.AsyncClient, kind: str, random: Random) -> None:
        question, count = random.choice(self._questions), random.choice((1, 1, 1, 2))
        answer = await http.post(question.path, json=question.body | {"n": count})
        if answer.status_code != 200:
            await self._turned_away(kind, answer, random)
            return
        made = answer.json()
        texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in made["choices"]]
        self.found.compare(kind, question, texts, made["usage"]["completion_tokens"])

    async def _stream(self, http: httpx2.AsyncClient, kind: str, random: Random) -> None:
        question, started = random.choice(self._questions), perf_counter()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", question.path, json=question.body | options) as answer:
            if answer.status_code != 200:
                await self._turned_away(kind, answer, random)
                return
            text, num_tokens, is_whole = "", 0, False
            async for event in _events(answer):
                if event is None:
                    is_whole = True
                elif "error" in event:
                    self.found.fail(kind, f"an error in the stream: {event['error']}")
                    return
                else:
                    if not text and event["choices"]:
                        self.found.first_s.append(perf_counter() - started)
                    num_tokens = (event["usage"] or {}).get("completion_tokens", num_tokens)
                    for choice in event["choices"]:
                        text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                if kind == "slow":
                    await asyncio.sleep(random.uniform(0, 0.2))
        if is_whole:
            self.found.compare(kind, question, [text], num_tokens)
        else:
            self.found.fail(kind, f"a stream without an end after {text!r}")

    async def _leave_stream(self, http: httpx2.AsyncClient, kind: str, random: Random) -> None:
        question, left = random.choice(self._questions), random.choice((0, 1, 3, 10))
        async with http.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
            if answer.status_code != 200:
                await self._turned_away(kind, answer, random)
                return
            async for event in _events(answer):
                if event and "error" in event:
                    self.found.fail(kind, f"an error in the stream: {event['error']}")
                    return
                left -= 1
                if left < 0:
                    break
        self.found.outcomes[kind, "left"] += 1

    async def _leave_answer(self, http: httpx2.AsyncClient, kind: str, random: Random) -> None:
        question = random.choice(self._questions)
        try:
            answer = await http.post(question.path, json=question.body, timeout=random.uniform(0.01, 0.5))
        except httpx2.TimeoutException:
            self.found.outcomes[kind, "left"] += 1
            return
        if answer.status_code == 200:
            self.found.outcomes[kind, "came before"] += 1
        else:
            await self._turned_away(kind, answer, random)

    async def _refused(self, http: httpx2.AsyncClient, kind: str, random: Random) -> None:
        bad = random.choice(self._bad)
        options = dict(bad.options)
        if isinstance(pieces := options.get("content"), tuple):
            options["content"] = _pieces(*pieces)
        answer = await http.post(bad.path, **options)
        if bad.takes_engine and answer.status_code == 429:
            await self._turned_away(kind, answer, random)
        elif answer.status_code == bad.status and set(answer.json()["error"]) == {"message", "type", "param", "code"}:
            self.found.outcomes[kind, str(bad.status)] += 1
        else:
            self.found.fail(kind, f"{bad.name}: {answer.status_code} {answer.text[:200]}, expected {bad.status}")

    async def _turned_away(self, kind: str, answer: httpx2.Response, random: Random) -> None:
        told = (await answer.aread()).decode(errors="replace")
        wait = answer.headers.get("Retry-After", "")
        if answer.status_code != 429 or not set(wait) <= set(string.digits) or not 1 <= int(wait or 0) <= 60:
            self.found.fail(kind, f"{answer.status_code}, Retry-After {wait!r}: {told[:200]}")
            return
        self.found.outcomes[kind, "429"] += 1
        await asyncio.sleep(random.uniform(0.1, 1) * min(int(wait), 2))  # few have patience


async def _events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any] | None]:
    """Of a stream; None: [DONE]."""
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            yield None
        elif line:
            yield json.loads(line.removeprefix("data: "))


async def _pieces(count: int, piece: bytes) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield piece
