"""The page at ``/``: files of this package, sent as they are, under a policy that lets nothing else in."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from moray.deploy.serving.errors import ApiError

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text becomes HTML, whoever writes such a line later
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(api: FastAPI) -> None:
    """GET / and GET /page/NAME, which are no part of the OpenAPI document."""
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in _FOLDER.iterdir()}

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return _answer("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r:.60}", code="not_found")
        return _answer(name)

    def _answer(name: str) -> Response:
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers=HEADERS)
