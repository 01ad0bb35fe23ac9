"""``moray bench serve`` against a small server whose answers are known, its failures included."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from moray.deploy.bench.serve import Load, ServeReport, measure_server
from moray.deploy.bench.serve_client import Answer, Endpoint
from moray.deploy.bench.serve_report import make_document
from moray.deploy.cli import app
from moray.runtime.errors import ClusterError, ConfigError

KEY = "secret"
PIECES = 4
KINDS = ("whole", "429", "whole", "error", "cut", "lost", "bad", "empty", "shape")
ERRORS = {"HTTP 429", "error in the stream", "stream without an end", "connection lost", "bad event", "no text"}
LOAD = Load("", "completions", None, 400.0, 3 * len(KINDS), None, 30, 8, 1, 60.0)


class Tiny:
    """Answers in turn with each of ``kinds``. A word is 2 tokens, a prompt 3 more."""

    def __init__(self, *kinds: str) -> None:
        self.kinds, self.count, self.prompts = kinds, 0, []
        self.api = FastAPI()
        self.api.get("/v1/models")(self.models)
        self.api.post("/v1/{path:path}")(self.answer)

    async def models(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def answer(self, path: str, request: Request) -> Response:
        body = await request.json()
        text = body["prompt"] if path == "completions" else body["messages"][0]["content"]
        if body["max_tokens"] == 1:
            return StreamingResponse(self.stream("whole", path, text))
        kind = self.kinds[self.count % len(self.kinds)]
        self.count += 1
        self.prompts.append(text)
        if kind == "429":
            return JSONResponse({"error": {"message": "too many"}}, 429)
        return StreamingResponse(self.stream(kind, path, text))

    async def stream(self, kind: str, path: str, text: str) -> AsyncIterator[str]:
        piece = {"text": "ab"} if path == "completions" else {"delta": {"content": "ab"}}
        for index in range(0 if kind == "empty" else PIECES):
            await asyncio.sleep(0.002)
            yield f": a comment\n\ndata: {json.dumps({'choices': [piece]})}\n\n"
            if index == 1 and kind == "lost":
                raise ConnectionError("lost")
        if kind == "error":
            yield 'data: {"error": {"message": "broken"}}\n\n'
        if kind in ("bad", "shape"):
            yield "data: {nonsense\n\n" if kind == "bad" else 'data: {"choices": 7}\n\n'
        if kind == "cut":
            return
        usage = {"prompt_tokens": 3 + 2 * len(text.split()), "completion_tokens": 2 * PIECES}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


class Running:
    """A server of its own thread."""

    def __init__(self, tiny: Tiny) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(tiny.api, log_level=60, lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> str:
        self.thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture
def every_kind() -> Iterator[tuple[Tiny, str]]:
    tiny = Tiny(*KINDS)
    with Running(tiny) as url:
        yield tiny, url


def check_counts(report: ServeReport, tiny: Tiny) -> None:
    rounds = len(report.answers) // len(KINDS)
    assert tiny.count == len(report.answers) and len(report.good) == 2 * rounds
    assert report.errors == {kind: rounds * (2 if kind == "bad event" else 1) for kind in ERRORS}
    assert report.output_tokens == 2 * PIECES * len(report.good)
    assert {answer.prompt_tokens for answer in report.good} <= {29, 30, 31}
    assert {len(text.split()) for text in tiny.prompts} <= {13, 14}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_every_answer_and_every_failure_is_counted(api: str, every_kind: tuple[Tiny, str]) -> None:
    tiny, url = every_kind
    report = asyncio.run(measure_server(replace(LOAD, url=url, api=api), KEY))
    check_counts(report, tiny)
    document = make_document(report)
    assert document["requests"] == len(report.answers) == document["answered"] + sum(document["errors"].values())
    for name in ("first_token_s", "gap_s", "per_token_s", "whole_s", "late_s"):
        found = document[name]
        assert 0 <= found["p50"] <= found["p90"] <= found["p99"] and found["mean"] > 0
    assert document["gap_s"]["count"] == (PIECES - 1) * len(report.good)
    for answer in report.answers:
        assert answer.arrived_s <= answer.sent_s <= answer.ended_s
        assert all(a <= b for a, b in pairwise((answer.sent_s, *answer.pieces_s, answer.ended_s)))


def test_the_command_prints_draws_and_fails_clearly(every_kind: tuple[Tiny, str], tmp_path: Path) -> None:
    tiny, url = every_kind
    base = ["bench", "serve", url, "--rate", "400", "--prompt-tokens", "30", "--output-tokens", "8"]
    run, picture = CliRunner(env={"OPENAI_API_KEY": KEY}).invoke, tmp_path / "load.png"
    done = run(app, [*base, "--requests", str(len(KINDS)), "--plot", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["requests"], document["answered"], document["output_tokens"]) == (len(KINDS), 2, 4 * PIECES)
    assert KEY not in done.stdout and picture.read_bytes().startswith(b"\x89PNG")
    text = run(app, [*base, "--requests", "9"])
    assert "answered    2 of 9 requests" in text.stdout and "1 x HTTP 429" in text.stdout
    assert "gap: seconds between one piece of text and the next" in text.stdout
    tiny.kinds = ("429",)
    for more, code, words in [
        (["--requests", "2"], 1, "none of 2 requests was answered; the first said: HTTP 429: too many"),
        (["--requests", "2", "--api-key", "wrong"], 1, "models gave HTTP 401"),
        (["--requests", "2", "--seconds", "2"], 2, "either --requests or --seconds is needed, not both"),
        (["--requests", "0"], 2, "--requests is 0, expected more than 0"),
        (["--requests", "2", "--plot", str(tmp_path / "none" / "a.png")], 2, "no such directory"),
    ]:
        failed = run(app, [*base, *more])
        assert failed.exit_code == code and words in failed.stderr and failed.stderr.count("\n") <= 2, failed.stderr
    with pytest.raises(ConfigError, match="is no address of a server"):
        replace(LOAD, url="localhost:8000").validate()
    with pytest.raises(ClusterError, match="models gave ConnectError"), socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        taken.close()
        asyncio.run(measure_server(replace(LOAD, url=closed), None))


def test_an_answer_that_never_ends_is_a_timeout() -> None:
    async def hang(request: httpx2.Request) -> httpx2.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def ask() -> Answer:
        async with httpx2.AsyncClient(base_url="http://none/v1", transport=httpx2.MockTransport(hang)) as client:
            await Endpoint(client, "chat", "m", 0.05).ask("hello", 5, answer := Answer(0.0))
            return answer

    assert asyncio.run(ask()).error == "timeout"


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    load = replace(LOAD, url="http://h", rate=50.0, requests=20_000)
    due = load.arrivals_s()
    assert due == load.arrivals_s() != replace(load, seed=2).arrivals_s()
    gaps = [after - before for before, after in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert len(due) == 20_000 and due[0] == 0 and min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.05) and variance == pytest.approx(mean**2, rel=0.1)
    timed = replace(load, requests=None, seconds=100.0).arrivals_s()
    assert max(timed) < 100 and 4500 < len(timed) < 5500
