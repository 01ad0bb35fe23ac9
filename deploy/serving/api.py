"""The HTTP application: OpenAI's endpoints over a ``Service``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from moray import __version__
from moray.deploy.serving import answers
from moray.deploy.serving.answers import Collected, Head
from moray.deploy.serving.errors import ErrorBody, api_error, install_handlers
from moray.deploy.serving.gate import Gate
from moray.deploy.serving.keys import KeyFile
from moray.deploy.serving.openapi import describe
from moray.deploy.serving.page_files import add_page
from moray.deploy.serving.requests import ChatRequest, CompletionRequest
from moray.deploy.serving.service import Job, Service
from moray.deploy.serving.state import EngineState


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """Answer of GET /health."""

    status: str


def make_api(service: Service, keys: KeyFile | None) -> FastAPI:
    """The application of one server. Without ``keys`` it answers callers on this machine only."""
    api = FastAPI(title="moray", version=__version__, docs_url=None, redoc_url=None)
    args = service.args
    api.add_middleware(Gate, keys=keys, max_body_bytes=args.max_body_bytes)
    install_handlers(api)
    started = Head.make("model", args.served_name, service.fingerprint).created
    model = Model(id=args.served_name, object="model", created=started, owned_by="moray")

    @api.get("/health", responses=_errors(503), response_model=Health)
    async def health() -> Response:
        """Whether the engine answers."""
        await service.health()
        return JSONResponse({"status": "ok"})

    @api.get("/v1/models", responses=_errors(), response_model=ModelList)
    async def list_models() -> Response:
        """The one model of this server."""
        return _json(ModelList(object="list", data=[model]))

    @api.get("/v1/models/{name:path}", responses=_errors(404), response_model=Model)
    async def show_model(name: str) -> Response:
        """One model by its name."""
        service.check_model(name)
        return _json(model)

    @api.post("/v1/chat/completions", responses=_generating(ChatCompletion), response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest) -> Response:
        """The next turn of a chat."""
        return await _respond(service, body, Head.make("chatcmpl", args.served_name, service.fingerprint))

    @api.post("/v1/completions", responses=_generating(Completion), response_model=Completion)
    async def completions(body: CompletionRequest) -> Response:
        """What follows a text."""
        return await _respond(service, body, Head.make("cmpl", args.served_name, service.fingerprint))

    @api.get("/state", responses=_errors(503), response_model=EngineState)
    async def state() -> Response:
        """What the page shows of the engine."""
        view = await service.view()
        found = EngineState.of(view, args.served_name, service.num_taken, args.max_requests)
        return Response(found.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})

    add_page(api)
    describe(api, has_keys=keys is not None)
    return api


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Errors an endpoint may answer with, besides those of the gate: 401, 403 and 413."""
    return {code: {"model": ErrorBody} for code in (401, 403, 413, *codes)}


def _generating(kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    answer = {
        "description": "The answer; with stream: true, server-sent events, each a chunk as OpenAI defines it or an "
        "error body, the last [DONE] if there was no error.",
        "content": {"text/event-stream": {}},
    }
    return _errors(400, 404, 429, 500, 503) | {200: answer}


def _json(answer: BaseModel) -> Response:
    """What was set is sent, nulls included, as OpenAI does."""
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


async def _respond(service: Service, body: ChatRequest | CompletionRequest, head: Head) -> Response:
    job = await service.begin(body)
    if body.stream:
        return _EventStream(job, _events(job, body, head))
    try:
        choices = [Collected() for _ in job.generations]
        async with aclosing(job.events()) as events:
            async for found in events:
                choices[found.index].add(found.event)
    finally:
        job.close()
    make: Any = answers.chat_answer if isinstance(body, ChatRequest) else answers.text_answer
    return _json(make(head, choices, job.vocabulary, _usage(job, choices)))


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which is closed even if nothing was ever sent."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _events(job: Job, body: ChatRequest | CompletionRequest, head: Head) -> AsyncIterator[str]:
    """The chunks of a streamed answer. An error after the first is told in the stream."""
    is_chat = isinstance(body, ChatRequest)
    choices = [Collected() for _ in job.generations]
    started: set[int] = set()
    try:
        async with aclosing(job.events()) as events:
            async for found in events:
                event, index = found.event, found.index
                choice = choices[index]
                choice.text, choice.log_probs, choice.finished = event.text, list(event.log_probs), event.finished
                if not event.text and not event.log_probs and event.finished is None:
                    continue  # half a character, or the beginning of what may be a stop string
                chunk: BaseModel
                if is_chat:
                    chunk = answers.chat_chunk(head, index, choice, job.vocabulary, is_first=index not in started)
                else:
                    chunk = answers.text_chunk(head, index, choice, job.vocabulary)
                started.add(index)
                yield _event(chunk, body.includes_usage)
        if body.includes_usage:
            usage = _usage(job, choices)
            last = answers.chat_usage_chunk(head, usage) if is_chat else answers.text_usage_chunk(head, usage)
            yield _event(last, False)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {ErrorBody.model_validate(api_error(error).body).model_dump_json()}\n\n"


def _event(chunk: BaseModel, has_null_usage: bool) -> str:
    text = chunk.model_dump_json(exclude_unset=True)
    return f'data: {text[:-1]},"usage":null}}\n\n' if has_null_usage else f"data: {text}\n\n"


def _usage(job: Job, choices: list[Collected]) -> CompletionUsage:
    finished = [choice.finished for choice in choices if choice.finished is not None]
    assert len(finished) == len(choices)
    return answers.usage_of(finished, job.num_choices)
