"""Services as processes, and signals: a shutdown lets sessions end on the open port, a second signal does not wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from subprocess import PIPE

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.v1 import draft_pb2_grpc, target_pb2_grpc
from tests import tiny_models
from tests.e2e.conftest import FAMILY
from tests.servers import DRAFT, PATIENCE_S, TARGET, Kind, RawStream, ServiceProcess, eventually, python_process
from tests.service.conftest import PROMPT, commit_of, open_proposals, open_verification, round_of, span

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[dict[str, ServiceProcess]]:
    """Start all processes at once; each test ends one."""
    folder = tmp_path_factory.mktemp("shutdown")
    model = tiny_models.save(tiny_models.make_model(FAMILY, 1), folder / "model")
    kinds = {"first signal": TARGET, "second signal": DRAFT}
    processes = {name: ServiceProcess(kind.module, model, grace=PATIENCE_S) for name, kind in kinds.items()}
    yield processes
    for process in processes.values():
        process.kill()


def health_of(channel: grpc.Channel, kind: Kind) -> int:
    request = health_pb2.HealthCheckRequest(service=kind.name)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S, wait_for_ready=True).status


def test_a_shutdown_waits_for_the_last_session_with_its_port_open(processes):
    process = processes["first signal"]
    with grpc.insecure_channel(process.address) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        with RawStream(stub.Verify, open_verification(), round_of(span(PROMPT))) as stream:
            stream.receive()
            process.terminate()
            eventually(lambda: health_of(channel, TARGET) == NOT_SERVING, "health says so")
            with RawStream(stub.Verify, open_verification()) as late, pytest.raises(grpc.RpcError) as refusal:
                late.receive()
            assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
            assert len(stream.ask(round_of(span(PROMPT), [(3, [3])])).rows) == 1
            assert stream.half_close() == []
        assert process.wait() == 0


def test_a_second_signal_ends_what_still_runs(processes):
    process = processes["second signal"]
    with grpc.insecure_channel(process.address) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        with RawStream(stub.Propose, open_proposals()) as stream:
            stream.receive()
            process.terminate()
            eventually(lambda: health_of(channel, DRAFT) == NOT_SERVING, "health says so")
            stream.send(commit_of(1, span([3], len(PROMPT), PROMPT), window=len(PROMPT) + 9))
            while stream.receive().commit_index != 1:
                pass
            process.process.send_signal(signal.SIGINT)
            with pytest.raises(grpc.RpcError) as end:
                list(stream.call)
    assert end.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert process.wait() == 128 + signal.SIGINT


LOADS_FOR_EVER = """
import threading
from outrider.serving.options import needs_serve_extra
with needs_serve_extra():
    import outrider.serving.service
outrider.serving.service.load = lambda options: print("loading", flush=True) or threading.Event().wait()
from outrider_target.__main__ import main
main(["--listen=127.0.0.1:0"])
"""


def test_a_service_that_loads_ends_at_a_signal_and_has_said_nothing_of_garbage_that_grpc_refuses_by_itself():
    too_much = [(f"name{index}", "value") for index in range(1000)]
    with python_process("-c", LOADS_FOR_EVER, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "loading\n"
        line = next(line for line in process.stderr if "listening on" in line)
        with grpc.insecure_channel(line.split("listening on ")[1].split(",")[0]) as channel:
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as refusal:
                    channel.unary_unary("/nobody/nothing")(b"", metadata=too_much, timeout=PATIENCE_S)
                assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == ""
        assert process.wait(timeout=PATIENCE_S) == 0
