"""The health check against real servers: its exit status is what a container's health hangs on."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from outrider.serving.healthcheck import main

READY, LOADING, SILENT = "example.Ready", "example.Loading", "example.Silent"


class SometimesSilent(health.HealthServicer):
    """Answers as the standard servicer, but about one service not before the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def Check(self, request, context):
        if request.service == SILENT:
            self.over.wait(30)
        return super().Check(request, context)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    servicer = SometimesSilent()
    servicer.set(READY, health_pb2.HealthCheckResponse.SERVING)
    servicer.set(LOADING, health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    servicer.over.set()
    server.stop(0).wait()


def ask(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--address", address, *arguments])


@pytest.mark.parametrize("arguments", [(), ("--service", READY)])
def test_a_serving_server_is_healthy(address, arguments):
    result = ask(address, *arguments)
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("service", "sentence"),
    [
        (LOADING, f"{LOADING} at {{address}} says NOT_SERVING"),
        ("example.Absent", "the server at {address} has no service 'example.Absent'"),
        (SILENT, "{address} did not answer within 0.3 s"),
    ],
)
def test_anything_but_serving_is_unhealthy(address, service, sentence):
    result = ask(address, "--service", service, "--timeout", "0.3")
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence.format(address=address) in result.stderr


def test_no_server_is_unhealthy():
    with socket.socket() as bound_but_not_listening:
        bound_but_not_listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound_but_not_listening.getsockname()[1]}"
        result = ask(address)
    assert result.exit_code == 1
    assert f"{address} cannot be asked (UNAVAILABLE)" in result.stderr


def test_the_module_runs_and_a_proxy_of_the_environment_is_not_used(address):
    command = [sys.executable, "-m", "outrider.serving.healthcheck", "--address", address, "--service", READY]
    environment = {"http_proxy": "http://127.0.0.1:1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
