"""The server's parts that need no engine: who may ask, keys, arguments, requests, their OpenAPI document."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.deploy.serving.args import ServeArgs, make_args
from moray.deploy.serving.gate import Gate
from moray.deploy.serving.keys import KeyFile, add_key, read_keys, remove_key
from moray.deploy.serving.requests import ChatRequest, CompletionRequest
from moray.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(body)(scope, receive, send)


def ask(gate: Gate, client: str, host: str, body: bytes = b"hello") -> int:
    made = TestClient(gate, base_url=f"http://{host}", client=(client, 5000))
    answer = made.post("/v1/completions", content=body)
    assert answer.content == body or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code


def test_without_keys_only_this_machine_is_answered_under_its_own_name() -> None:
    gate = Gate(echo, None, 100)
    for client, host in [("127.0.0.1", "localhost:8000"), ("::1", "[::1]:8000"), ("127.0.0.9", "127.0.0.1")]:
        assert ask(gate, client, host) == 200
    for client, host in [("10.0.0.7", "localhost"), ("127.0.0.1", "evil.example"), ("127.0.0.1", "10.0.0.1:8000")]:
        assert ask(gate, client, host) == 403
    assert ask(gate, "127.0.0.1", "localhost", b"x" * 101) == 413


def test_a_caller_without_address_is_no_neighbour() -> None:
    sent: list[int] = []

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "path": "/v1/models", "method": "GET", "headers": [(b"host", b"localhost")]}
    asyncio.run(Gate(echo, None, 100)(scope | {"client": None}, receive, send))
    assert sent == [403]


def test_keys_are_kept_as_hashes_in_a_file_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    keys = {name: add_key(file, name) for name in ("alice", "bob@host-1")}
    assert file.stat().st_mode & 0o777 == 0o600
    assert not any(key in file.read_text() for key in keys.values())
    opened = KeyFile(file)
    assert [opened.owner_of(key) for key in (*keys.values(), "", "moray-", keys["alice"] + "x")] == [*keys, *[None] * 3]
    remove_key(file, "alice")
    assert opened.owner_of(keys["alice"]) is None and opened.owner_of(keys["bob@host-1"]) == "bob@host-1"
    assert list(read_keys(file)) == ["bob@host-1"] and [path.name for path in tmp_path.iterdir()] == ["keys.txt"]
    with pytest.raises(ConfigError, match="has a key named bob@host-1 already"):
        add_key(file, "bob@host-1")
    with pytest.raises(ConfigError, match="has no key named carol; it has bob@host-1"):
        remove_key(file, "carol")
    with pytest.raises(ConfigError, match="is not one to 64 letters"):
        add_key(file, "two words")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="have mode 640, expected 600; run `chmod 600"):
        KeyFile(file)
    file.chmod(0o600)
    file.write_text("alice secret\n")
    with pytest.raises(ConfigError, match=r"line 1 of the API keys .* is not NAME sha256:HEX"):
        opened.owner_of(keys["alice"])  # a damaged file lets nobody in


def test_arguments_are_the_engine_s_and_the_server_s() -> None:
    args = make_args({"hosts": 2, "max_requests": 5, "max_body": "1KiB"})
    assert args.engine.hosts == 2 and args.max_body_bytes == 1024 and args.served_name == "moray-demo"
    assert make_args({"store": demo_store()}).served_name == "store"
    for values, words in [
        ({"max_requests": 1000}, "max_requests"),
        ({"max_body": "many"}, "max_body is 'many'"),
        ({"host_memory": "some"}, "host_memory is 'some'"),
        ({"address": "10.0.0.1:6379"}, "address"),
        ({"maximum": 5}, "unknown configuration key 'maximum'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make_args(values)
    for file in (ROOT / "configs" / "serve").glob("*.yaml"):
        for application in yaml.safe_load(file.read_text())["applications"]:
            ServeArgs.model_validate(application["args"])


def test_a_server_for_other_machines_needs_keys(tmp_path: Path) -> None:
    run = CliRunner().invoke
    refused = run(app, ["serve", "--host", "0.0.0.0", "--port", "8199"])
    assert refused.exit_code == 2 and "there are no API keys" in refused.stderr
    missing = run(app, ["serve", "--api-keys", str(tmp_path / "none.txt")])
    assert missing.exit_code == 2 and "cannot be read" in missing.stderr
    made = run(app, ["api-keys", "add", str(tmp_path / "keys.txt"), "alice"])
    assert made.exit_code == 0 and KeyFile(tmp_path / "keys.txt").owner_of(made.stdout.strip()) == "alice"
    assert run(app, ["api-keys", "list", str(tmp_path / "keys.txt")]).stdout.split() == ["alice"]


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": []},
        {"model": "\ud800"},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"functions": []},
        {"response_format": {"type": "json_object"}},
        {"store": True},
        {"service_tier": "flex"},
        {"n": True},
        {"n": 1.0},
        {"temperature": float("nan")},
        {"logit_bias": {"a": 1}},
        {"top_logprobs": 2},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
    ],
)
def test_what_is_not_supported_is_refused_not_ignored(more: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | more)


def test_what_asks_for_nothing_unusual_is_accepted() -> None:
    usual = {"store": False, "response_format": {"type": "text"}, "service_tier": "auto", "modalities": ["text"]}
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    request = ChatRequest.model_validate(CHAT | usual | {"messages": parts, "user": "u", "n": None, "seed": 5})
    ((message,),) = request.prompts
    assert (message.role, message.content) == ("system", "ab")
    assert [request.sampling(choice).seed for choice in (0, 2)] == [5, 7]
    assert request.sampling(0).temperature == 1 and request.max_new_tokens is None
    text = CompletionRequest.model_validate({"model": "m", "prompt": [[1, 2], [3]], "best_of": 1})
    assert text.prompts == [[1, 2], [3]] and text.max_new_tokens == 16
    assert CompletionRequest.model_validate({"model": "m", "prompt": [1, 2]}).prompts == [[1, 2]]
