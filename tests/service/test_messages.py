"""Bytes that are no message, too large or compressed: refused by both services before they are parsed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from outrider.serving.calls import RareLog
from outrider.serving.messages import MOST_OTHER_BYTES, most_bytes
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from tests.servers import DRAFT, PATIENCE_S, TARGET, RawStream
from tests.service.conftest import (
    CONTEXT_LENGTH,
    KINDS,
    PROMPT,
    VOCAB_SIZE,
    check_draft_serves,
    check_target_serves,
    commit_of,
    open_proposals,
    open_verification,
    round_of,
    span,
)

MOST_32, MOST_64 = 2**32 - 1, 2**64 - 1
GARBAGE = {
    "random": np.random.default_rng(1).bytes(200),
    "no wire type": b"\x07" * 8,
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "bytes that are no UTF-8": target_pb2.VerifyRequest(
        open=target_pb2.OpenVerification(model_identity="abc")
    ).SerializeToString().replace(b"abc", b"\xff\xfe\xfd"),
    "groups without an end": b"\x0b" * 1000,
}  # fmt: skip


def method(kind, server, name: str = "") -> Callable:
    """Return a method of the server that sends bytes as they are."""
    name = name or {TARGET: "Verify", DRAFT: "Propose"}[kind]
    return server.channel.stream_stream(f"/{kind.name}/{name}")


def openings(kind) -> bytes:
    return (open_verification() if kind is TARGET else open_proposals(ahead=0)).SerializeToString()


def refusal_of(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refusal:
        list(call)
    return refusal.value


def check_invalid(error: grpc.RpcError) -> None:
    """Assert that the service itself says that the request is wrong."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    assert info.reason == "INVALID_FIELD"


@pytest.fixture
def servers(target, draft, models) -> dict:
    return {TARGET: (target, models.target, check_target_serves), DRAFT: (draft, models.draft, check_draft_serves)}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("place", ["first", "later"])
@KINDS
def test_garbage_is_invalid_and_its_place_is_free_again(servers, kind, place, garbage):
    server, model, check = servers[kind]
    messages = [openings(kind)] if place == "later" else []
    with RawStream(method(kind, server), *messages, garbage) as stream:
        check_invalid(refusal_of(stream.call))
    server.wait_until_idle()
    check(server, model)


@KINDS
def test_garbage_is_said_in_the_log_once_a_second_and_without_a_trace(servers, kind, caplog, monkeypatch):
    server, _, _ = servers[kind]
    monkeypatch.setattr("outrider.serving.calls.LOG_INTERVAL_S", PATIENCE_S)
    with caplog.at_level(logging.INFO):
        for garbage in [*GARBAGE.values(), b"\xff" * 100_000_0] * 3:
            check_invalid(refusal_of(method(kind, server)(iter([garbage]), timeout=PATIENCE_S)))
    assert len(caplog.records) <= 1
    assert all(record.exc_info is None for record in caplog.records)


def test_a_rare_log_says_each_kind_again_after_a_second(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = RareLog(logging.getLogger("rare"))
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            log.say("one", "first %d", 1)
        log.say("two", "second")
        now = 102.0
        log.say("one", "first %d", 2)
    assert [record.getMessage() for record in caplog.records] == ["first 1", "second", "first 2 (4 more like it)"]


COMPRESSIONS = {
    "gzip": {"compression": grpc.Compression.Gzip},
    "deflate": {"compression": grpc.Compression.Deflate},
}


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("size", [1000, 200_000, 8_000_000])
@KINDS
def test_what_is_compressed_is_refused_and_never_inflated(servers, kind, size, compression):
    server, model, check = servers[kind]
    inflated = target_pb2.VerifyRequest(open=target_pb2.OpenVerification(model_identity="x" * size))
    call = method(kind, server)(iter([inflated.SerializeToString()]), timeout=PATIENCE_S, **compression)
    error = refusal_of(call)
    check_invalid(error)
    assert "uncompressed" in error.details()
    check(server, model)


def test_a_channel_that_compresses_everything_is_refused(target, models):
    options = (("grpc.default_compression_algorithm", 2),)
    with grpc.insecure_channel(target.address, options=options) as channel:
        stub = TARGET.stub(channel)
        with RawStream(stub.Verify, open_verification([1] * CONTEXT_LENGTH)) as stream:
            check_invalid(refusal_of(stream.call))
    check_target_serves(target, models.target)


UNARY = {
    "target's description": (TARGET, "GetModelInfo"),
    "draft's description": (DRAFT, "GetModelInfo"),
    "tokenizer": (TARGET, "GetTokenizer"),
}


@pytest.mark.parametrize(("kind", "name"), UNARY.values(), ids=UNARY)
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_as_a_question_is_invalid(servers, kind, name, garbage):
    server, _, _ = servers[kind]
    try:
        answers = list(method(kind, server, name)(iter([garbage]), timeout=PATIENCE_S))
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:  # read as unknown fields, and this target has no tokenizer
            check_invalid(error)
    else:
        assert len(answers) == 1


@pytest.mark.parametrize("name", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch",
                                  "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"])  # fmt: skip
