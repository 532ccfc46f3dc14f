"""Gateways as processes, and a plain way to speak HTTP to them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.servers import PATIENCE_S


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @cached_property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The events of a finished stream, without the last one, which says that it is done."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class GatewayProcess:
    """A gateway as its command line starts it."""

    trust: ssl.SSLContext | None = None  # by which it is spoken to with TLS

    def __init__(self, *pairs: str, **options: Any):
        arguments = [f"--pair={pair}" for pair in pairs]
        arguments += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outrider_gateway", "--listen=127.0.0.1:0", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    @cached_property
    def address(self) -> str:
        """HOST:PORT, as the gateway announces it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the gateway ended before it served"
        self.scheme, _, address = line.split()[-1].partition("://")
        return address

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    def connect(self) -> http.client.HTTPConnection:
        if self.trust is None:
            return http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        return http.client.HTTPSConnection(self.address, timeout=PATIENCE_S, context=self.trust)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Return the whole answer; `body` is sent as JSON unless it is bytes."""
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, sent, headers or {})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> Reply:
        return self.ask("POST", path, fields)

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def metric(self, name: str) -> float:
        """Return the sum of a metric's values."""
        lines = self.get("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """Return the exit status and what was written to standard error, when the process has ended."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@contextmanager
def gateway_process(*pairs: str, **options: Any) -> Iterator[GatewayProcess]:
    """Run a gateway and kill it at the end if it still lives."""
    gateway = GatewayProcess(*pairs, **options)
    try:
        assert gateway.address
        yield gateway
    finally:
        gateway.kill()
