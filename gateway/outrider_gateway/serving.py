"""Runs the application on uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from outrider.common.tls import ChangingContext
from outrider_gateway.app import make_app
from outrider_gateway.doors import Admission
from outrider_gateway.http import Options, Service
from outrider_gateway.metrics import Metrics
from outrider_gateway.pairs import Pairs


def serve(make_pairs: Callable[[], Pairs], host: str, port: int, options: Options, grace: float) -> None:
    """Serve until SIGTERM or SIGINT; running requests have `grace` seconds to end, and a second signal ends them."""
    uvloop.run(_serve(make_pairs, host, port, options, grace))


async def _serve(make_pairs: Callable[[], Pairs], host: str, port: int, options: Options, grace: float) -> None:
    tls, admission = options.doors.tls, Admission(options.most_requests, options.doors.allowances)
    service = Service(options, make_pairs(), Metrics(), admission)
    listening = listen(host, port)
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        ssl_context_factory=(lambda config, default: ChangingContext(tls)) if tls else None,
    )
    scheme = "https" if tls else "http"
    server = GatewayServer(config, f"Gateway serves on {scheme}://{address_of(listening)}")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.end)
    await server.serve([listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class GatewayServer(uvicorn.Server):
    """uvicorn's server, which announces itself and ends with status 0."""

    def __init__(self, config: uvicorn.Config, announcement: str):
        super().__init__(config)
        self._announcement = announcement

    def end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announcement, flush=True)
