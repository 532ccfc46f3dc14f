"""Serves `/v1/completions` and `/v1/chat/completions`, streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.types import Receive, Send

from outrider.common.keys import Key
from outrider_client.errors import OutriderError
from outrider_gateway.answers import Answer, counters_of
from outrider_gateway.errors import HttpError, error_of
from outrider_gateway.fields import asks_of, chat_prompt_of, prompts_of
from outrider_gateway.http import Reply, Service, read_body
from outrider_gateway.pairs import Model, Pair
from outrider_gateway.requests import ChatRequest, CompletionRequest, request_of
from outrider_gateway.texts import Disconnected, Piece, Texts, unless_disconnected


class Generating:
    """An ASGI application for one kind of request."""

    def __init__(self, service: Service, kind: type[CompletionRequest] | type[ChatRequest]):
        self._service, self._kind = service, kind

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        reply = Reply(scope, send)
        try:
            body = await read_body(scope, receive, self._service.options.most_body_bytes)
            caller = scope["outrider.caller"]
            with self._service.admission.place(caller):
                await unless_disconnected(receive, self._serve(body, reply, caller))
        except Disconnected:
            self._service.metrics.disconnected.inc()
        except HttpError as error:
            await self._refuse(reply, error)
        except OutriderError as error:
            await self._refuse(reply, error_of(error, frozenset(self._kind.__struct_fields__)))

    async def _refuse(self, reply: Reply, error: HttpError) -> None:
        self._service.metrics.refused.labels(error.code or str(error.status)).inc()
        await reply.fail(error)

    async def _serve(self, body: bytes, reply: Reply, caller: Key | None) -> None:
        request = request_of(self._kind, body)
        pair = self._service.pairs.named(request.model)
        model = await pair.model()
        if isinstance(request, ChatRequest):
            prompts = [await chat_prompt_of(request, model)]
        else:
            prompts = await prompts_of(request, model)
        asks = asks_of(request, prompts, pair, model)
        service, spend = self._service, partial(self._service.admission.allowances.spend, caller)
        texts = Texts(pair.client, asks, service.options.request_timeout, service.metrics, spend)
        answer = Answer(request, pair.name, reply.request_id, texts)
        if isinstance(request, CompletionRequest) and request.echo:
            echoes = echoes_of(request, prompts, model)
            answer.set_echoes([echoes[ask.prompt_index] for ask in asks])
        if request.stream:
            await self._stream(reply, answer, texts, pair)
            return
        results = await texts.finish()
        counters = ", ".join(f"{name}={number}" for name, number in counters_of(results).items())
        await reply.send_json(answer.whole(await pair.model()), headers={"x-outrider": counters})

    async def _stream(self, reply: Reply, answer: Answer, texts: Texts, pair: Pair) -> None:
        """Send what comes; what fails before anything has come still gets a status of its own."""
        async with aclosing(texts.pieces(self._service.options.keepalive)) as pieces:
            first = await anext(pieces)
            model = await pair.model()  # now: the text may have begun again with another model
            await reply.start_events()
            await reply.send_events(answer.opening(model))
            await self._send_pieces(reply, answer, model, first)
            async for piece in pieces:
                await self._send_pieces(reply, answer, model, piece)
        await reply.send_events(answer.closing(model))
        await reply.end_events()

    async def _send_pieces(self, reply: Reply, answer: Answer, model: Model, pieces: dict[int, Piece]) -> None:
        """Send one event for each text that has got something, or a comment if none has."""
        if not pieces:
            await reply.send_comment()
        await reply.send_events([answer.event(model, index, piece) for index, piece in pieces.items()])


def echoes_of(request: CompletionRequest, prompts: Sequence[list[int]], model: Model) -> list[str]:
    """Return the text of each prompt: as it was given, or of its ids."""
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if all(isinstance(each, str) for each in given):
        return list(given)
    tokenizer = model.need_tokenizer()
    return [tokenizer.decode(prompt) for prompt in prompts]
