"""Streams that say nothing, read nothing or never stop, and callers that want everything: they hurt nobody else."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import outrider.serving.health
import outrider.serving.reflection
import outrider.serving.service
import outrider_draft.servicer
from outrider.common.mailbox import Mailbox
from outrider.protocol.errors import SessionIdleError
from outrider.serving.calls import Call
from outrider.serving.service import MOST_QUESTIONS, ModelHost
from outrider.v1 import target_pb2
from outrider_draft.drafter import Drafter
from outrider_draft.servicer import MOST_UNAPPLIED, MOST_UNSENT
from tests.servers import DRAFT, PATIENCE_S, TARGET, RawStream, eventually
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

T = len(PROMPT)
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))  # what is sent to it soon waits


def another_connection(server, *options) -> grpc.Channel:
    """Return a channel that shares no connection with others to the same server."""
    own = (("grpc.use_local_subchannel_pool", 1), *options)
    return grpc.insecure_channel(server.address, options=own)


def session(kind, server, channel=None) -> RawStream:
    """Open a session whose first answer comes at once."""
    stub = kind.stub(channel) if channel else server.stub
    if kind is TARGET:
        return RawStream(stub.Verify, open_verification(), round_of(span(PROMPT)))
    return RawStream(stub.Propose, open_proposals())


def silent(kind, server) -> RawStream:
    return RawStream(server.stub.Verify if kind is TARGET else server.stub.Propose)


def reason_of(error: grpc.RpcError) -> tuple[str, float | None]:
    """Return the reason that the service gives, and the seconds of the RetryInfo where there is one."""
    info, retry, reason, delay_s = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), "", None
    for detail in rpc_status.from_call(error).details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            delay_s = retry.retry_delay.ToMilliseconds() / 1000
    return reason, delay_s


def end_of(stream: RawStream) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as end:
        list(stream.call)
    return end.value


# Streams that say nothing.


@KINDS
def test_a_stream_without_a_first_message_ends_and_has_no_place(services, models, monkeypatch, kind):
    monkeypatch.setattr(outrider.serving.service, "FIRST_MESSAGE_S", 0.2)
    server = services.start(kind, models.target_path, max_sessions=1)
    with silent(kind, server) as stream, session(kind, server) as speaking:
        speaking.receive()
        end = end_of(stream)
    assert end.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(end)[0] == "SESSION_IDLE"
    server.stop()


@KINDS
def test_a_session_that_falls_silent_is_ended(services, models, kind):
    server = services.start(kind, models.target_path, idle_timeout=0.1)
    with session(kind, server) as stream:
        end = end_of(stream)
    assert end.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(end)[0] == "SESSION_IDLE"
    server.wait_until_idle()
    server.stop()


def test_no_limit_is_no_limit(services, models):
    server = services.start(TARGET, models.target_path, idle_timeout=0)
    with session(TARGET, server) as stream:
        stream.receive()
        (call,) = server._servicer._host._calls
        assert call._timer is None or call._timer.cancelled()
    server.stop()


def test_a_call_is_silent_only_while_no_work_is_under_way():
    async def run() -> None:
        call, looks = Call(("a",)), itertools.count()
        call.is_busy = lambda: next(looks) < 3
        call.limit_silence(0.001, "nothing has come")
        with pytest.raises(SessionIdleError, match="nothing has come"):
            await call.wait(asyncio.Event().wait())
        assert next(looks) > 3

    asyncio.run(run())


def test_a_sign_of_life_puts_the_end_off():
    async def run() -> None:
        call = Call(("a",))
        call.limit_silence(0.05, "nothing has come")
        for _ in range(30):
            call.note_life()
            await call.wait(asyncio.sleep(0.005))
        call.close()

    asyncio.run(run())


def test_what_is_being_sent_goes_out_before_the_end():
    async def run() -> None:
        call = Call(("a",))
        call.end(SessionIdleError("over"))
        await asyncio.sleep(0)  # as a handler that writes
        with pytest.raises(SessionIdleError):
            await call.wait(asyncio.sleep(0))
        call.close()

    asyncio.run(run())


# Streams that do not read.


class SeenMailbox(Mailbox):
    """Remembers how full any of them was."""

    most = 0

    def put(self, item) -> None:
        super().put(item)
        SeenMailbox.most = max(SeenMailbox.most, len(self))


def flood(first: int, number: int):
    """Return commits that each make the draft draft again."""
    indices = range(first, first + number)
    return [commit_of(index, span([index % 7 + 1], T, PROMPT), window=T + 9) for index in indices]


def test_a_draft_drafts_nothing_for_whoever_does_not_read(services, models, monkeypatch):
    monkeypatch.setattr(SeenMailbox, "most", 0)
    monkeypatch.setattr(outrider_draft.servicer, "Mailbox", SeenMailbox)
    monkeypatch.setattr(outrider_draft.servicer, "IDLE_COMMITS_A_SECOND", 10_000.0)
    server = services.start(DRAFT, models.draft_path)
    applied = []
    commit = Drafter.commit
    monkeypatch.setattr(Drafter, "commit", lambda self, *its: (applied.append(1), commit(self, *its)))
    with (
        another_connection(server, *SMALL_WINDOW) as channel,
        RawStream(DRAFT.stub(channel).Propose, open_proposals(ahead=0)) as stream,
    ):
        number = filled_by = 0
        while SeenMailbox.most <= MOST_UNSENT or number < 2 * filled_by:
            filled_by = number if SeenMailbox.most <= MOST_UNSENT else filled_by  # the stream, and then the outbox
            for message in flood(number + 1, 100):
                stream.send(message)
            number += 100
            eventually(lambda so_many=number: len(applied) == so_many, "all commits are read, although no answer is")
        assert MOST_UNSENT < SeenMailbox.most <= MOST_UNSENT + 2
        drafted = iter(lambda: stream.receive(), None)
        last = next(response for response in drafted if response.commit_index == number)
        assert last.proposals, "when its client reads on, it drafts on"
    server.wait_until_idle()
    check_draft_serves(server, models.draft)
    server.stop()


def test_commits_wait_in_the_stream_while_a_pass_runs(services, models, monkeypatch, held_up):
    held_up.released.set()
    monkeypatch.setattr(outrider_draft.servicer, "IDLE_COMMITS_A_SECOND", 10_000.0)
    server = services.start(DRAFT, models.draft_path)
    read = []
    commit = Drafter.commit
    monkeypatch.setattr(Drafter, "commit", lambda self, *its: (read.append(1), commit(self, *its)))
    held_up.released.clear()
    held_up.entered.clear()
    with RawStream(server.stub.Propose, open_proposals()) as stream:
        held_up.entered.wait()
        for message in flood(1, 200):
            stream.send(message)
        eventually(lambda: len(read) == MOST_UNAPPLIED, "some are read")
        for _ in range(5):
            health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert len(read) == MOST_UNAPPLIED
        held_up.released.set()
        eventually(lambda: len(read) == 200, "and later all")
    server.wait_until_idle()
    server.stop()


def test_commits_that_nothing_is_drafted_between_are_read_one_after_the_other(services, models, monkeypatch):
    monkeypatch.setattr(outrider_draft.servicer, "IDLE_COMMITS_A_SECOND", 1e-9)
    server = services.start(DRAFT, models.draft_path)
    read = []
    commit = Drafter.commit
    monkeypatch.setattr(Drafter, "commit", lambda self, *its: (read.append(1), commit(self, *its)))
    with RawStream(server.stub.Propose, open_proposals(ahead=0)) as stream:
        for index in range(1, 200):
            stream.send(commit_of(index, span([3], T, PROMPT), window=T + 1))
        most = int(outrider_draft.servicer.IDLE_COMMITS) + 1
        eventually(lambda: len(read) == most, "as many as come at once")
        check_draft_serves(server, models.draft)
        assert len(read) == most
    server.stop()


@KINDS
def test_a_client_that_never_reads_is_ended_with_the_rest_of_its_session(services, models, kind):
    server = services.start(kind, models.target_path, idle_timeout=0.3)
    every_id = list(range(VOCAB_SIZE))

    def endless():
        yield open_verification() if kind is TARGET else open_proposals(ahead=0)
        if kind is TARGET:
            yield from itertools.repeat(round_of(span(PROMPT), [(3, every_id)] * 8), 2000)
        else:
            yield from flood(1, 2000)
        threading.Event().wait(PATIENCE_S)

    with another_connection(server, *SMALL_WINDOW) as channel:
        stub = kind.stub(channel)
        call = (stub.Verify if kind is TARGET else stub.Propose)(endless(), timeout=PATIENCE_S)
        eventually(lambda: server.num_sessions == 1, "it has opened")
        eventually(lambda: server.num_sessions == 0, "and was ended without having read")
        call.cancel()
    server.wait_until_idle()
    server.stop()


# Questions without a session.


def test_so_many_questions_are_answered_at_once_and_health_always(services, models, monkeypatch, held_up):
    held_up.released.set()
    server = services.start(TARGET, models.target_path)
    asked, stats = [], ModelHost.stats

    async def counting(self):
        asked.append(1)
        return await stats(self)

    monkeypatch.setattr(ModelHost, "stats", counting)
    held_up.released.clear()
    held_up.entered.clear()
    with session(TARGET, server) as stream, another_connection(server) as channel, ThreadPoolExecutor(1) as thread:
        held_up.entered.wait()
        question = target_pb2.TargetServiceGetModelInfoRequest()
        waiting = [server.stub.GetModelInfo.future(question, timeout=PATIENCE_S) for _ in range(100)]
        eventually(lambda: len(asked) == MOST_QUESTIONS // 4, "a quarter of them is one connection's")
        health = health_pb2_grpc.HealthStub(server.channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status == 1
        assert len(asked) == MOST_QUESTIONS // 4
        other = thread.submit(TARGET.stub(channel).GetModelInfo, question, timeout=PATIENCE_S)
        eventually(lambda: len(asked) == MOST_QUESTIONS // 4 + 1, "another's is asked at once")
        held_up.released.set()
        assert other.result().model.vocab_size == VOCAB_SIZE
        assert all(it.result().model.vocab_size == VOCAB_SIZE for it in waiting)
        stream.receive()
    server.stop()


def test_tokenizers_that_nobody_reads_keep_none_from_others(services, models, monkeypatch):
    server = services.start(TARGET, models.target_path)
    files = SimpleNamespace(tokenizer_json=b"x" * 4_000_000, chat_template="", special_tokens={})
    monkeypatch.setattr(ModelHost, "tokenizer", files)
    question = target_pb2.GetTokenizerRequest()
    unread = [server.stub.GetTokenizer(question, timeout=PATIENCE_S) for _ in range(100)]
    turns = server._servicer._host._questions
    eventually(lambda: turns._inside[()] == MOST_QUESTIONS // 4, "a quarter of them is one connection's")
    narrow = ("grpc.http2.bdp_probe", 0)  # otherwise its window grows, and takes all of an answer that nobody reads
    with another_connection(server, narrow) as channel:
        parts = list(TARGET.stub(channel).GetTokenizer(question, timeout=PATIENCE_S))
        assert sum(len(part.tokenizer_json) for part in parts) == len(files.tokenizer_json)
        monkeypatch.setattr(outrider.serving.service, "UNREAD_S", 1.0)
        ended: list[str] = []
        end = Call.end
        monkeypatch.setattr(Call, "end", lambda call, error: (ended.append(str(error)), end(call, error)))
        late = TARGET.stub(channel).GetTokenizer(question, timeout=PATIENCE_S)
        eventually(lambda: ended == ["nothing has been read for 1 s: open a new stream"], "it is ended, and no other")
        late.cancel()
    for call in unread:
        call.cancel()
    eventually(lambda: not turns._inside[()], "those that have gone are forgotten")
    server.stop()


WATCH = health_pb2.HealthCheckRequest(service=TARGET.name)


def test_watches_of_one_caller_keep_none_from_others(services, models, monkeypatch):
    monkeypatch.setattr(outrider.serving.health, "MOST_WATCHES", 16)
    server = services.start(TARGET, models.target_path)
    mine = [health_pb2_grpc.HealthStub(server.channel).Watch(WATCH, timeout=PATIENCE_S) for _ in range(40)]
    assert [next(watch).status for watch in mine] == [1] * 40
    watched = server._server._health._watches._inside
    eventually(lambda: watched[()] == 4, "a quarter of them is one connection's")
    with another_connection(server) as channel:
        neighbour = health_pb2_grpc.HealthStub(channel).Watch(WATCH, timeout=PATIENCE_S)
        assert next(neighbour).status == 1
        assert watched[()] == 5
        server.shut_down()
        assert [response.status for response in neighbour] == [2]
    server.stop()


QUESTION = reflection_pb2.ServerReflectionRequest(file_containing_symbol=TARGET.name)


def questions(server, channel=None) -> Callable:
    """Return the method by which a server is asked for its interface."""
    return reflection_pb2_grpc.ServerReflectionStub(channel or server.channel).ServerReflectionInfo


def test_questions_about_the_interface_leave_time_to_others(services, models, monkeypatch):
    monkeypatch.setattr(outrider.serving.reflection, "SILENCE_S", PATIENCE_S)
    server = services.start(TARGET, models.target_path)
    asked, answer = [], outrider.serving.reflection.ReflectionServicer._file_containing_symbol
    monkeypatch.setattr(
        outrider.serving.reflection.ReflectionServicer,
        "_file_containing_symbol",
        lambda self, *question: (asked.append(1), answer(self, *question))[1],
    )
    mine = [RawStream(questions(server), QUESTION) for _ in range(40)]
    eventually(
        lambda: len(asked) == outrider.serving.reflection.MOST_STREAMS // 4, "a quarter of them is one connection's"
    )
    with another_connection(server) as channel, RawStream(questions(server, channel), QUESTION) as neighbour:
        assert neighbour.receive().file_descriptor_response.file_descriptor_proto
        monkeypatch.setattr(outrider.serving.reflection, "PAUSE_S", PATIENCE_S)
        num_asked = len(asked)
        for _ in range(100):
            neighbour.send(QUESTION)
        check_target_serves(server, models.target)
        assert len(asked) <= num_asked + 1
    for stream in mine:
        stream.cancel()
    turns = server._server._reflection._turns
    eventually(lambda: not turns._inside[()] and not turns._waiting, "those that have gone are forgotten")
    server.stop()


def test_who_asks_nothing_about_the_interface_is_ended(services, models, monkeypatch):
    monkeypatch.setattr(outrider.serving.reflection, "SILENCE_S", 0.1)
    server = services.start(TARGET, models.target_path)
    with RawStream(questions(server)) as stream:
        end = end_of(stream)
    assert end.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(end)[0] == "SESSION_IDLE"
    server.stop()


# Openings and places.


@KINDS
def test_who_opens_and_leaves_in_a_loop_is_slowed_and_its_neighbour_is_not(services, models, monkeypatch, kind):
    assert outrider.serving.service.MOST_OPENINGS // 4 == 64, "of one connection at once"
    monkeypatch.setattr(outrider.serving.service, "MOST_OPENINGS", 32)
    monkeypatch.setattr(outrider.serving.service, "ABANDONED_S", PATIENCE_S)
    server = services.start(kind, models.target_path, max_sessions=1000)
    opened = server._servicer._host._places
    for _ in range(20):  # those that are answered count no longer
        with session(kind, server) as stream:
            stream.receive()
    for number in range(21, 29):
        with silent(kind, server) as stream:
            stream.send(open_verification() if kind is TARGET else open_proposals(ahead=0))
            eventually(lambda so_many=number: opened.num_opened == so_many, "it has opened, and has no answer")
    waiting = [session(kind, server) for _ in range(20)]
    with another_connection(server) as channel, session(kind, server, channel) as neighbour:
        neighbour.receive()
    assert opened.num_opened == 29
    for stream in waiting:
        stream.cancel()
    turns = server._servicer._host._openings
    eventually(lambda: not turns._waiting, "who goes away while it waits leaves nothing")
    assert opened.num_opened == 29
    server.stop()


@KINDS
def test_a_newcomer_gets_the_youngest_session_of_whoever_has_all(services, models, kind):
    server = services.start(kind, models.target_path, max_sessions=3)
    mine = []
    for number in range(1, 4):  # one after the other: calls that are made at once may arrive in any order
        mine.append(session(kind, server))
        mine[-1].receive()
        assert server.num_sessions == number
    with another_connection(server) as channel, session(kind, server, channel) as newcomer:
        newcomer.receive()
        end = end_of(mine[-1])
        assert end.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, delay_s = reason_of(end)
        assert reason == "FULL"
        assert 1 <= delay_s <= 10
        with session(kind, server, channel) as second:  # two to one is not clearly more
            assert end_of(second).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.num_sessions == 3
        if kind is TARGET:
            for stream in mine[:2]:
                stream.ask(round_of(span(PROMPT), [(3, [3])]))
    for stream in mine:
        stream.cancel()
    server.wait_until_idle()
    server.stop()


@KINDS
def test_a_caller_has_no_more_sessions_than_one_may_have(services, models, kind):
    server = services.start(kind, models.target_path, max_sessions_per_caller=2)
    assert server.model_info().model.limits.max_sessions_per_caller == 2
    with session(kind, server) as one, session(kind, server) as two, another_connection(server) as channel:
        one.receive()
        two.receive()
        with session(kind, server) as third:
            end = end_of(third)
        assert end.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(end)[1] >= 1
        with session(kind, server, channel) as neighbour:
            neighbour.receive()
        one.cancel()
        eventually(lambda: server.num_sessions == 1, "two are left")
        with session(kind, server) as another:
            another.receive()
    server.wait_until_idle()
    server.stop()


def test_delays_grow_with_those_refused_and_are_jittered(services, models):
    server = services.start(TARGET, models.target_path, max_sessions=1)
    with session(TARGET, server) as stream:
        stream.receive()
        delays = [reason_of(end_of(session(TARGET, server)))[1] for _ in range(60)]
    assert all(1 <= delay_s <= 10 for delay_s in delays)
    assert len(set(delays)) > 30
    assert sum(delays[-10:]) > sum(delays[:10])
    server.stop()


def test_vandals_leave_a_service_as_it_was(services, models):
    server = services.start(TARGET, models.target_path)
    for _ in range(40):
        session(TARGET, server).cancel()
        RawStream(server.stub.Verify, open_verification([1] * CONTEXT_LENGTH)).cancel()
    server.wait_until_idle()
    check_target_serves(server, models.target)
    host = server._servicer._host
    server.channel.close()
    eventually(lambda: not host._calls, "no call is left")
    assert len(host._places._numbers) == 0
    server.stop()
