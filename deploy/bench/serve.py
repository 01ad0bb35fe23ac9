"""``moray bench serve``: requests arrive at a server at random times, whether or not it has answered the last ones.

Arrivals are a Poisson process: a server that falls behind is not spared, as it is by clients that wait for an answer
before they ask again. Times count from when a request was due, so delays of this program are not hidden either.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from time import perf_counter

import httpx2
import numpy as np

from moray.deploy.bench.serve_client import Answer, Api, Endpoint
from moray.runtime.errors import ClusterError, ConfigError

PERCENTILES = (50, 90, 99)
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
)
_TRIAL_WORDS = (8, 40)  # of the requests that find out how many tokens a word is
_CONNECT_S = 10.0
_MOST_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask, and how often. Of ``requests`` and ``seconds`` one is given."""

    url: str
    api: Api
    model: str | None  # None: the first that the server lists
    rate: float  # requests a second
    requests: int | None
    seconds: float | None
    prompt_tokens: int
    output_tokens: int
    seed: int
    timeout_s: float

    def validate(self) -> None:
        """Raises ConfigError."""
        if not _is_address(self.url):
            raise ConfigError(f"{self.url!r} is no address of a server; expected one such as http://127.0.0.1:8000/v1")
        if (self.requests is None) == (self.seconds is None):
            raise ConfigError("either --requests or --seconds is needed, not both; give how long to go on")
        for option, value in (
            ("--rate", self.rate),
            ("--requests", self.requests),
            ("--seconds", self.seconds),
            ("--prompt-tokens", self.prompt_tokens),
            ("--output-tokens", self.output_tokens),
            ("--timeout", self.timeout_s),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} is {value:g}, expected more than 0")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, expected 0 or more")
        if (self.requests or self.rate * (self.seconds or 0)) > _MOST_REQUESTS:
            raise ConfigError(f"more than {_MOST_REQUESTS} requests are asked for; lower --rate or the duration")

    @property
    def base_url(self) -> str:
        """Of the API; /v1 if the address has no path."""
        url = self.url.rstrip("/")
        return f"{url}/v1" if url.count("/") == 2 else url

    def arrivals_s(self) -> list[float]:
        """Seconds from the start at which requests are due; the first at 0."""
        random = np.random.default_rng([self.seed, 0])
        if self.requests is not None:
            return [0.0, *np.cumsum(random.exponential(1 / self.rate, self.requests - 1)).tolist()]
        assert self.seconds is not None
        due, now = [], 0.0
        while now < self.seconds:
            due.append(now)
            now += float(random.exponential(1 / self.rate))
        return due


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds at some percentiles, and the mean."""

    count: int
    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, seconds: list[float]) -> Distribution | None:
        """None of nothing."""
        if not seconds:
            return None
        values = np.percentile(seconds, PERCENTILES)
        return cls(len(seconds), float(np.mean(seconds)), dict(zip(PERCENTILES, values.tolist(), strict=True)))


@dataclass(frozen=True, slots=True)
class ServeReport:
    """One run."""

    load: Load
    model: str
    answers: list[Answer]

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """How many of each kind, the most frequent first."""
        return dict(Counter(answer.error for answer in self.answers if answer.error is not None).most_common())

    @property
    def start_s(self) -> float:
        return min(answer.arrived_s for answer in self.answers)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the end of the last answer."""
        return max(answer.ended_s for answer in self.answers) - self.start_s

    @property
    def output_tokens(self) -> int:
        return sum(answer.output_tokens for answer in self.good)

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.good)

    @property
    def cached_tokens(self) -> int:
        return sum(answer.cached_tokens for answer in self.good)

    def distributions(self) -> dict[str, Distribution | None]:
        good = self.good
        return {
            "first_token_s": Distribution.of([answer.first_s for answer in good]),
            "gap_s": Distribution.of([gap for answer in good for gap in answer.gaps_s]),
            "per_token_s": Distribution.of([answer.token_s for answer in good if answer.token_s is not None]),
            "whole_s": Distribution.of([answer.ended_s - answer.arrived_s for answer in good]),
            "late_s": Distribution.of([answer.sent_s - answer.arrived_s for answer in self.answers]),
        }


async def measure_server(load: Load, key: str | None) -> ServeReport:
    """Put a load on a server. Raises ConfigError, and ClusterError if it does not answer to begin with."""
    load.validate()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(load.timeout_s, connect=min(_CONNECT_S, load.timeout_s), pool=None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(base_url=load.base_url, headers=headers, timeout=timeout, limits=limits) as client:
        endpoint = Endpoint(client, load.api, load.model or await _first_model(client), load.timeout_s)
        words = await _words_of(endpoint, load.prompt_tokens)
        texts, due_s = _Texts(load.seed), load.arrivals_s()
        start_s = perf_counter()
        answers = [Answer(start_s + due) for due in due_s]
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                await asyncio.sleep(max(0.0, answer.arrived_s - perf_counter()))
                group.create_task(endpoint.ask(texts.make(words), load.output_tokens, answer))
    return ServeReport(load, endpoint.model, answers)


def _is_address(text: str) -> bool:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


class _Texts:
    """Random words: two texts have little more than a word of their beginnings in common."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 1])

    def make(self, num_words: int) -> str:
        return " ".join(_WORDS[index] for index in self._random.integers(0, len(_WORDS), num_words))


async def _first_model(client: httpx2.AsyncClient) -> str:
    try:
        answer = await client.get("models")
        if answer.status_code == 200:
            return str(answer.json()["data"][0]["id"])
        found = f"HTTP {answer.status_code}"
    except httpx2.HTTPError as error:
        found = f"{type(error).__name__} {error}".strip()
    except (ValueError, LookupError, TypeError):
        found = "no list of models"
    where = f"{client.base_url}models"
    raise ClusterError(f"GET {where} gave {found}; check the URL and the API key, or name the model with --model")


async def _words_of(endpoint: Endpoint, prompt_tokens: int) -> int:
    """How many words make a prompt of about so many tokens, by the server's own count. Two requests, one after the
    other, which also warm it up. Raises ClusterError if they fail."""
    texts, tokens = _Texts(0), []
    for num_words in _TRIAL_WORDS:
        answer = Answer(perf_counter())
        await endpoint.ask(texts.make(num_words), 1, answer)
        if answer.error not in (None, "no text"):  # the first token may be a part of a character, or the end
            raise ClusterError(f"{endpoint.client.base_url} failed at the first request: {answer.detail}")
        tokens.append(answer.prompt_tokens)
    if tokens[1] <= tokens[0]:
        return prompt_tokens  # it tells no usage: a word a token
    rate = (tokens[1] - tokens[0]) / (_TRIAL_WORDS[1] - _TRIAL_WORDS[0])
    return max(1, round((prompt_tokens - tokens[0]) / rate) + _TRIAL_WORDS[0])
