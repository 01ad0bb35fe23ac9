"""Requests are counted, timed and logged, each as one line of JSON with its id."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from time import monotonic
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moray.deploy.serving.records import RequestRecord, set_current
from moray.runtime.errors import ConfigError

REQUEST_ID = "x-request-id"


class RequestMetrics(Protocol):
    """Where requests are counted."""

    def note_request(self, record: RequestRecord) -> None: ...


class Observer:
    """ASGI middleware, the outermost.

    The id is the caller's ``x-request-id``. Serve's proxy gives one to requests that have none, and puts it into the
    answer.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, log: logging.Logger) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord.make(Headers(scope=scope).get(REQUEST_ID), scope["method"], scope["path"])
        set_current(record)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.is_complete = True

        try:
            await self._app(scope, receive, observed)
        except asyncio.CancelledError:  # how Serve tells that the client has left
            raise
        except Exception:
            record.has_failed, record.status = True, 500
            raise
        finally:
            self._end(record)

    def _end(self, record: RequestRecord) -> None:
        record.ended_s = monotonic()
        if record.method == "GET" and record.outcome in ("ok", "gone"):
            return  # health checks and pages would hide the requests for text
        self._metrics.note_request(record)
        self._log.info(line_of(record))


def line_of(record: RequestRecord) -> str:
    """One line of JSON: docs/metrics.md has its fields."""
    token_s = record.token_s
    fields = {
        "time": datetime.fromtimestamp(record.started_at, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "outcome": record.outcome,
        "choices": record.num_choices,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "first_token_s": _rounded(record.first_token_s),
        "per_token_s": _rounded(sum(token_s) / len(token_s) if token_s else None),
        "seconds": _rounded(record.seconds),
    }
    return json.dumps(fields, separators=(",", ":"))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def open_log(path: Path | None) -> logging.Logger:
    """The log of requests: appended to a file, which may be moved away meanwhile, or on standard error.

    Raises ConfigError if the file cannot be written.
    """
    try:
        handler = logging.StreamHandler() if path is None else WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file for request_log") from error
    log = logging.getLogger("moray.requests")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return log
