"""A draft can only help: whatever it does, the text is to the letter the target's own, and nobody is blamed for it.

And the target is not believed blindly. Both are toys behind real gRPC servers, which break the protocol in every way
that was thought of; each case is one text of a seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from outrider import (
    AsyncSpeculativeClient,
    DeadlineExceededError,
    IncompatiblePairError,
    ModelChangedError,
    OutriderError,
    Patience,
    SamplingParams,
    ServiceFailedError,
    ServiceUnavailableError,
    SpeculativeClient,
)
from outrider.protocol.errors import SessionIdleError
from outrider.v1 import common_pb2, draft_pb2
from outrider_client.results import GenerationResult
from tests import toy_servers, toy_services
from tests.servers import shared_services
from tests.toy_servers import ToyServer, abort, honest_draft, honest_target, info_of, wait_until_gone

PROMPT = [3, 1, 4]
SAMPLING = SamplingParams(seed=11, max_new_tokens=24)
PATIENCE = Patience(draft_wait_s=0.15, describe_draft_s=0.3, retry_s=1.0, first_backoff_s=0.02, round_s=30.0)
BOTH_CLIENTS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "aio"])


@pytest.fixture(scope="module")
def target() -> Iterator[ToyServer]:
    with ToyServer("target", honest_target) as server:
        yield server


@pytest.fixture(scope="module")
def texts(target) -> dict[str, list[int]]:
    """The seed's text of the target only, under each rule."""
    with SpeculativeClient(target.address) as client:
        return {
            rule: client.generate(PROMPT, SAMPLING, method="autoregressive", rule=rule).token_ids
            for rule in ("shared_noise", "rejection")
        }


def write(target: str, draft: str | None, is_async: bool = False, prompt: Any = PROMPT, **how: Any) -> GenerationResult:
    """Return a text from a client of its own."""
    arguments = (prompt, how.pop("sampling", SAMPLING))
    settings = {"patience": how.pop("patience", PATIENCE), "connect_timeout": how.pop("connect_timeout", 10.0)}
    how = {"num_speculative_tokens": 4, "timeout": 60.0} | how
    if not is_async:
        with SpeculativeClient(target, draft, **settings) as client:
            return client.generate(*arguments, **how)

    async def with_client() -> GenerationResult:
        async with AsyncSpeculativeClient(target, draft, **settings) as client:
            return await client.generate(*arguments, **how)

    return shared_services().run(with_client())


# What a draft may do. Each returns a handler.


def refuses(code: grpc.StatusCode, retry_delay_s: float | None = None) -> toy_servers.Answer:
    def answer(requests, context):
        if retry_delay_s is not None:
            info = any_pb2.Any()
            info.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=int(retry_delay_s))))
            status = status_pb2.Status(code=code.value[0], message="full", details=[info])
            context.set_trailing_metadata(rpc_status.to_status(status).trailing_metadata)
        context.abort(code, "it does not want to")
        yield

    return answer


