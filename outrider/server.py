"""What every gRPC server here has: options, health, reflection, one place that maps errors to codes, signals."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from outrider.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)

log = logging.getLogger(__name__)

ERROR_DOMAIN = "outrider"
STATUS_CODES: dict[type[ServiceError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # a prompt of 128k tokens is 0.5 MiB; a round of 64 supports of 4,096 ids 1 MiB
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server takes the same port and half the calls, without a word
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class ModelServicer(Protocol):
    """A servicer that answers UNAVAILABLE until its model is loaded."""

    def load(self) -> None:
        """Load the model and warm it up; blocks, and is called on a thread of its own."""

    def close(self) -> None:
        """Stop the model thread."""


def answers_errors(handler: Callable) -> Callable:
    """Wrap a streaming handler: a ServiceError becomes its status, anything else INTERNAL without its text."""

    @functools.wraps(handler)
    async def wrapped(self, request, context) -> AsyncIterator:
        try:
            async for response in handler(self, request, context):
                yield response
        except ServiceError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:
            log.exception("%s failed", handler.__name__)
            await abort(context, InternalError("the service failed on this request; its log says how"))

    return wrapped


def answers_unary_errors(handler: Callable) -> Callable:
    """Like answers_errors, for a handler that returns one response."""

    @functools.wraps(handler)
    async def wrapped(self, request, context):
        try:
            return await handler(self, request, context)
        except ServiceError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("%s failed", handler.__name__)
            await abort(context, InternalError("the service failed on this request; its log says how"))

    return wrapped


async def abort(context: grpc.aio.ServicerContext, error: ServiceError) -> None:
    """End the call with the error's status, as `error_metadata` says it."""
    code = next(STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES)
    context.set_trailing_metadata(error_metadata(code, error))
    await context.abort(code, str(error))


def error_metadata(code: grpc.StatusCode, error: ServiceError) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata that holds the status with an ErrorInfo, and a RetryInfo where a limit is reached.

    The ErrorInfo tells a caller that the service itself speaks, and not a proxy before it.
    """
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))]
    if isinstance(error, ResourceExhaustedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_delay_s * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=code.value[0], message=str(error), details=details)
    return tuple(rpc_status.to_status(status).trailing_metadata)


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


class Server:
    """A gRPC server with one model service beside health and reflection.

    Health says SERVING for `""` as soon as the process listens, and for the service's full name when its model is
    loaded and warm, until a shutdown begins.
    """

    def __init__(self, service_name: str, servicer: ModelServicer, register: Callable, listen: str):
        """`register` is the generated `add_…Servicer_to_server`; `listen` is HOST:PORT, and port 0 takes a free one.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        self._service_name, self._servicer = service_name, servicer
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = aio_health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        register(servicer, self._server)
        reflection.enable_server_reflection([service_name, HEALTH_SERVICE, reflection.SERVICE_NAME], self._server)
        self.port: int = self._server.add_insecure_port(listen)

    async def start(self) -> None:
        """Listen, then load the model on a thread; returns when it is warm.

        Raises:
            Exception: whatever loading the model raised; the server has been stopped.
        """
        await self._set_health("", health_pb2.HealthCheckResponse.SERVING)
        await self._set_health(self._service_name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._servicer.load)
        except BaseException:
            await self.stop(0)
            raise
        await self._set_health(self._service_name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new sessions, give the running ones `grace_s` seconds to end, then stop."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await asyncio.get_running_loop().run_in_executor(None, self._servicer.close)

    async def _set_health(self, service: str, status: int) -> None:
        await self._health.set(service, status)


async def run_until_signal(server: Server, grace_s: float, announce: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT, then shut down gracefully. `announce` gets the port when the model is warm."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.ensure_future(server.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        try:
            starting.result()
        except BaseException:
            stopping.cancel()
            raise
        announce(server.port)
        await stopping
        log.info("shutting down: running sessions have %.0f s to end", grace_s)
    await server.stop(grace_s)
