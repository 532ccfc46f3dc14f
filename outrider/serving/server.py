"""What every gRPC server here has: options, health, reflection, one place that maps errors to codes, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_status import rpc_status

from outrider.common.callers import caller_of
from outrider.common.doors import Doors, UnknownKeyError
from outrider.common.tls import ServerTls
from outrider.protocol.errors import (
    ERROR_DOMAIN,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    raise_errors_in,
)
from outrider.serving.calls import RareLog, Visitor
from outrider.serving.health import HealthServicer
from outrider.serving.messages import MOST_OTHER_BYTES, check_small, reader
from outrider.serving.reflection import ReflectionServicer

log = logging.getLogger(__name__)
rare_log = RareLog(log)

STATUS_CODES: dict[type[ServiceError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server takes the same port and half the calls, without a word
    ("grpc.per_message_decompression", 0),  # what is compressed arrives as it is, and cannot be read
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 1024),  # of one connection
    ("grpc.http2.bdp_probe", 0),  # nothing but the message that is awaited gets more room than 64 KiB of a stream
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)
EVERYONE = Doors()
LAST_WORDS_S = 1.0  # for statuses to reach those who read them, when everything has ended


class ModelServicer(Protocol):
    """A servicer that answers UNAVAILABLE until its model is loaded."""

    most_message_bytes: int  # of any request that it may ever read

    def check_message_size(self, num_bytes: int) -> None:
        """Raise InvalidArgumentError where a request is larger than the model's context and the limits need."""

    def load(self) -> None:
        """Load the model and warm it up; blocks, and is called on a thread of its own."""

    async def drain(self, grace_s: float) -> None:
        """Open no session any more; return when the last has ended, and end those that are left after `grace_s`."""

    def close(self) -> None:
        """Stop the model thread."""


class _Guarded:
    """Stands for a server while a generated function adds a servicer to it, and guards each handler.

    Callers are known before anything is done for them; handlers get a Visitor in place of gRPC's context. Bytes are
    looked at before they are parsed; a ServiceError becomes its status, and whatever else is raised INTERNAL without
    its text.
    """

    def __init__(self, server: grpc.aio.Server, check_size: Callable[[int], None], doors: Doors):
        self._server, self._check_size, self._doors = server, check_size, doors

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Wait for the same handlers by name."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        guarded = {name: self._guard(f"{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))
        self._server.add_registered_method_handlers(service, guarded)

    def _guard(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        assert handler.request_deserializer
        read = reader(handler.request_deserializer, self._check_size)
        if handler.stream_stream:
            answer = self._guarded_stream(method, handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(answer, read, handler.response_serializer)
        # Where gRPC itself awaits the request, a handler has to be there for what is raised.
        if handler.unary_stream:
            answer = self._guarded_stream(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(answer, _returning_errors(read), handler.response_serializer)
        assert handler.unary_unary
        answer = self._guarded_unary(method, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(answer, _returning_errors(read), handler.response_serializer)

    def _guarded_stream(self, method: str, handler: Callable) -> Callable:
        async def guarded(request, context) -> AsyncIterator:
            try:
                visitor = self._visitor(context)
                raise_errors_in([request])
                async for response in handler(request, visitor):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, _service_error(method, error))

        return guarded

    def _guarded_unary(self, method: str, handler: Callable) -> Callable:
        async def guarded(request, context):
            try:
                visitor = self._visitor(context)
                raise_errors_in([request])
                return await handler(request, visitor)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, _service_error(method, error))

        return guarded

    def _visitor(self, context: grpc.aio.ServicerContext) -> Visitor:
        """Return who calls; raises UnauthenticatedError where a key is missing that is needed here."""
        shown = next((value for name, value in context.invocation_metadata() or () if name == "authorization"), "")
        try:
            key = self._doors.owner_of(shown if isinstance(shown, str) else shown.decode("latin-1"))
        except UnknownKeyError as error:
            raise UnauthenticatedError(f"{error}; clients have api_key and OUTRIDER_API_KEY for it") from None
        return Visitor(caller_of(context.peer(), key.name if key else None), key)


def _returning_errors(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_say_why_not(data: bytes) -> Any:
        try:
            return read(data)
        except ServiceError as error:
            return error

    return read_or_say_why_not


def _service_error(method: str, error: Exception) -> ServiceError:
    """Return the error that the caller shall see, and say it in the log if nobody has just now."""
    kind = f"{method} {type(error).__name__}"
    if isinstance(error, ServiceError):
        rare_log.say(kind, "%s: %s: %.200r", method, type(error).__name__, str(error))
        return error
    rare_log.say(kind, "%s failed", method, level=logging.ERROR, exc_info=error)
    return InternalError("the service failed on this request; its log says how")


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
    loaded and warm. Both say NOT_SERVING, on the open port, from the beginning of a shutdown until the last session has
    gone.
    """

    def __init__(
        self, service_name: str, servicer: ModelServicer, register: Callable, listen: str, doors: Doors = EVERYONE
    ):
        """`register` is the generated `add_…Servicer_to_server`; `listen` is HOST:PORT, and port 0 takes a free one.

        Health answers whoever asks; everything else is behind `doors`.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        self._service_name, self._servicer = service_name, servicer
        most_bytes = max(servicer.most_message_bytes, MOST_OTHER_BYTES)
        self._server = grpc.aio.server(options=(*SERVER_OPTIONS, ("grpc.max_receive_message_length", most_bytes)))
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, _Guarded(self._server, check_small, EVERYONE))
        register(servicer, _Guarded(self._server, servicer.check_message_size, doors))
        names = [service_name, HEALTH_SERVICE, reflection.SERVICE_NAME]
        self._reflection = ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            self._reflection, _Guarded(self._server, check_small, doors)
        )
        self.port: int = _listen(self._server, listen, doors)

    async def start(self) -> None:
        """Listen, then load the model on a thread; returns when it is warm.

        Raises:
            Exception: whatever loading the model raised; the server has been stopped.
        """
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING, self._service_name)
        await self._server.start()
        try:
            await _on_thread(self._servicer.load)
        except BaseException:
            await self.stop(0)
            raise
        self._health.set(health_pb2.HealthCheckResponse.SERVING, self._service_name)

    async def stop(self, grace_s: float) -> None:
        """Refuse new sessions, give the running ones `grace_s` seconds to end, then stop."""
        await self._end(grace_s)
        await _on_thread(self._servicer.close)

    async def stop_at_once(self) -> None:
        """End all sessions and close the port; the model's thread goes on, and ends with the process."""
        await self._end(0.0)

    async def _end(self, grace_s: float) -> None:
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._servicer.drain(grace_s)
        self._health.end_watches()
        await self._server.stop(LAST_WORDS_S)