def garbage_details(kind: str) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata that explains an error by a detail of a known kind that cannot be read."""
    detail = any_pb2.Any(type_url=f"type.googleapis.com/google.rpc.{kind}", value=b"\xff\xff\xff")
    code, message = grpc.StatusCode.UNAVAILABLE.value[0], "it does not want to"
    status = status_pb2.Status(code=code, message=message, details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()),)


DETAILS = [garbage_details("RetryInfo"), garbage_details("ErrorInfo"), (("grpc-status-details-bin", b"\xff" * 20),)]


def explains(metadata: tuple[tuple[str, bytes], ...]) -> toy_servers.Answer:
    def answer(requests, context):
        explain_info(metadata)(context)
        yield

    return answer


def explain_info(metadata: tuple[tuple[str, bytes], ...]) -> Callable[[grpc.ServicerContext], common_pb2.ModelInfo]:
    def info(context: grpc.ServicerContext) -> common_pb2.ModelInfo:
        context.set_trailing_metadata(metadata)
        return context.abort(grpc.StatusCode.UNAVAILABLE, "it does not want to")

    return info


def spoils(change: Callable[[draft_pb2.ProposeResponse], Any], after: int = 0) -> toy_servers.Answer:
    """Have every message but the first `after` changed; what `change` returns, if anything, is sent instead."""

    def answer(requests, context):
        for number, response in enumerate(honest_draft(requests, context)):
            instead = change(response) if number >= after else None
            yield from [response] if instead is None else instead

    return answer


def sets(**values: Any) -> toy_servers.Answer:
    return spoils(lambda it: [setattr(it, name, value) for name, value in values.items()] and None)


def sets_first(**values: Any) -> toy_servers.Answer:
    """Change the first proposal of a message."""

    def change(response) -> None:
        for name, value in values.items():
            field = getattr(response.proposals[0], name)
            if isinstance(value, list):
                field[:] = value
            else:
                setattr(response.proposals[0], name, value)

    return spoils(change)


def ends(after: int) -> toy_servers.Answer:
    return lambda requests, context: itertools.islice(honest_draft(requests, context), after)


def freezes(after: int) -> toy_servers.Answer:
    def answer(requests, context):
        yield from ends(after)(requests, context)
        wait_until_gone(context)

    return answer


def raises(requests, context):
    raise RuntimeError("a draft that fails")
    yield


def has_alternatives(*alternatives: draft_pb2.Alternative) -> toy_servers.Answer:
    return spoils(lambda it: it.alternatives.extend(alternatives))


def alternative(position: int, token_id: int, num_proposals: int = 1, proposed_id: int = 0) -> draft_pb2.Alternative:
    proposals = [draft_pb2.Proposal(token_id=proposed_id)] * num_proposals
    return draft_pb2.Alternative(position=position, token_id=token_id, proposals=proposals)


def useless(response: draft_pb2.ProposeResponse) -> None:
    for proposal in response.proposals:
        proposal.token_id = (proposal.token_id + 1) % toy_services.VOCAB_SIZE
    response.cache.Clear()


def has_timing(number: float) -> toy_servers.Answer:
    timing = common_pb2.Timing(queue_ms=number, forward_ms=number)
    return spoils(lambda it: it.timing.CopyFrom(timing))


def changes_cache(**values: int) -> toy_servers.Answer:
    return spoils(lambda it: [setattr(it.cache, name, value) for name, value in values.items()] and None)


def floods(requests, context):
    yield from itertools.chain(itertools.islice(honest_draft(requests, context), 2), itertools.repeat(EMPTY, 200_000))


EMPTY = draft_pb2.ProposeResponse()
UNKNOWN_ID = toy_services.VOCAB_SIZE
HUGE = 2**32 - 1
MANY = [draft_pb2.Proposal(token_id=1)] * 50_000

HOSTILE: dict[str, tuple[toy_servers.Answer, str | None]] = {  # by what it does: how, and what the client makes of it
    "refuses a field": (refuses(grpc.StatusCode.INVALID_ARGUMENT), "INVALID_ARGUMENT"),
    "has no such method": (refuses(grpc.StatusCode.UNIMPLEMENTED), "UNIMPLEMENTED"),
    "is out of range": (refuses(grpc.StatusCode.OUT_OF_RANGE), "OUT_OF_RANGE"),
    "forbids": (refuses(grpc.StatusCode.PERMISSION_DENIED), "PERMISSION_DENIED"),
    "wants a name": (refuses(grpc.StatusCode.UNAUTHENTICATED), "UNAUTHENTICATED"),
    "has lost data": (refuses(grpc.StatusCode.DATA_LOSS), "DATA_LOSS"),
    "says a deadline passed": (refuses(grpc.StatusCode.DEADLINE_EXCEEDED), "DEADLINE_EXCEEDED"),
    "fails": (refuses(grpc.StatusCode.INTERNAL), "INTERNAL"),
    "raises": (raises, "UNKNOWN"),
    "is full and wants us earlier": (refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, -(10**9)), "RESOURCE_EXHAUSTED"),
    "is full for ever": (refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, 10**11), "RESOURCE_EXHAUSTED"),
    "ends at once": (ends(0), "ENDED"),
    "ends after each message": (ends(1), "ENDED"),
    "is silent": (freezes(0), "SILENT"),
    "falls silent": (freezes(3), "SILENT"),
    "stops at once": (spoils(lambda it: [draft_pb2.ProposeResponse(stopped=True)]), None),
    "says what is void": (spoils(lambda it: [EMPTY]), None),
    "has an unknown token": (sets_first(token_id=UNKNOWN_ID), "BROKE_PROTOCOL"),
    "has a token beyond all": (sets_first(token_id=HUGE), "BROKE_PROTOCOL"),
    "has a support nobody wants": (sets_first(support_gaps=[1], support_weights=[1]), "BROKE_PROTOCOL"),
    "has only weights": (sets_first(support_weights=[1]), "BROKE_PROTOCOL"),
    "leaves a hole": (
        spoils(lambda it: setattr(it, "start_position", it.start_position + 1), after=1),
        "BROKE_PROTOCOL",
    ),
    "goes back": (spoils(lambda it: [it, it]), "BROKE_PROTOCOL"),
    "begins at nothing": (sets(start_position=0), None),
    "begins beyond all": (sets(start_position=HUGE), "BROKE_PROTOCOL"),
    "names a later commit": (spoils(lambda it: setattr(it, "commit_index", it.commit_index + 1)), "BROKE_PROTOCOL"),
    "names a commit beyond all": (sets(commit_index=HUGE), "BROKE_PROTOCOL"),
    "names no later commit": (sets(commit_index=0), None),
    "floods": (floods, "BROKE_PROTOCOL"),
    "proposes beyond its window": (spoils(lambda it: it.proposals.extend(MANY)), "BROKE_PROTOCOL"),
    "sends a message beyond all": (spoils(lambda it: [bytes(9 * 1024 * 1024)]), "RESOURCE_EXHAUSTED"),
    "sends what is no message": (spoils(lambda it: [b"\xff\xff\xff"]), "INTERNAL"),
    "prepares too much": (has_alternatives(*[alternative(3, 1)] * 5_000), "BROKE_PROTOCOL"),
    "prepares too long": (has_alternatives(alternative(3, 1, 500)), "BROKE_PROTOCOL"),
    "prepares beyond all": (has_alternatives(alternative(HUGE, 1)), "BROKE_PROTOCOL"),
    "prepares for what is over": (has_alternatives(alternative(0, 1)), None),
    "prepares unknown tokens": (has_alternatives(alternative(4, 1, 1, UNKNOWN_ID)), "BROKE_PROTOCOL"),
    "prepares nothing for unknown tokens": (has_alternatives(alternative(4, HUGE, 0)), None),
    "has other tokens": (changes_cache(digest=1), "OTHER_CACHE"),
    "has more tokens than there are": (changes_cache(num_cached_tokens=HUGE), "OTHER_CACHE"),
    "is useless for ever": (spoils(useless), None),
    "took no number of seconds": (has_timing(math.nan), None),
    "took for ever": (has_timing(math.inf), None),
    "was done before it began": (has_timing(-5.0), None),
}
OF_THE_TRANSPORT = (  # tried with the asyncio client, too; the conversation is the same in both
    "raises",
    "is full for ever",
    "ends after each message",
    "falls silent",
    "floods",
    "sends a message beyond all",
    "sends what is no message",
    "answers twice",
)


def in_both(table: Iterable[str], by_both: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the cases of a table with whether the client is that of asyncio."""
    return [(what, False) for what in table] + [(what, True) for what in table if what in by_both]