@pytest.mark.parametrize("garbage", [b"\x07" * 8, b"\x0a" + b"\xff" * 70_000], ids=["short", "long"])
def test_what_stands_beside_the_service_is_guarded_alike(target, name, garbage, caplog):
    call = target.channel.stream_stream(f"/{name}")(iter([garbage]), timeout=PATIENCE_S)
    check_invalid(refusal_of(call))
    assert not [record for record in caplog.records if record.exc_info]


# How large a message may be.


def test_a_bound_holds_whatever_keeps_the_limits():
    context, proposals, support = 300, 5, 700
    ids = b"\xff" * 4 * context
    everything = common_pb2.TokenSpan(token_ids=ids, prefix_digest=MOST_64)
    open_all = target_pb2.VerifyRequest(
        open=target_pb2.OpenVerification(committed=everything, model_identity="0" * 32, seed=MOST_64)
    )
    largest = target_pb2.ProposedToken(token_id=2**32 - 1, support_gaps=[2**32 - 1] * support)
    round_all = target_pb2.VerifyRequest(
        round=target_pb2.Round(committed=common_pb2.TokenSpan(token_ids=ids), proposals=[largest] * proposals)
    )
    draft_all = draft_pb2.ProposeRequest(
        open=draft_pb2.OpenProposals(
            committed=common_pb2.TokenSpan(token_ids=ids),
            tokenizer=common_pb2.TokenizerFingerprint(num_pieces=2**22, block_digests=[2**64 - 1] * 2**12),
        )
    )
    assert max(map(len, (open_all.SerializeToString(), draft_all.SerializeToString()))) <= most_bytes(context)
    assert len(round_all.SerializeToString()) <= most_bytes(context, proposals, support)
    assert most_bytes(2**40) < 2**31


@KINDS
def test_a_message_larger_than_the_context_needs_is_refused_before_it_is_parsed(servers, kind):
    server, _, _ = servers[kind]
    limits = server.model_info().model.limits
    most = most_bytes(CONTEXT_LENGTH, limits.max_proposals, limits.max_support)
    for size, is_parsed in ((most, True), (most + 1, False)):
        error = refusal_of(method(kind, server)(iter([b"\x07" * size]), timeout=PATIENCE_S))
        check_invalid(error)
        assert ("cannot be read" in error.details()) == is_parsed
        assert is_parsed or f"{most + 1} bytes" in error.details()
    assert most < MOST_OTHER_BYTES + 4 * CONTEXT_LENGTH + 400_000


@KINDS
def test_what_no_model_needs_is_refused_by_grpc(servers, kind):
    server, _, _ = servers[kind]
    error = refusal_of(method(kind, server)(iter([b"\0" * 8_000_000]), timeout=PATIENCE_S))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_prompt_and_a_round_at_the_limits_are_served(services, models):
    server = services.start(TARGET, models.target_path, max_proposals=4, max_support=VOCAB_SIZE)
    prompt, every_id = [1] * (CONTEXT_LENGTH - 4), list(range(VOCAB_SIZE))
    with RawStream(
        server.stub.Verify, open_verification(prompt), round_of(span(prompt), [(3, every_id)] * 4)
    ) as stream:
        assert len(stream.receive().rows) == 4
    server.stop()


def test_a_support_above_the_limit_is_refused_by_name(services, models):
    server = services.start(TARGET, models.target_path, max_support=3)
    with RawStream(server.stub.Verify, open_verification(), round_of(span(PROMPT), [(1, [1, 2, 3])])) as stream:
        stream.receive()
        stream.send(round_of(span(PROMPT), [(1, [1, 2, 3]), (1, [1, 2, 3, 4])]))
        error = refusal_of(stream.call)
    check_invalid(error)
    assert "proposals[1].support_gaps" in error.details()
    check_target_serves(server, models.target)
    server.stop()


def test_a_draft_keeps_its_own_limit_of_supports(services, models):
    server = services.start(DRAFT, models.draft_path, max_support=3)
    for asked in (0, 2, 3):
        with RawStream(server.stub.Propose, open_proposals(max_support=asked)) as stream:
            response = stream.receive()
        assert max(len(it.support_gaps) for it in response.proposals) <= (asked or 3)
    with RawStream(server.stub.Propose, open_proposals(max_support=4)) as stream:
        check_invalid(refusal_of(stream.call))
    server.stop()


