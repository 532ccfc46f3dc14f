"""Services that do what a test wants at each RPC, on real sockets: answer, stay silent, refuse, or send rubbish."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from outrider.protocol.errors import ServiceError
from outrider.serving.server import abort
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from tests import toy_services as toys
from tests.servers import Services

INFO = common_pb2.ModelInfo(model_id="fake", vocab_size=toys.VOCAB_SIZE, context_length=512)


async def silence(*_: Any) -> Any:
    """Say nothing until the caller goes away."""
    await asyncio.Event().wait()


def refusal(error: ServiceError | grpc.StatusCode) -> Callable:
    """Return a handler that ends a call as a service does, or with a bare status as a proxy does."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(error, ServiceError):
            await abort(context, error)
        await context.abort(error, "as the test wants it")

    return refuse


def at_first(handler: Callable, then: Callable) -> Callable:
    """Return a handler that is one the first time, and another from then on."""
    left = [handler]
    return lambda *call: (left.pop() if left else then)(*call)


def answer(response: Any) -> Callable:
    """Return a handler that answers so."""

    async def handle(request: Any, context: Any) -> Any:
        return response

    return handle


def rounds(number: int, then: Callable = silence) -> Callable:
    """Return a handler of Verify that answers so many rounds as the toy target does."""

    async def verify(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        target = toys.ToyTarget(await anext(requests))
        for _ in range(number):
            yield target.answer(await anext(requests))
        await then(requests, context)

    return verify


TARGET_INFO = answer(target_pb2.TargetServiceGetModelInfoResponse(model=INFO))


class Fake:
    """Both services behind one port; `on` maps an RPC's name to the handler that it has now."""

    def __init__(self, **on: Callable):
        self.on: dict[str, Callable] = {
            "TargetInfo": TARGET_INFO,
            "DraftInfo": answer(draft_pb2.DraftServiceGetModelInfoResponse(model=INFO)),
            "Verify": silence,
            "Propose": silence,
        } | on
        self.num_calls: Counter[str] = Counter()
        self.num_ended: Counter[str] = Counter()  # of the streams
        self.address = ""

    async def call(self, name: str, request: Any, context: grpc.aio.ServicerContext) -> Any:
        self.num_calls[name] += 1
        return await self.on[name](request, context)

    async def stream(self, name: str, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        self.num_calls[name] += 1
        try:
            handled = self.on[name](request, context)
            if not isinstance(handled, AsyncIterator):
                await handled
                return
            async for response in handled:
                yield response
        finally:
            self.num_ended[name] += 1


class _Target(target_pb2_grpc.TargetServiceServicer):
    def __init__(self, fake: Fake):
        self._fake = fake

    async def GetModelInfo(self, request, context):
        return await self._fake.call("TargetInfo", request, context)

    async def GetTokenizer(self, request, context):
        async for part in self._fake.stream("GetTokenizer", request, context):
            yield part

    async def Verify(self, requests, context):
        async for response in self._fake.stream("Verify", requests, context):
            yield response


class _Draft(draft_pb2_grpc.DraftServiceServicer):
    def __init__(self, fake: Fake):
        self._fake = fake

    async def GetModelInfo(self, request, context):
        return await self._fake.call("DraftInfo", request, context)

    async def Propose(self, requests, context):
        async for response in self._fake.stream("Propose", requests, context):
            yield response


@contextmanager
def fake_services(services: Services, **on: Callable) -> Iterator[Fake]:
    """Run a fake on the loop of the tests' servers."""
    fake = Fake(**on)

    async def start() -> grpc.aio.Server:
        server = grpc.aio.server()
        target_pb2_grpc.add_TargetServiceServicer_to_server(_Target(fake), server)
        draft_pb2_grpc.add_DraftServiceServicer_to_server(_Draft(fake), server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server

    server = services.run(start())
    try:
        yield fake
    finally:
        services.run(server.stop(0))