BAD_SUPPORTS = {
    "no support": {"support_gaps": [], "support_weights": []},
    "no weights": {"support_weights": []},
    "more weights than tokens": {"support_weights": [1] * 12},
    "weights of 0": {"support_weights": [0] * 9, "support_gaps": [0] * 9},
    "one weight of 0": {"support_weights": [0, *[1] * 8], "support_gaps": [0] * 9},
    "a support beyond the vocabulary": {"support_gaps": [0] * 10, "support_weights": [1] * 10},
    "gaps that overflow": {"support_gaps": [HUGE, HUGE, 3], "support_weights": [1, 1, 1]},
    "a support of other tokens": {"token_id": 1, "support_gaps": [2], "support_weights": [1]},
}


@pytest.mark.parametrize(("what", "is_async"), in_both(HOSTILE, OF_THE_TRANSPORT))
def test_a_draft_that(target, texts, what, is_async):
    answer, reason = HOSTILE[what]
    with ToyServer("draft", answer) as draft:
        result = write(target.address, draft.address, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert result.finish_reason == "length"
    if reason is not None:
        assert reason in result.stats.draft_failures, result.stats.draft_failures
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in result.stats.draft_forward_s)


@pytest.mark.parametrize("what", BAD_SUPPORTS)
def test_a_draft_whose_proposals_have(target, texts, what):
    """All rounds go without it: the text is the target's own under rejection sampling, too."""
    with ToyServer("draft", sets_first(**BAD_SUPPORTS[what])) as draft:
        result = write(target.address, draft.address, rule="rejection")
    assert result.token_ids == texts["rejection"]
    assert result.stats.draft_failures.keys() == {"BROKE_PROTOCOL"}
    assert result.stats.num_draft_tokens == 0