def _listen(server: grpc.aio.Server, listen: str, doors: Doors) -> int:
    """Return the port; certificates are looked at again for each connection."""
    tls = doors.tls
    if tls is None:
        return server.add_insecure_port(listen)
    shown = tls.current

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Return what has changed, or None."""
        nonlocal shown
        before, shown = shown, tls.current
        return None if shown is before else _configuration(shown)

    credentials = grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch),  # the stubs do not know that None is taken
        shown.client_ca is not None,
    )
    return server.add_secure_port(listen, credentials)


def _configuration(tls: ServerTls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.cert)], tls.client_ca)


async def _on_thread(call: Callable[[], None]) -> None:
    """Run `call` on a thread that does not hold up the end of the process, as those of an executor do."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if done.done():
            return
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def run() -> None:
        error: BaseException | None = None
        try:
            call()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended meanwhile, and nobody waits
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=run, name=call.__name__, daemon=True).start()
    await done


async def run_until_signal(server: Server, grace_s: float, announce: Callable[[int], None]) -> int | None:
    """Serve until SIGTERM or SIGINT, then shut down gracefully. `announce` gets the port when the model is warm.

    Returns:
        None when everything has ended. Else the exit status for a process that shall end although a thread of it is
        still at work: 0 after a signal while the model was loading, 128 and the signal's number after a second one.
    """
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    if await _unless_signalled(server.start(), signals):
        await server.stop_at_once()
        return 0
    announce(server.port)
    await signals.get()
    log.info("shutting down: running sessions have %.0f s to end, or until a second signal", grace_s)
    if second := await _unless_signalled(server.stop(grace_s), signals):
        await server.stop_at_once()
        return 128 + second
    return None


async def _unless_signalled(work: Coroutine[Any, Any, None], signals: asyncio.Queue[int]) -> int:
    """Do `work` and return 0, or the number of a signal that comes before it is done."""
    task, signalled = asyncio.ensure_future(work), asyncio.ensure_future(signals.get())
    await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        if not signalled.cancel():  # it came at the same moment, and is for whoever asks next
            signals.put_nowait(signalled.result())
        task.result()
        return 0
    task.cancel()
    await asyncio.wait((task,))
    return signalled.result()
