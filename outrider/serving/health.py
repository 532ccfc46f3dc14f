"""grpc.health.v1 for one server: always answers, holds nothing for whoever does not read, and tells every watcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.protocol.errors import NotFoundError
from outrider.serving.admission import Turnstile

Status = health_pb2.HealthCheckResponse
MOST_WATCHES = 1024  # at once, 256 of one connection; others get the status and nothing after it


class HealthServicer(health_pb2_grpc.HealthServicer):
    """What a server says of itself and of its service.

    grpcio's own servicer writes to a watcher while it holds what a change of status needs, and forgets all other
    watchers of a service when one of them leaves.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": Status.SERVING}
        self._changed = asyncio.Event()
        self._watches = Turnstile(MOST_WATCHES)
        self._is_ending = False

    def set(self, status: int, *services: str) -> None:
        """Set the status of some services, or of all that are known."""
        self._statuses |= dict.fromkeys(services or self._statuses, status)
        self._wake()

    def end_watches(self) -> None:
        """Let every watch end when it has reported the status."""
        self._is_ending = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request, visitor) -> health_pb2.HealthCheckResponse:
        if request.service not in self._statuses:
            raise NotFoundError(f"this server has no service {request.service[:100]!r}")
        return Status(status=self._statuses[request.service])

    async def Watch(self, request, visitor) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        reported: int | None = None
        turn = self._watches.try_to_enter(visitor.caller)
        try:
            while True:
                changed, is_last = self._changed, self._is_ending or turn is None  # of before the status goes out
                status = self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
                if status != reported:
                    yield Status(status=status)
                    reported = status
                if is_last:
                    return
                await changed.wait()
        finally:
            if turn:
                turn.leave()
