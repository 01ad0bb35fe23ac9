"""The OpenAI-compatible server on Ray Serve: one instance, asked by real clients over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from time import sleep

import httpx2
import openai
import pytest
import ray
import yaml
from helpers.reference import runner
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from rich.console import Console

from moray.actors.calls import call
from moray.actors.spawn import find_kept
from moray.deploy.app import build
from moray.deploy.config import demo_store
from moray.deploy.serving.args import ServeArgs, make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.keeper import KEEPER
from moray.deploy.serving.keys import add_key, remove_key
from moray.runtime.generation.request import GenerationRequest, Message, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from load_clients import Load, bad_requests, make_questions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

MODEL = "moray-demo"
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
CHAT = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def main(argv=None):"}]
JSON = {"Content-Type": "application/json"}
MOST = 12
SERVE_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.yaml"))


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    keys: Path

    def post(self, path: str, **options: object) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        return httpx2.post(self.url + path, headers=headers, timeout=120, **options)

    def complete(self, **body: object) -> httpx2.Response:
        return self.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT, "temperature": 0} | body)

    @property
    def args(self) -> dict[str, object]:
        return {"hosts": 2, "threads": 2, "api_keys": self.keys, "max_requests": MOST, "max_body": "100KB"}


@pytest.fixture(scope="module")
def server(session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    key = add_key(keys, "tests")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(f"http://127.0.0.1:{port}", key, keys)
    with serving(make_args(made.args), "127.0.0.1", port, Console(quiet=True)):
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def local() -> Iterator[Runner]:
    with runner(demo_store(), "int8") as made:
        yield made


def expected(local: Runner, prompt: object, count: int, stop: tuple[str, ...] = (), **sampling: object) -> TokenEvent:
    """The text, the tokens and their log-probabilities of one process without Ray, as one event."""
    request = GenerationRequest("expected", local.encode(prompt), count, SamplingParams(**sampling), stop)
    events = list(local.stream(request))
    return TokenEvent(
        "expected",
        tuple(i for event in events for i in event.token_ids),
        "".join(event.text for event in events),
        events[-1].finished,
        tuple(entry for event in events for entry in event.log_probs),
    )


# --------------------------------------------------------------------------------------- clients


def test_the_official_client_gets_the_engine_s_tokens(client: openai.OpenAI, local: Runner) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moray"
    turns = [Message(**turn) for turn in CHAT]
    for options in ({"temperature": 0}, {"temperature": 1, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5}):
        answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=30, **options)
        same = expected(local, turns, 30, **options)
        assert answer.choices[0].message.content == same.text
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(local.encode(turns)), 30)
        assert answer.choices[0].finish_reason == "length"
    again = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_streams_are_the_whole_in_pieces(client: openai.OpenAI, local: Runner) -> None:
    same = expected(local, PROMPT, 120)
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=120,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == same.text
    # Tokens that wait while the server is busy share a chunk, so how many chunks there are depends on the machine.
    assert sum(bool(choice.text) for chunk in chunks for choice in chunk.choices) > 1
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [120]
    assert not chunks[-1].choices and chunks[-2].choices[0].finish_reason == "length"
    stopped = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=["main", "zzz"])
    assert stopped.choices[0].text == same.text.split("main")[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_choices_and_prompts_side_by_side(server: Server, local: Runner) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
            options = {"model": MODEL, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 3}
            whole, stream = await asyncio.gather(
                client.completions.create(prompt=[PROMPT, "def "], **options),
                client.chat.completions.create(messages=CHAT, stream=True, **options),
            )
            texts = ["", "", ""]
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            return [choice.text for choice in whole.choices], texts

    whole, streamed = asyncio.run(ask())
    seeds = [{"temperature": 1, "seed": seed} for seed in (3, 4, 5)]
    assert whole == [expected(local, prompt, 12, **seed).text for prompt in (PROMPT, "def ") for seed in seeds]
    assert streamed == [expected(local, [Message(**turn) for turn in CHAT], 12, **seed).text for seed in seeds]


def test_log_probs_are_the_model_s(client: openai.OpenAI, local: Runner) -> None:
    banned = expected(local, PROMPT, 1).token_ids[0]
    options = {"logit_bias": ((banned, -100.0),), "num_log_probs": 2}
    same = expected(local, PROMPT, 20, **options)
    body = {"model": MODEL, "max_tokens": 20, "temperature": 0, "logit_bias": {str(banned): -100}}
    text = client.completions.create(prompt=PROMPT, logprobs=2, **body).choices[0]
    assert text.text == same.text == "".join(text.logprobs.tokens)
    assert text.logprobs.token_logprobs == pytest.approx([entry.log_prob for entry in same.log_probs], abs=1e-4)
    assert all(
        same.text[at:].startswith(token)
        for at, token in zip(text.logprobs.text_offset, text.logprobs.tokens, strict=True)
    )
    assert all(len(top) == 2 for top in text.logprobs.top_logprobs)
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **body).choices[0]
    entries = chat.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == chat.message.content
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    # What was most likely is the first of the top, unless it was banned.
    tops = [entry.top_logprobs[0] for entry in entries]
    assert all(
        entry.token == top.token or entry.logprob < top.logprob for entry, top in zip(entries, tops, strict=True)
    )


@pytest.mark.long
def test_langchain_works_unchanged(server: Server, local: Runner) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key=server.key, temperature=0, max_tokens=16, max_retries=0
    )
    same = expected(local, [Message(**turn) for turn in CHAT], 16).text
    turns = [(turn["role"], turn["content"]) for turn in CHAT]
    answer = model.invoke(turns)
    assert answer.content == same and answer.usage_metadata["output_tokens"] == 16
    assert "".join(chunk.content for chunk in model.stream(turns)) == same


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # its own
def test_litellm_works_unchanged(server: Server, local: Runner) -> None:
    litellm = pytest.importorskip("litellm")
    options = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": server.key}
    options |= {"messages": CHAT, "temperature": 0, "max_tokens": 16, "num_retries": 0}
    same = expected(local, [Message(**turn) for turn in CHAT], 16).text
    assert litellm.completion(**options).choices[0].message.content == same
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **options)]
    assert "".join(pieces) == same


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "does not exist"),
        ({"tools": []}, 400, "tools", "not supported"),
        ({"max_tokens": "7"}, 400, "max_tokens", "integer"),
        ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
        ({"prompt": [1, 999_999]}, 400, None, "not in the vocabulary"),
        ({"prompt": "x " * 3000}, 400, None, "context"),
        ({"max_tokens": 2040}, 400, None, "the context holds 2048 tokens"),
        ({"n": MOST + 1}, 400, "n", f"at most {MOST}"),
        ({"logit_bias": {"1000000": 1}}, 400, None, "not in the vocabulary"),
    ],
)
def test_what_is_wrong_is_said_in_openai_s_shape(
    server: Server, body: dict[str, object], status: int, param: str | None, words: str
) -> None:
    answer = server.complete(**body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"]
    assert server.complete(stream=True, **body).status_code == status  # before the stream begins


def test_bodies_that_are_no_requests_are_refused(server: Server) -> None:
    for content in (b"{", b"", b"\xff\xfe", b"[1]", b"null", b"[" * 5000, b'{"model": NaN}'):
        answer = server.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    half = server.post("/v1/completions", content=b'{"model": "moray-demo", "prompt": "\\ud800"}', headers=JSON)
    assert half.status_code == 400 and half.json()["error"]["param"] == "prompt"
    assert "stream: true" in server.complete(stream_options={"include_usage": True}).json()["error"]["message"]
    document = json.dumps({"model": MODEL, "prompt": PROMPT})
    assert server.post("/v1/completions", content=document, headers={"Content-Type": "text/plain"}).status_code == 400
    assert server.complete(prompt="x" * 120_000).status_code == 413
    pieces = (b" " * 10_000 for _ in range(12))  # without a length
    assert server.post("/v1/completions", content=pieces).status_code == 413
    assert server.post("/v1/nothing").status_code == 404
    assert (
        httpx2.get(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {server.key}"}).status_code == 405
    )


def test_keys_are_asked_for_and_can_be_taken_away(server: Server) -> None:
    other = add_key(server.keys, "other")
    url = f"{server.url}/v1/models"
    statuses = [
        httpx2.get(url, headers=headers).status_code
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {other}x"},
            {"Authorization": f"Basic {other}"},
            {"Authorization": f"Bearer {other}"},
        )
    ]
    assert statuses == [401, 401, 401, 401, 200]
    remove_key(server.keys, "other")
    refused = httpx2.get(url, headers={"Authorization": f"Bearer {other}"})
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    preflight = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    allowed = httpx2.options(f"{server.url}/v1/completions", headers=preflight).headers
    assert "access-control-allow-origin" not in allowed


# ---------------------------------------------------------------------------------------- limits


def test_who_leaves_frees_the_engine_and_more_than_it_takes_is_turned_away(server: Server) -> None:
    long = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1900, "temperature": 0}
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=120) as http:
        streams = [http.stream("POST", "/v1/completions", json=long | {"stream": True, "n": 6}) for _ in range(2)]
        opened = [stream.__enter__() for stream in streams]
        lines = [response.iter_lines() for response in opened]
        assert [next(line)[:5] for line in lines] == ["data:"] * 2
        refused = server.complete(max_tokens=1)
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        for stream in streams:
            stream.__exit__(None, None, None)
    _wait_until_idle(server)
    assert server.complete(max_tokens=1, n=MOST).status_code == 200  # all places are free
    with pytest.raises(httpx2.ReadTimeout):  # not streamed: nobody waits for the answer any more
        httpx2.post(f"{server.url}/v1/completions", json=long | {"n": MOST}, headers=headers, timeout=0.5)
    _wait_until_idle(server)
    assert server.complete(max_tokens=1, n=MOST).status_code == 200


def _wait_until_idle(server: Server) -> None:
    """The engine computes nothing more, long before 12 answers of 1,900 tokens would have ended."""
    stats, count = _engine(server).compute.stats, -1
    for _ in range(20):
        sleep(0.1)
        before, count = count, call(stats).experts.layer_calls
        if count == before:
            return
    raise AssertionError("the engine goes on though nobody listens")


def test_unkind_clients_get_what_they_deserve(server: Server, local: Runner) -> None:
    """Twenty for some seconds: all answers are the engine's own, all refusals the right ones, and all places free.

    Where a busy machine lets so few of them ask at once that nobody is turned away, more.
    """
    questions, bad = make_questions(local, MODEL, 8, Random(1)), bad_requests(MODEL, 100_000)
    seen: set[str] = set()
    for num_clients in (20, 40, 80):
        found = asyncio.run(Load(server.url, server.key, questions, bad, 1, num_clients).run(3))
        assert found.wrong == []
        seen |= {how for _, how in found.outcomes}
        if "429" in seen:
            break
    assert seen >= {"right", "left", "429", "400"}
    _wait_until_idle(server)
    assert server.complete(max_tokens=1, n=MOST).status_code == 200


@pytest.mark.long
def test_the_document_is_true(server: Server) -> None:
    """Nothing that schemathesis makes of our OpenAPI document is answered with a 5xx or against the document."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    wanted += [checks.response_schema_conformance, checks.negative_data_rejection]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    count = 0
    settled = settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    modes = schemathesis.GenerationMode
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in (modes.POSITIVE, modes.NEGATIVE) if operation.body else (modes.POSITIVE,):

            @settled
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: object) -> None:
                nonlocal count
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body |= {"model": MODEL}  # or most would end at that
                    case.body.setdefault("max_tokens", 3)
                case.call_and_validate(headers={"Authorization": f"Bearer {server.key}"}, checks=wanted)
                count += 1

            ask()
    assert count > 50


