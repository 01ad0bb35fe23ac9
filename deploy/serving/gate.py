"""What happens before a request is read: who may ask, and how much."""

from __future__ import annotations

import ipaddress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moray.deploy.serving.errors import ApiError, api_error
from moray.deploy.serving.keys import KeyFile

_OPEN_PATHS = ("/", "/health", "/openapi.json")
_OPEN_FOLDER = "/page/"  # the same for everybody; what the page shows is asked for with a key


class Gate:
    """ASGI middleware: API keys, callers of other machines, the size of bodies.

    Without keys only this machine is answered, under a name of its own: a page of another site whose name was made to
    lead here is not.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None, max_body_bytes: int) -> None:
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_caller(scope)
            replayed = await self._read(scope, receive)
        except Exception as error:
            await api_error(error).response(scope, receive, send)
            return
        await self._app(scope, replayed, send)

    def _check_caller(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._keys is None:
            client = scope.get("client")
            if not (client and _is_loopback(client[0]) and _is_loopback(_host_name(headers.get("host", "")))):
                raise ApiError(
                    403, "this server has no API keys and answers its own machine only", code="not_this_machine"
                )
            return
        if scope["path"] in _OPEN_PATHS or scope["path"].startswith(_OPEN_FOLDER):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self._keys.owner_of(key.strip()) is None:
            message = "Authorization is missing or holds no valid API key; send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, which has to be parsed as a whole anyway, to be received again."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise self._too_large()
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")


def _host_name(host: str) -> str:
    """Without the port: localhost:8000, [::1]:8000."""
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.rpartition(":")[0] or host


def _is_loopback(host: Any) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False
