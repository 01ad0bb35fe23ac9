"""The OpenAPI document, corrected where FastAPI's is not true of this server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI


def describe(api: FastAPI, *, has_keys: bool) -> None:
    """Replace ``api.openapi``: bad bodies are answered with 400, not 422; keys are a bearer's."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_corrected(FastAPI.openapi(api), has_keys))
        return made

    api.openapi = openapi  # type: ignore[method-assign]


def _corrected(document: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if has_keys and path.startswith(("/v1/", "/state")):
                operation["security"] = [{"key": []}]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