def test_a_new_version_of_the_server_drops_nothing(server: Server, local: Runner) -> None:
    """The stream that runs ends as it would have, the engine is the same, and new limits hold."""
    before = _engine(server).compute
    same = expected(local, PROMPT, 400)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {server.key}"}
    with (
        httpx2.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=120) as response,
        ThreadPoolExecutor() as pool,
    ):
        lines = response.iter_lines()
        started = list(islice(lines, 4))
        args = make_args(server.args | {"request_timeout_s": 0.05})
        replaced = pool.submit(ray.serve.run, build(args), name="moray", route_prefix="/")
        chunks = [json.loads(line[6:]) for line in [*started, *lines] if line and line != "data: [DONE]"]
        replaced.result()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == same.text
    assert _engine(server).compute == before
    late = server.complete(max_tokens=1900)
    assert late.status_code == 503 and late.json()["error"]["code"] == "deadline"
    lines = server.complete(max_tokens=1900, stream=True).text.strip().splitlines()
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline"


@pytest.mark.parametrize("file", SERVE_CONFIGS, ids=lambda file: file.stem)
def test_deployments_are_built_as_serve_builds_them(file: Path) -> None:
    for application in ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications:
        made = call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
        (args,) = made._bound_deployment.init_args
        assert args == ServeArgs.model_validate(application.args)
        assert made._bound_deployment.ray_actor_options["label_selector"] == {"role": "compute"}
        assert args.engine.nodes.keys() == application.args.get("nodes", {}).keys()


def _engine(server: Server) -> object:
    args = make_args(server.args)
    return call(find_kept(KEEPER).ensure, args.engine, args.linger_s)
