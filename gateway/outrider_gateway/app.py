"""The Starlette application: routes, and how errors are reported."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outrider import __version__
from outrider_client.errors import OutriderError
from outrider_gateway.doors import Doors
from outrider_gateway.errors import HttpError, error_of, invalid
from outrider_gateway.fields import chat_prompt_of
from outrider_gateway.generating import Generating
from outrider_gateway.http import RequestIds, Service, read_body
from outrider_gateway.metrics import Metrics
from outrider_gateway.openapi import description
from outrider_gateway.pairs import Pair
from outrider_gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    request_of,
)
from outrider_gateway.texts import Disconnected

log = logging.getLogger(__name__)
DESCRIBE_S = 5.0  # for a target to describe itself where a list of all is wanted
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


def make_app(service: Service) -> Starlette:
    """Return the gateway's application; its clients are closed when it ends."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await service.pairs.close()

    routes = Routes(service)
    return Starlette(
        routes=[
            Route("/", routes.page, methods=["GET"]),
            Route("/v1/completions", Generating(service, CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", Generating(service, ChatRequest), methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/version", routes.version, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/openapi.json", routes.openapi, methods=["GET"]),
        ],
        middleware=[
            Middleware(RequestIds),
            Middleware(Failures, service.metrics),
            Middleware(Doors, service.options.keys),
        ],
        exception_handlers={HTTPException: _told, HttpError: _told, OutriderError: _told},
        lifespan=lifespan,
    )


class Routes:
    """The routes that write no text."""

    def __init__(self, service: Service):
        self._service = service
        self._started_at = int(time.time())

    async def models(self, _: Request) -> Response:
        found = await asyncio.gather(*map(self._described, self._service.pairs.by_name.values()))
        return as_json({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        return as_json(await self._described(self._service.pairs.named(request.path_params["name"])))

    async def _described(self, pair: Pair) -> dict[str, Any]:
        """Return a model as OpenAI lists it; what its target would have to say is null while it does not answer."""
        length = root = None
        try:
            info = (await asyncio.wait_for(pair.model(), DESCRIBE_S)).info
            length, root = info.context_length, info.model_id
        except (OutriderError, asyncio.TimeoutError):
            log.warning("the target of %s does not describe itself", pair.name)
        fields = {"owned_by": "outrider", "root": root, "parent": None, "max_model_len": length}
        return {"id": pair.name, "object": "model", "created": self._started_at, **fields}

    async def tokenize(self, http: Request) -> Response:
        request = request_of(TokenizeRequest, await self._body_of(http))
        if (request.prompt is None) == (request.messages is None):
            raise invalid("prompt or messages: give one of them", "prompt")
        model = await self._service.pairs.named(request.model).model()
        tokenizer = model.need_tokenizer()
        if request.prompt is None:
            ids = await chat_prompt_of(request, model)
        else:
            encode = tokenizer.encode if request.add_special_tokens else tokenizer.encode_rest
            ids = await asyncio.to_thread(encode, request.prompt)
        names = [tokenizer.tokenizer.id_to_token(each) for each in ids] if request.return_token_strs else None
        found = {"count": len(ids), "max_model_len": model.info.context_length, "tokens": ids, "token_strs": names}
        return as_json(found)

    async def detokenize(self, http: Request) -> Response:
        request = request_of(DetokenizeRequest, await self._body_of(http))
        model = await self._service.pairs.named(request.model).model()
        wrong = next((each for each in request.tokens if not 0 <= each < model.info.vocab_size), None)
        if wrong is not None:
            raise invalid(f"tokens holds id {wrong}: the model has ids from 0 to {model.info.vocab_size - 1}", "tokens")
        decode = model.need_tokenizer().tokenizer.decode
        return as_json({"prompt": await asyncio.to_thread(decode, request.tokens, skip_special_tokens=False)})

    async def tokenizer_info(self, http: Request) -> Response:
        model = await self._service.pairs.named(http.query_params.get("model")).model()
        tokenizer = model.need_tokenizer()
        fields = {
            "tokenizer_class": type(tokenizer.tokenizer.model).__name__,
            "vocab_size": model.info.vocab_size,
            "model_max_length": model.info.context_length,
            "chat_template": tokenizer.chat_template or None,
        }
        return as_json(tokenizer.special_tokens | fields)

    async def page(self, _: Request) -> Response:
        """Return a page to try the pairs with; it loads nothing else, and is not to be framed."""
        return Response(PAGE.read_bytes(), media_type="text/html", headers={"content-security-policy": PAGE_POLICY})

    async def health(self, _: Request) -> Response:
        """Say that the gateway itself works; it goes on without a draft, and waits for a target."""
        return Response(status_code=200)

    async def version(self, _: Request) -> Response:
        return as_json({"version": __version__})

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _: Request) -> Response:
        return as_json(description())

    async def _body_of(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._service.options.most_body_bytes)


def as_json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


def as_error(error: HttpError) -> Response:
    return Response(orjson.dumps(error.body()), error.status, error.headers(), "application/json")


async def _told(request: Request, error: Exception) -> Response:
    """Return an error as OpenAI tells it."""
    if isinstance(error, HTTPException):
        error = _no_route(request, error)
    if isinstance(error, OutriderError):
        error = error_of(error)
    assert isinstance(error, HttpError)
    return as_error(error)


def _no_route(request: Request, error: HTTPException) -> HttpError:
    if error.status_code == 405:
        return HttpError(405, f"{request.url.path} does not take {request.method}", "method_not_allowed")
    return HttpError(
        404, f"there is nothing at {request.url.path[:200]}: /openapi.json lists what there is", "not_found"
    )


class Failures:
    """Middleware: what nobody expected becomes a 500; the log says where it was raised, and nothing of the request."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_started = False

        async def noting_send(message: Any) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Disconnected:
            return
        except HttpError as error:
            self._metrics.refused.labels(error.code).inc()
            await as_error(error)(scope, receive, send)
        except Exception as error:
            places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            log.error("%s at %s", type(error).__name__, " < ".join(reversed(places[-5:])))
            if scope["type"] != "http" or is_started:
                raise ConnectionError("a request failed; the line before says where") from None
            wrong = HttpError(500, "the gateway failed on this request: its log says where", "gateway_failed")
            await as_error(wrong)(scope, receive, send)
