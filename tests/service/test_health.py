"""Health follows the model: not serving while it loads and once a shutdown has begun, serving in between."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import outrider.serving.service
from outrider.engine.models.loader import ModelRefusedError
from outrider.serving.health import HealthServicer
from outrider.serving.server import _unless_signalled
from outrider_draft import drafter
from outrider_target import scheduler
from tests.servers import DRAFT, PATIENCE_S, TARGET, RawStream, eventually
from tests.service.conftest import KINDS, open_proposals, open_verification, round_of, span
from tests.service.test_status_codes import reason_of

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def opening_call(kind, server):
    if kind is TARGET:
        return RawStream(server.stub.Verify, open_verification(), round_of(span([1, 2])))
    return RawStream(server.stub.Propose, open_proposals())


def health_of(server, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(server.channel).Check(request, timeout=PATIENCE_S, wait_for_ready=True).status


@KINDS
def test_a_service_is_unavailable_until_its_model_is_warm(services, models, monkeypatch, kind):
    loading, may_load, load = threading.Event(), threading.Event(), outrider.serving.service.load

    def slow_load(options):
        loading.set()
        may_load.wait()
        return load(options)

    monkeypatch.setattr(outrider.serving.service, "load", slow_load)
    server = services.listen(kind, models.draft_path)
    starting = threading.Thread(target=server.load)
    starting.start()
    loading.wait()
    assert (health_of(server, ""), health_of(server, kind.name)) == (SERVING, NOT_SERVING)
    with pytest.raises(grpc.RpcError) as refusal:
        server.model_info()
    assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
    with opening_call(kind, server) as stream, pytest.raises(grpc.RpcError) as refusal:
        stream.receive()
    assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
    may_load.set()
    starting.join()
    assert health_of(server, kind.name) == SERVING
    with opening_call(kind, server) as stream:
        stream.receive()
    server.stop()


@KINDS
def test_a_shutdown_is_announced_and_lets_running_sessions_end(services, models, kind):
    server = services.start(kind, models.draft_path)
    watch = health_pb2_grpc.HealthStub(server.channel).Watch(
        health_pb2.HealthCheckRequest(service=kind.name), timeout=PATIENCE_S
    )
    assert next(watch).status == SERVING
    with opening_call(kind, server) as stream:
        eventually(lambda: server.num_sessions == 1, "the session is open")
        stopping = threading.Thread(target=server.shut_down, args=[PATIENCE_S])
        stopping.start()
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        with opening_call(kind, server) as late, pytest.raises(grpc.RpcError) as refusal:
            late.receive()
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
        assert reason_of(refusal.value) == "NOT_READY"
        with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as newcomer:
            stub = health_pb2_grpc.HealthStub(newcomer)
            for name in ("", kind.name):
                asked = health_pb2.HealthCheckRequest(service=name)
                assert stub.Check(asked, timeout=PATIENCE_S).status == NOT_SERVING
        stream.receive()
        assert stopping.is_alive()
        stream.half_close()
    stopping.join()
    server.stop()


@KINDS
def test_a_stream_that_waits_to_be_read_is_told_of_a_shutdown_in_words(services, models, monkeypatch, kind):
    monkeypatch.setattr(outrider.serving.service, "MOST_OPENINGS", 4)  # one of a connection
    server = services.start(kind, models.draft_path)
    method = server.stub.Verify if kind is TARGET else server.stub.Propose
    turns = server._servicer._host._openings
    with RawStream(method), RawStream(method) as waiting:
        eventually(lambda: turns._waiting, "one waits for the other")
        server.shut_down(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as end:
            waiting.receive()
    assert end.value.code() == grpc.StatusCode.UNAVAILABLE
    assert reason_of(end.value) == "NOT_READY"
    server.stop()


@pytest.mark.parametrize("num_turns", [0, 1, 2])
def test_a_signal_that_comes_with_the_end_of_the_work_is_not_lost(num_turns):
    async def run() -> int:
        signals: asyncio.Queue[int] = asyncio.Queue()

        async def work() -> None:
            loop = asyncio.get_running_loop()
            send = functools.partial(signals.put_nowait, signal.SIGTERM)
            for _ in range(num_turns):
                send = functools.partial(loop.call_soon, send)
            send()

        first = await _unless_signalled(work(), signals)
        return first or await asyncio.wait_for(signals.get(), PATIENCE_S)

    assert asyncio.run(run()) == signal.SIGTERM


def test_a_watcher_is_told_whoever_else_has_left(services, models):
    server = services.start(TARGET, models.target_path)
    stub, request = health_pb2_grpc.HealthStub(server.channel), health_pb2.HealthCheckRequest(service=TARGET.name)
    watches = [stub.Watch(request, timeout=PATIENCE_S) for _ in range(3)]
    assert [next(watch).status for watch in watches] == [SERVING] * 3
    watches[0].cancel()
    eventually(lambda: server._server._health._watches._inside[()] == 2, "one has left")
    server.shut_down()
    for watch in watches[1:]:
        assert [response.status for response in watch] == [NOT_SERVING]
    server.stop()


def test_a_watcher_who_reads_late_is_told_of_a_shutdown_too():
    """What comes while a status is on its way out is reported before the watch ends."""

    async def run() -> list[int]:
        health = HealthServicer()
        watch = health.Watch(health_pb2.HealthCheckRequest(), SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1"))
        statuses = [(await anext(watch)).status]
        health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        health.end_watches()
        return [*statuses, *[response.status async for response in watch]]

    assert asyncio.run(run()) == [1, 2]


def test_a_service_that_nobody_knows_is_told_so(target):
    stub, request = health_pb2_grpc.HealthStub(target.channel), health_pb2.HealthCheckRequest(service="nobody")
    with pytest.raises(grpc.RpcError) as refusal:
        stub.Check(request, timeout=PATIENCE_S)
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(request, timeout=PATIENCE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_a_session_that_outlasts_the_grace_time_is_cut_off(services, models):
    server = services.start(TARGET, models.target_path)
    with opening_call(TARGET, server) as stream:
        stream.receive()
        server.shut_down(grace_s=0.2)
        with pytest.raises(grpc.RpcError) as cut:
            stream.receive()
    server.stop()
    assert cut.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_a_port_that_is_taken_is_refused_to_a_second_server(services, models):
    server = services.start(TARGET, models.target_path)
    with pytest.raises(RuntimeError, match="bind"):
        services.listen(TARGET, models.target_path, listen=server.address)
    assert health_of(server, TARGET.name) == SERVING
    server.stop()


def test_a_model_that_is_refused_ends_its_server(services, tmp_path):
    server = services.listen(TARGET, str(tmp_path))
    with pytest.raises(ModelRefusedError):
        server.load()
    with pytest.raises(grpc.RpcError):
        server.model_info()


@pytest.mark.parametrize(
    ("kind", "module", "reader"),
    [(TARGET, scheduler, "begin_reading"), (DRAFT, drafter, "draft_tokens")],
    ids=["target", "draft"],
)
def test_a_model_that_loads_and_cannot_serve_ends_its_server(services, models, monkeypatch, kind, module, reader):
    def fails(*arguments):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(module, reader, fails)
    server = services.listen(kind, models.target_path)
    with pytest.raises(ModelRefusedError, match="does not run here"):
        server.load()
    with pytest.raises(grpc.RpcError):
        server.model_info()


@pytest.mark.parametrize(
    ("kind", "module", "reader"),
    [(TARGET, scheduler, "begin_reading"), (DRAFT, drafter, "draft_tokens")],
    ids=["target", "draft"],
)
def test_a_service_is_warm_for_filters_too(services, models, monkeypatch, kind, module, reader):
    """Their rows may be of another type, for which code is compiled: for seconds, in which everybody waits."""
    read, seen = getattr(module, reader), []

    def note(logits, all_params, *others):
        seen.extend(all_params)
        return read(logits, all_params, *others)

    monkeypatch.setattr(module, reader, note)
    server = services.start(kind, models.target_path)
    assert {params.has_filters for params in seen} == {True, False}
    server.stop()


@KINDS
def test_reflection_lists_the_service(target, draft, kind):
    stub = reflection_pb2_grpc.ServerReflectionStub((target if kind is TARGET else draft).channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=PATIENCE_S)
    assert {kind.name, "grpc.health.v1.Health"} <= {service.name for service in answer.list_services_response.service}


def test_health_answers_while_a_forward_pass_runs(target, held_up):
    with opening_call(TARGET, target) as stream:
        held_up.entered.wait()
        assert health_of(target, TARGET.name) == SERVING
        held_up.released.set()
        stream.receive()