# Numbers at the ends of their types: in range, or refused by name.


def later_round(**fields) -> list[target_pb2.VerifyRequest]:
    message = round_of(span(PROMPT), [(3, [3])])
    for name, value in fields.items():
        setattr(message.round, name, value)
    return [open_verification(), message]


def opened(message, **fields):
    for name, value in fields.items():
        setattr(message.open, name, value)
    return message


def committing(**fields) -> list[draft_pb2.ProposeRequest]:
    message = commit_of(1, span([3], len(PROMPT), PROMPT), window=len(PROMPT) + 2)
    for name, value in fields.items():
        setattr(message.commit, name, value)
    return [open_proposals(ahead=0), message]


def with_span(message, field: str, **fields):
    committed = getattr(message, field)
    committed = committed.span if field == "commit" else committed.committed
    for name, value in fields.items():
        setattr(committed, name, value)
    return message


EXTREMES = {
    "seed": (TARGET, [opened(open_verification(), seed=MOST_64), round_of(span(PROMPT))], None),
    "seed with shared noise": (TARGET, [opened(open_verification(shared_noise=True), seed=MOST_64),
                                        round_of(span(PROMPT))], None),
    "round_index": (TARGET, later_round(round_index=MOST_32), None),
    "start_position": (TARGET, [with_span(open_verification(), "open", start_position=MOST_32)], "start_position"),
    "prefix_digest": (TARGET, [open_verification(), with_span(round_of(span(PROMPT)), "round", prefix_digest=MOST_64)],
                      "prefix_digest"),
    "round's start_position": (TARGET, [open_verification(), with_span(round_of(span(PROMPT)), "round",
                                        start_position=MOST_32)], "start_position"),
    "draft's seed": (DRAFT, [open_proposals(seed=MOST_64)], None),
    "draft's seed with shared noise": (DRAFT, [open_proposals(seed=MOST_64, shared_noise=True)], None),
    "branch": (DRAFT, [open_proposals(branch=MOST_32)], None),
    "vocab_size": (DRAFT, [open_proposals(vocab_size=MOST_32)], None),
    "one id": (DRAFT, [open_proposals(vocab_size=1)], None),
    "max_alternatives": (DRAFT, [open_proposals(max_alternatives=MOST_32, batch_until=8)], None),
    "max_support": (DRAFT, [open_proposals(max_support=MOST_32)], "max_support"),
    "window": (DRAFT, [open_proposals(window=MOST_32)], "window"),
    "draft's start_position": (DRAFT, [with_span(open_proposals(), "open", start_position=MOST_32)], "start_position"),
    "commit_index": (DRAFT, committing(commit_index=MOST_32), "commit_index"),
    "commit's branch": (DRAFT, committing(branch=MOST_32), None),
    "commit's window": (DRAFT, committing(window=MOST_32), "window"),
    "commit's start_position": (DRAFT, [open_proposals(ahead=0), with_span(committing()[1], "commit",
                                        start_position=MOST_32)], "window"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "messages", "field"), EXTREMES.values(), ids=EXTREMES)
def test_a_number_at_the_end_of_its_type_is_served_or_refused_by_name(servers, kind, messages, field):
    server, model, check = servers[kind]
    with RawStream(server.stub.Verify if kind is TARGET else server.stub.Propose, *messages) as stream:
        if field is None:
            stream.receive()
        else:
            error = refusal_of(stream.call)
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
            assert field in error.details()
    check(server, model)


# What is no call at all.


def test_other_junk_on_the_port_harms_nobody(target, models):
    junk = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", np.random.default_rng(2).bytes(100_000), b"",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000]  # fmt: skip
    for data in junk:
        with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S) as connection:
            connection.sendall(data)
    with pytest.raises(grpc.RpcError) as unknown:
        list(target.channel.stream_stream(f"/{TARGET.name}/Nothing")(iter([b""]), timeout=PATIENCE_S))
    assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError):
        list(target.stub.Verify(iter([]), metadata=[("x", "y" * 1_000_000)], timeout=PATIENCE_S))
    with RawStream(target.stub.Verify, open_verification(), timeout=0) as stream, pytest.raises(grpc.RpcError) as late:
        stream.receive()
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert health_pb2_grpc.HealthStub(target.channel).Check(health_pb2.HealthCheckRequest()).status == 1
    check_target_serves(target, models.target)
