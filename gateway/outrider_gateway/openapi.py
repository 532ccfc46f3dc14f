"""The OpenAPI description of the gateway, from the structs of its requests."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from outrider import __version__
from outrider_gateway.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_POSTED: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/completions": (CompletionRequest, "Continue texts, whole or as server-sent events"),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation, whole or as server-sent events"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation"),
    "/detokenize": (DetokenizeRequest, "Text of token ids"),
}
_ASKED = {
    "/v1/models": "The pairs of this gateway",
    "/v1/models/{name}": "One pair",
    "/tokenizer_info": "Special tokens and chat template",
    "/health": "Whether the gateway works",
    "/version": "Its version",
    "/metrics": "Its metrics, as Prometheus reads them",
    "/openapi.json": "This description",
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}


@cache
def description() -> dict[str, Any]:
    """Return the whole description, as OpenAPI 3.1 wants it."""
    kinds = [kind for kind, _ in _POSTED.values()]
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"get": _asked(path, text)} for path, text in _ASKED.items()}
    paths |= {path: {"post": _posted(kind, text)} for path, (kind, text) in _POSTED.items()}
    about = {"title": "Outrider", "version": __version__}
    return {
        "openapi": "3.1.0",
        "info": about,
        "paths": paths,
        "components": {"schemas": components | {"Error": _ERROR}},
    }


def _asked(path: str, text: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": text, "responses": _responses()}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _posted(kind: type[msgspec.Struct], text: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "requestBody": body, "responses": _responses()}


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "What was asked for"}, "default": {"description": "An error", "content": error}}
