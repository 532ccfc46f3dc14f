"""Real services on loopback for tests: in this process on a loop of their own, or as processes that can be killed."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from outrider.serving.options import ServiceOptions
from outrider.serving.server import Server
from outrider.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from outrider_draft.servicer import SERVICE_NAME as DRAFT_NAME
from outrider_draft.servicer import DraftServicer
from outrider_target.servicer import SERVICE_NAME as TARGET_NAME
from outrider_target.servicer import TargetServicer

PATIENCE_S = 120.0  # until a test gives up what should come at once; nothing asserts a time


@dataclass(frozen=True)
class Kind:
    """One of the two services, as a test needs to know it."""

    name: str
    module: str
    servicer: type
    register: Callable
    stub: type
    info_request: type


TARGET = Kind(
    name=TARGET_NAME,
    module="outrider_target",
    servicer=TargetServicer,
    register=target_pb2_grpc.add_TargetServiceServicer_to_server,
    stub=target_pb2_grpc.TargetServiceStub,
    info_request=target_pb2.TargetServiceGetModelInfoRequest,
)
DRAFT = Kind(
    name=DRAFT_NAME,
    module="outrider_draft",
    servicer=DraftServicer,
    register=draft_pb2_grpc.add_DraftServiceServicer_to_server,
    stub=draft_pb2_grpc.DraftServiceStub,
    info_request=draft_pb2.DraftServiceGetModelInfoRequest,
)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds; fail when it never does."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"not so within {PATIENCE_S:g} s: {what}"
        time.sleep(0.01)


class Services:
    """Servers on one event loop in one thread, as grpc.aio wants it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-servers", daemon=True)
        self._thread.start()
        self._running: list[Server] = []

    def start(self, kind: Kind, model: str, **options: Any) -> RunningServer:
        """Start a service and return it when its model is warm; options are fields of ServiceOptions."""
        running = self.listen(kind, model, **options)
        running.load()
        return running

    def listen(self, kind: Kind, model: str, **options: Any) -> RunningServer:
        """Return a service that has an address and has not begun to serve; `load` lets it."""
        settings = ServiceOptions(**({"model": model, "dtype": "float64", "device": "cpu", "threads": 1} | options))
        servicer = kind.servicer(settings)

        async def make() -> Server:
            return Server(kind.name, servicer, kind.register, settings.listen, settings.doors)

        server = self.run(make())
        self._running.append(server)
        return RunningServer(self, kind, server, servicer)

    def run(self, coroutine) -> Any:
        """Run a coroutine on the servers' loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=2 * PATIENCE_S)

    def stop(self, server: Server, grace_s: float = 0.0) -> None:
        """Stop a server; the second time nothing happens."""
        if server in self._running:
            self._running.remove(server)
            self.run(server.stop(grace_s))

    def close(self) -> None:
        """Stop everything; the second time nothing happens."""
        for server in list(self._running):
            self.stop(server)
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()


@functools.cache
def shared_services() -> Services:
    """Return the one loop of servers of this process; grpc.aio wants no second."""
    return Services()


class RunningServer:
    """One server, and a way to it."""

    def __init__(self, services: Services, kind: Kind, server: Server, servicer: Any):
        self._services, self._kind, self._server, self._servicer = services, kind, server, servicer
        self.port = server.port
        self.address = f"127.0.0.1:{server.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = kind.stub(self.channel)

    def load(self) -> None:
        """Serve, and return when the model is warm."""
        self._services.run(self._server.start())

    def shut_down(self, grace_s: float = 0.0) -> None:
        """Stop the server and free its port; what it still had to say to this client can be read."""
        self._services.stop(self._server, grace_s)

    def stop(self) -> None:
        """Shut the server down at once and cut the client off as well; the second time nothing happens."""
        self.shut_down()
        self.channel.close()

    def model_info(self) -> Any:
        """Return the GetModelInfo response."""
        return self.stub.GetModelInfo(self._kind.info_request(), timeout=PATIENCE_S)

    def stats(self) -> common_pb2.ServiceStats:
        """Return the service's counters."""
        return self.model_info().stats

    @property
    def num_sessions(self) -> int:
        """Sessions open now, even while a forward pass runs, which GetModelInfo waits for."""
        return self._servicer._host.num_sessions

    def wait_until_idle(self) -> None:
        """Return when no session is open and no cache is held."""

        def is_idle() -> bool:
            stats = self.stats()
            return stats.num_sessions == 0 and stats.num_cached_tokens == 0

        eventually(is_idle, "no session open, no cache held")


class RawStream:
    """A bidirectional call whose messages the test chooses one by one."""

    def __init__(self, method: Callable, *messages: Any, timeout: float = PATIENCE_S):
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in messages:
            self.send(message)
        self.call = method(iter(self._outgoing.get, None), timeout=timeout)

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def send(self, message: Any) -> None:
        self._outgoing.put(message)

    def receive(self) -> Any:
        """Return the next response; raises StopIteration at the end and grpc.RpcError for a status."""
        return next(self.call)

    def ask(self, message: Any) -> Any:
        """Send a message and return the next response."""
        self.send(message)
        return self.receive()

    def half_close(self) -> list[Any]:
        """End the client's side and return what still comes until the service ends its own."""
        self._outgoing.put(None)
        return list(self.call)

    def cancel(self) -> None:
        self.call.cancel()
        self._outgoing.put(None)


class ServiceProcess:
    """A service as its command line starts it."""

    def __init__(self, module: str, model: str, port: int = 0, **options: Any):
        """Start the process; `address` waits until it serves, so that several can start at once."""
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, f"--model={model}", f"--listen=127.0.0.1:{port}", "--threads=1", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._restart = functools.partial(ServiceProcess, module, model, **options)

    @functools.cached_property
    def address(self) -> str:
        """HOST:PORT, as the service announces it when its model is warm."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the service ended before it served"
        return line.split()[-1]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def restarted(self) -> ServiceProcess:
        """Return a new process like this one, on the same port, when it serves."""
        process = self._restart(port=self.port)
        assert process.address == self.address
        return process

    def freeze(self) -> None:
        """Stop the process from running, without a word to anyone."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process as a power cut would; one that has ended stays as it is."""
        self.process.kill()
        self.wait()

    def terminate(self) -> None:
        """Ask the process to end, as an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Return the exit status when the process has ended."""
        status = self.process.wait(timeout=PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def python_process(*arguments: str, **how: Any) -> Iterator[subprocess.Popen]:
    """Run Python with these arguments, and kill it at the end: `Popen` as a context would wait for it for ever."""
    with subprocess.Popen([sys.executable, *arguments], **how) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def service_process(module: str, model: str, **options: Any) -> Iterator[ServiceProcess]:
    """Run a service as a process and kill it at the end if it still lives."""
    process = ServiceProcess(module, model, **options)
    try:
        yield process
    finally:
        process.kill()
