"""grpc.reflection for one server: answers whoever asks, in the time that sessions leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_reflection.v1alpha import reflection

from outrider.serving.admission import Turnstile
from outrider.serving.calls import Call

MOST_STREAMS = 32  # at once, 8 of one connection; the others wait, unread
PAUSE_S = 0.02  # before a question is read: an answer takes the event loop as long as some rounds do
SILENCE_S = 10.0  # after which a stream is ended that asks nothing, or reads nothing


class ReflectionServicer(reflection.aio.ReflectionServicer):
    """What a server says of its interface; grpcio's own servicer answers as fast as anybody can ask."""

    def __init__(self, service_names: Sequence[str]):
        super().__init__(service_names)
        self._turns = Turnstile(MOST_STREAMS)

    async def ServerReflectionInfo(self, requests, visitor) -> AsyncIterator[Any]:
        call = Call(visitor, requests)
        turn = await self._turns.enter(call.caller)
        try:
            call.limit_silence(SILENCE_S, "nothing has been asked")
            async for answer in super().ServerReflectionInfo(_one_by_one(call), None):
                yield answer
        finally:
            call.close()
            turn.leave()


async def _one_by_one(call: Call) -> AsyncIterator[Any]:
    while True:
        await call.wait(asyncio.sleep(PAUSE_S))
        request = await call.receive()
        if request is None:
            return
        yield request