def other_context(context_length: int) -> common_pb2.ModelInfo:
    return info_of(context_length=context_length)


def refuses_to_say(context: grpc.ServicerContext) -> common_pb2.ModelInfo:
    return context.abort(grpc.StatusCode.PERMISSION_DENIED, "it does not want to")


def says_nothing(context: grpc.ServicerContext) -> common_pb2.ModelInfo:
    wait_until_gone(context)
    return info_of()


STRANGE_PIECES = "abcd12345"  # of which the target has fewer than half

DESCRIPTIONS: dict[str, tuple[Any, str]] = {
    "another tokenizer": (info_of(pieces=STRANGE_PIECES), "OTHER_TOKENIZER"),
    "no tokenizer": (common_pb2.ModelInfo(vocab_size=9, context_length=200), "OTHER_TOKENIZER"),
    "no vocabulary": (common_pb2.ModelInfo(context_length=200), "BROKE_PROTOCOL"),
    "no context": (other_context(0), "BROKE_PROTOCOL"),
    "nothing that it says": (refuses_to_say, "PERMISSION_DENIED"),
    "nothing that it ever says": (says_nothing, "DEADLINE_EXCEEDED"),
    "what is no message": (lambda context: b"\xff\xff\xff", "INTERNAL"),
}


@BOTH_CLIENTS
@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_a_draft_that_describes(target, texts, what, is_async):
    info, reason = DESCRIPTIONS[what]
    with ToyServer("draft", honest_draft, info, pieces=STRANGE_PIECES) as draft:
        result = write(target.address, draft.address, is_async)
        if reason == "OTHER_TOKENIZER":
            with pytest.raises(IncompatiblePairError):
                write(target.address, draft.address, is_async, method="draft")
    assert result.token_ids == texts["shared_noise"]
    assert reason in result.stats.draft_failures
    assert result.stats.num_draft_tokens == 0


def refuses_to_send(context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"{"
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "it does not want to")


