"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from moray.deploy.serving.records import current_record
from moray.runtime.errors import InputError, MorayError, RequestError

logger = logging.getLogger("ray.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What was wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error. An HTTPException, because FastAPI lets no others through while it reads a body."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=self.detail, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error. What is not the client's doing is logged, and told in general terms."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "context" in str(error) and "holds" in str(error) else None
        return ApiError(400, str(error), code=code)
    logger.error("request %s failed", current_record().request_id, exc_info=error)
    if isinstance(error, MorayError) and not isinstance(error, InputError):
        return ApiError(503, f"the engine is not available: {error}", code="engine_unavailable")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def install_handlers(api: FastAPI) -> None:
    """Every error of an application is answered in OpenAI's shape."""

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = (
            error if isinstance(error, ApiError) else ApiError(error.status_code, error.detail, headers=error.headers)
        )
        return known.response

    async def on_other(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response

    api.add_exception_handler(RequestValidationError, on_validation)
    api.add_exception_handler(HTTPException, on_http)
    api.add_exception_handler(MorayError, on_other)
    api.add_exception_handler(Exception, on_other)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, in words."""
    found = error.errors()
    # Of a choice of types, each reports: what is wrong with the value says more than what type it is not.
    first = next((detail for detail in found if not str(detail["type"]).endswith("_type")), found[0])
    kind, message = str(first["type"]), str(first["msg"])
    param = _path(tuple(first["loc"])[1:], error.body)
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"{param or 'the body'} is missing", param=param, code="missing_required_parameter")
    if param is None and kind in ("model_attributes_type", "dict_type"):
        return ApiError(400, "the body is not a JSON object with Content-Type: application/json", code="invalid_json")
    message = message.removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _path(location: tuple[Any, ...], body: Any) -> str | None:
    """``messages.0.content``: the keys of ``location`` that lead into the body, without pydantic's names of types."""
    keys = []
    for number, key in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(body, dict) and (key in body or is_last):
            keys.append(str(key))
            body = body.get(key)
        elif isinstance(body, list) and isinstance(key, int) and key < len(body):
            keys.append(str(key))
            body = body[key]
    return ".".join(keys) or None