def knows_no_such_call(context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield b""


def sends_nothing_for_long(context: grpc.ServicerContext) -> Iterator[bytes]:
    wait_until_gone(context)
    yield b""


TOKENIZERS: dict[str, tuple[Any, str]] = {
    "garbage": (lambda context: iter([b"\xff\xff", b"{}"]), "BROKE_PROTOCOL"),
    "nothing": (lambda context: iter(()), "BROKE_PROTOCOL"),
    "a part and an error": (refuses_to_send, "PERMISSION_DENIED"),
    "word that it knows no such call": (knows_no_such_call, "OTHER_TOKENIZER"),  # of an older version
    "nothing for long": (sends_nothing_for_long, "DEADLINE_EXCEEDED"),
}


@BOTH_CLIENTS
@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_draft_of_another_tokenizer_that_sends(target, texts, what, is_async):
    send_tokenizer, reason = TOKENIZERS[what]
    with ToyServer("draft", honest_draft, pieces=OTHER_PIECES, send_tokenizer=send_tokenizer) as draft:
        result = write(target.address, draft.address, is_async, connect_timeout=2.0)
    assert result.token_ids == texts["shared_noise"]
    assert result.stats.draft_failures.keys() == {reason}
    assert result.stats.num_draft_tokens == 0


@BOTH_CLIENTS
def test_a_draft_whose_ids_mean_other_than_it_says_changes_nothing(target, texts, is_async):
    """It sends the target's tokenizer as its own, so that all is translated wrongly."""
    with ToyServer("draft", honest_draft, info_of(pieces=OTHER_PIECES)) as draft:
        for rule, text in texts.items():
            result = write(target.address, draft.address, is_async, rule=rule)
            assert rule == "rejection" or result.token_ids == text
            assert len(result.token_ids) == SAMPLING.max_new_tokens
            assert result.stats.num_draft_tokens > 0


@BOTH_CLIENTS
@pytest.mark.parametrize("details", DETAILS, ids=["RetryInfo", "ErrorInfo", "status"])
def test_a_service_that_explains_its_errors_in_garbage_is_unavailable(target, texts, details, is_async):
    with ToyServer("draft", explains(details)) as draft:
        result = write(target.address, draft.address, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert result.stats.draft_failures.keys() == {"UNAVAILABLE"}
    with ToyServer("draft", honest_draft, explain_info(details)) as draft:
        result = write(target.address, draft.address, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert result.stats.draft_failures.keys() == {"UNAVAILABLE"}
    with (
        ToyServer("target", explains(details)) as broken,
        pytest.raises(ServiceUnavailableError, match=r"for 0.2 s \(UNAVAILABLE\): it does not want to"),
    ):
        write(broken.address, None, is_async, method="autoregressive", patience=Patience(retry_s=0.2, round_s=30.0))


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of both services, which answer OK to every question, and nothing else."""
    server = grpc.server(ThreadPoolExecutor(4))
    for package in (draft_pb2, toy_servers.target_pb2):
        (service,) = package.DESCRIPTOR.services_by_name.values()
        handler = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(()))
        handlers = {"GetModelInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@BOTH_CLIENTS
def test_a_service_that_describes_itself_without_a_word(target, texts, mute, is_async):
    result = write(target.address, mute, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert result.stats.draft_failures.keys() == {"INTERNAL"}
    with pytest.raises((DeadlineExceededError, ServiceUnavailableError)):
        write(mute, None, is_async, method="autoregressive", timeout=0.3)


@BOTH_CLIENTS
def test_an_honest_draft_is_used(target, texts, is_async):
    """Else the texts above would be those of a client that never asks its draft."""
    with ToyServer("draft", honest_draft) as draft:
        result = write(target.address, draft.address, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert result.stats.draft_failures == {}
    assert result.stats.num_accepted_tokens > 10


@pytest.mark.parametrize("what", ["refuses a field", "has an unknown token", "leaves a hole", "floods", "raises"])
def test_under_the_method_draft_one_that(target, what):
    """Its own text cannot be had, and the error says whose fault that is."""
    with ToyServer("draft", HOSTILE[what][0]) as draft, pytest.raises(OutriderError, match="draft") as caught:
        write(target.address, draft.address, method="draft", timeout=None)
    assert isinstance(caught.value, ServiceFailedError | ServiceUnavailableError)


# What a target may do.


def target_spoils(change: Callable[[Any], Any], after: int = 2) -> toy_servers.Answer:
    def answer(requests, context):
        for number, response in enumerate(honest_target(requests, context)):
            instead = change(response) if number >= after else None
            yield from [response] if instead is None else instead

    return answer


def row_has(**values: Any) -> toy_servers.Answer:
    def change(response) -> None:
        for name, value in values.items():
            if isinstance(value, list):
                getattr(response.rows[0], name)[:] = value
            else:
                setattr(response.rows[0], name, value)

    return target_spoils(change)


TARGETS: dict[str, tuple[toy_servers.Answer, str]] = {
    "answers another round": (target_spoils(lambda it: setattr(it, "round_index", 99)), "answered round 99"),
    "sends no row": (target_spoils(lambda it: it.ClearField("rows")), "0 rows for"),
    "sends a row too many": (target_spoils(lambda it: it.rows.extend(it.rows[:1])), "rows for"),
    "has a token beyond its vocabulary": (row_has(outside_token_id=9), "sent token 9"),
    "has a mass that is no number": (row_has(outside_mass=math.nan), "outside_mass"),
    "has no bound to its mass": (row_has(outside_mass=math.inf), "outside_mass"),
    "has a negative mass": (row_has(outside_mass=-0.1), "outside_mass"),
    "has too much mass": (row_has(outside_mass=1.5), "outside_mass"),
    "reports a support nobody sent": (row_has(support_units=[1]), "another length than the support"),
    "answers twice": (target_spoils(lambda it: [it, it]), "not asked for|answered round"),
    "answers before it is asked": (
        lambda requests, context: (row for row in [target_response()]),
        "not asked for|answered round|rows",
    ),
    "floods": (target_spoils(lambda it: itertools.repeat(it, 100_000)), "not asked for|answered round"),
}


def target_response() -> Any:
    return toy_servers.target_pb2.VerifyResponse(round_index=7)


@pytest.mark.parametrize(("what", "is_async"), in_both(TARGETS, OF_THE_TRANSPORT))
def test_a_target_that(texts, what, is_async):
    answer, message = TARGETS[what]
    with (
        ToyServer("target", answer) as target,
        ToyServer("draft", honest_draft) as draft,
        pytest.raises(ServiceFailedError, match=message) as caught,
    ):
        write(target.address, draft.address, is_async)
    partial = caught.value.partial
    assert partial is not None
    assert partial.token_ids == texts["shared_noise"][: len(partial.token_ids)]


@BOTH_CLIENTS
@pytest.mark.parametrize("after", [0, 2])
def test_a_target_that_sends_what_is_no_message(texts, after, is_async):
    """It may be a broken link, which is tried again."""
    with ToyServer("target", target_spoils(lambda it: [b"\xff\xff\xff"], after)) as target:
        if after:
            result = write(target.address, None, is_async, method="autoregressive")
            assert result.token_ids == texts["shared_noise"]
        else:
            with pytest.raises(ServiceUnavailableError, match="the target"):
                write(target.address, None, is_async, method="autoregressive")


def with_values(**values: Any) -> common_pb2.ModelInfo:
    info = info_of()
    info.MergeFrom(common_pb2.ModelInfo(**values))
    return info


TARGET_DESCRIPTIONS = {
    "nothing": (common_pb2.ModelInfo(), "a vocabulary of 0 ids"),
    "no context": (other_context(0), "a context of 0 tokens"),
    "an end beyond its vocabulary": (with_values(eos_token_ids=[HUGE]), "an end-of-sequence id 4294967295"),
    "more pieces than ids": (info_of(pieces="abcdefghijkl"), "a tokenizer of 12 pieces"),
}


@BOTH_CLIENTS
@pytest.mark.parametrize("what", TARGET_DESCRIPTIONS)
def test_a_target_that_describes(what, is_async):
    info, message = TARGET_DESCRIPTIONS[what]
    with ToyServer("target", honest_target, info) as target, pytest.raises(ServiceFailedError, match=message):
        write(target.address, None, is_async, method="autoregressive")


@BOTH_CLIENTS
def test_services_that_end_idle_streams_are_opened_again_without_a_word(texts, is_async):
    def idle(honest: toy_servers.Answer, after: int) -> toy_servers.Answer:
        def answer(requests, context):
            yield from itertools.islice(honest(requests, context), after)
            abort(context, SessionIdleError("nothing was said for long"))

        return answer

    with ToyServer("target", idle(honest_target, 3)) as target, ToyServer("draft", idle(honest_draft, 12)) as draft:
        result = write(target.address, draft.address, is_async)
    assert result.token_ids == texts["shared_noise"]
    assert (result.stats.num_target_retries, result.stats.draft_failures) == (0, {})


# Services that are exchanged for others.

OTHER_PIECES = "ihgfedcba"


class Exchange:
    """One client whose services are exchanged at their ports; texts from both kinds of client look alike."""

    def __init__(self, target: ToyServer, draft: ToyServer, is_async: bool):
        self._is_async = is_async
        if is_async:

            async def make() -> AsyncSpeculativeClient:
                return AsyncSpeculativeClient(target.address, draft.address, patience=PATIENCE)

            self._client: Any = shared_services().run(make())
        else:
            self._client = SpeculativeClient(target.address, draft.address, patience=PATIENCE)

    def write(self, prompt: Any, after_two_chunks: Callable[[], None] = lambda: None) -> GenerationResult:
        how = {"num_speculative_tokens": 2, "timeout": 60.0}
        if self._is_async:
            return shared_services().run(self._write(prompt, after_two_chunks, how))
        stream = self._client.stream(prompt, SAMPLING, **how)
        for number, _ in enumerate(stream):
            if number == 1:
                after_two_chunks()
        return stream.result

    async def _write(self, prompt: Any, after_two_chunks: Callable[[], None], how: dict[str, Any]) -> GenerationResult:
        stream, number = self._client.stream(prompt, SAMPLING, **how), 0
        async for _ in stream:
            if number == 1:
                after_two_chunks()
            number += 1
        return stream.result

    def close(self) -> None:
        if self._is_async:
            shared_services().run(self._client.close())
        else:
            self._client.close()


@pytest.fixture
def exchange(is_async):
    """A pair, its client, and what exchanges one of its services for another."""
    running = {"target": ToyServer("target", honest_target), "draft": ToyServer("draft", honest_draft)}
    client = Exchange(running["target"], running["draft"], is_async)

    def become(kind: str, identity: str, pieces: str = toy_servers.PIECES) -> None:
        port = running[kind].port
        running[kind].stop()
        answer = honest_target if kind == "target" else honest_draft
        running[kind] = ToyServer(kind, answer, info_of(identity, pieces), port, pieces)

    yield client, become
    client.close()
    for server in running.values():
        server.stop()


@BOTH_CLIENTS
@pytest.mark.parametrize("pieces", [toy_servers.PIECES, OTHER_PIECES], ids=["model", "tokenizer"])
def test_a_target_that_is_exchanged_in_mid_text_ends_the_text_and_the_next_begins_afresh(exchange, texts, pieces):
    client, become = exchange
    with pytest.raises(ModelChangedError) as caught:
        client.write("dbe", lambda: become("target", "another", pieces))
    assert caught.value.partial.token_ids == texts["shared_noise"][: len(caught.value.partial.token_ids)] != []
    result = client.write("dbe")
    assert result.prompt_token_ids == [pieces.index(letter) for letter in "dbe"]
    assert result.text == "".join(pieces[token_id] for token_id in result.token_ids)


@BOTH_CLIENTS
@pytest.mark.parametrize("pieces", [toy_servers.PIECES, OTHER_PIECES], ids=["model", "tokenizer"])
def test_a_target_that_is_exchanged_between_texts_is_taken_as_it_is(exchange, texts, pieces):
    client, become = exchange
    assert client.write("dbe").token_ids == texts["shared_noise"]
    become("target", "another", pieces)
    result = client.write("dbe")
    assert result.prompt_token_ids == [pieces.index(letter) for letter in "dbe"]
    assert result.text == "".join(pieces[token_id] for token_id in result.token_ids)
    assert len(result.token_ids) == SAMPLING.max_new_tokens


@BOTH_CLIENTS
def test_a_prompt_of_ids_is_not_taken_for_one_of_another_tokenizer(exchange, texts):
    client, become = exchange
    assert client.write(PROMPT).token_ids == texts["shared_noise"]
    become("target", "another")
    assert client.write(PROMPT).token_ids == texts["shared_noise"]  # the same tokenizer, and here the same toy
    become("target", "a third", OTHER_PIECES)
    with pytest.raises(ModelChangedError):
        client.write(PROMPT)
    assert len(client.write(PROMPT).token_ids) == SAMPLING.max_new_tokens


@BOTH_CLIENTS
@pytest.mark.parametrize("pieces", [toy_servers.PIECES, OTHER_PIECES], ids=["model", "tokenizer"])
@pytest.mark.parametrize("in_mid_text", [True, False])
def test_a_draft_that_is_exchanged_changes_nothing(exchange, texts, pieces, in_mid_text):
    client, become = exchange
    if in_mid_text:
        result = client.write(PROMPT, lambda: become("draft", "another", pieces))
    else:
        assert client.write(PROMPT).token_ids == texts["shared_noise"]
        become("draft", "another", pieces)
        result = client.write(PROMPT)
    assert result.token_ids == texts["shared_noise"]
    assert "OTHER_TOKENIZER" not in result.stats.draft_failures
    later = client.write(PROMPT)
    assert later.token_ids == texts["shared_noise"]
    assert later.stats.num_draft_tokens > 0
