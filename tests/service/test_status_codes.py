"""Every status code that the contract names, over a real socket; and after each refusal the service carries on."""

from __future__ import annotations

import math

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.engine.backends.runner import ModelRunner
from outrider.protocol import wire
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_draft import drafter
from outrider_target import scheduler
from tests import tiny_models
from tests.servers import DRAFT, PATIENCE_S, TARGET, RawStream
from tests.service.conftest import (
    CONTEXT_LENGTH,
    FAMILY,
    PROMPT,
    VOCAB_SIZE,
    check_draft_serves,
    check_proposals,
    check_rows,
    check_target_serves,
    commit_of,
    open_proposals,
    open_verification,
    receive_proposals,
    round_of,
    span,
)

INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
REASONS = {INVALID: "INVALID_FIELD", FAILED: "OUT_OF_STEP"}
T = len(PROMPT)  # the first undecided position
TOO_LONG = [1] * (CONTEXT_LENGTH + 1)
ODD = common_pb2.TokenSpan(token_ids=b"\1\0\0\0\2")
WRONG_DIGEST = common_pb2.TokenSpan(start_position=T, token_ids=wire.pack_ids([3]), prefix_digest=1)
HOLE = span([3], T + 1, [*PROMPT, 8])
SAMPLINGS = [
    ("temperature", math.nan),
    ("temperature", -0.5),
    ("temperature", math.inf),
    ("temperature", 1e-30),
    ("temperature", 1001.0),
    ("top_k", 2**31),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", -0.1),
    ("top_p", math.nan),
    ("min_p", 1.5),
    ("min_p", -0.1),
    ("min_p", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1001.0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ("allowed_token_ids", [1] * 4097),
    ("bad_words", [{}]),
    ("bad_words", [{"token_ids": [1] * 1025}]),
    ("no_repeat_ngram_size", 2**31),
    ("min_tokens", 2**31),
    ("stop_token_ids", [1] * 257),
]
UNKNOWN_IDS = [
    ("logit_bias", {VOCAB_SIZE: 1.0}), ("allowed_token_ids", [1, VOCAB_SIZE]), ("stop_token_ids", [2**32 - 1]),
    ("bad_words", [{"token_ids": [VOCAB_SIZE, 1]}]),
]  # fmt: skip


def open_with(committed: common_pb2.TokenSpan) -> target_pb2.VerifyRequest:
    """Return an opening message with a span of its own."""
    message = open_verification()
    message.open.committed.CopyFrom(committed)
    return message


def open_verification_as(**fields) -> target_pb2.VerifyRequest:
    """Return an opening message with other fields than its sampling."""
    message = open_verification()
    message.open.MergeFrom(target_pb2.OpenVerification(**fields))
    return message


def rounds(token_id: int, support_gaps: list[int]) -> list[target_pb2.VerifyRequest]:
    """Return a session with a round of one proposal whose support is given as it travels."""
    message = round_of(span(PROMPT))
    message.round.proposals.add(token_id=token_id, support_gaps=support_gaps)
    return [open_verification(), message]


# Situation: what the client sends, the code, and the field that the message names.
VERIFY = {
    "no kind first": ([target_pb2.VerifyRequest()], INVALID, "kind"),
    "a round first": ([round_of(span(PROMPT))], INVALID, "kind"),
    "no kind later": ([open_verification(), target_pb2.VerifyRequest()], INVALID, "kind"),
    "opened twice": ([open_verification(), open_verification()], INVALID, "kind"),
    **{f"{name} {value}": ([open_verification(**{name: value})], INVALID, name) for name, value in SAMPLINGS},
    **{f"{name} unknown": ([open_verification(**{name: value})], INVALID, name) for name, value in UNKNOWN_IDS},
    "more prompt than tokens": ([open_verification_as(num_prompt_tokens=T + 1)], INVALID, "open.num_prompt_tokens"),
    "too many log-probabilities": ([open_verification_as(num_logprobs=21)], INVALID, "open.num_logprobs"),
    "too many of the prompt": ([open_verification_as(num_prompt_logprobs=21)], INVALID, "open.num_prompt_logprobs"),
    "no token": ([open_with(span([]))], INVALID, "committed.token_ids"),
    "prompt longer than the context": ([open_with(span(TOO_LONG))], INVALID, "committed.token_ids"),
    "prompt id out of range": ([open_with(span([3, VOCAB_SIZE]))], INVALID, "open.committed.token_ids"),
    "prompt of odd bytes": ([open_with(ODD)], INVALID, "open.committed.token_ids"),
    "opened in the middle": ([open_with(span([3], 1, [8]))], INVALID, "open.committed.start_position"),
    "proposal out of range": (rounds(VOCAB_SIZE, [3]), INVALID, "proposals[0].token_id"),
    "support out of range": (rounds(3, [3, VOCAB_SIZE - 4]), INVALID, "proposals[0].support_gaps"),
    "support beyond 32 bits": (rounds(3, [3, 2**32 - 1]), INVALID, "proposals[0].support_gaps"),
    "support of more ids than there are": (rounds(3, [0] * (VOCAB_SIZE + 1)), INVALID, "proposals[0].support_gaps"),
    "support of as many gaps as a message holds": (rounds(3, [0] * 2_000_000), INVALID, "proposals[0].support_gaps"),
    "support empty": (rounds(3, []), INVALID, "proposals[0].support_gaps"),
    "support with shared noise": (
        [open_verification(shared_noise=True), round_of(span(PROMPT), [(3, [3, 4])])],
        INVALID,
        "proposals[0].support_gaps",
    ),
    "too many proposals": ([open_verification(), round_of(span(PROMPT), [(3, [3])] * 65)], INVALID, "proposals"),
    "round id out of range": (
        [open_verification(), round_of(span([VOCAB_SIZE], T, PROMPT))], INVALID, "round.committed.token_ids",
    ),
    "round of odd bytes": ([open_verification(), round_of(ODD)], INVALID, "round.committed.token_ids"),
    "round without a pending token": ([open_verification(), round_of(span([]))], INVALID, "committed"),
    "proposals beyond the context": (
        [open_verification(), round_of(span([1] * CONTEXT_LENGTH), [(3, [3])])], INVALID, "proposals",
    ),
    "span with a hole": ([open_verification(), round_of(HOLE)], FAILED, "span.start_position"),
    "another prefix": ([open_verification(), round_of(WRONG_DIGEST)], FAILED, "span.prefix_digest"),
}  # fmt: skip


def commits(*messages: draft_pb2.ProposeRequest) -> list[draft_pb2.ProposeRequest]:
    return [open_proposals(ahead=0), *messages]


def open_draft_with(committed: common_pb2.TokenSpan) -> draft_pb2.ProposeRequest:
    return open_proposals(committed=committed)


OTHER_TOKENIZER = common_pb2.TokenizerFingerprint(num_pieces=5, block_digests=[1])
PROPOSE = {
    "no kind first": ([draft_pb2.ProposeRequest()], INVALID, "kind"),
    "a commit first": ([commit_of(1, span([3]), window=9)], INVALID, "kind"),
    "no kind later": (commits(draft_pb2.ProposeRequest()), INVALID, "kind"),
    "opened twice": (commits(open_proposals()), INVALID, "kind"),
    **{f"{name} {value}": ([open_proposals(**{name: value})], INVALID, name) for name, value in SAMPLINGS},
    "more prompt than tokens": ([open_proposals(num_prompt_tokens=T + 1)], INVALID, "open.num_prompt_tokens"),
    "no token": ([open_draft_with(span([]))], INVALID, "committed.token_ids"),
    "prompt longer than the context": ([open_draft_with(span(TOO_LONG))], INVALID, "committed.token_ids"),
    "prompt id out of range": ([open_draft_with(span([VOCAB_SIZE]))], INVALID, "open.committed.token_ids"),
    "prompt of odd bytes": ([open_draft_with(ODD)], INVALID, "open.committed.token_ids"),
    "opened in the middle": ([open_draft_with(span([3], 1, [8]))], INVALID, "open.committed.start_position"),
    "window behind the prompt": ([open_proposals(window=T - 1)], INVALID, "window"),
    "window beyond the context": ([open_proposals(window=CONTEXT_LENGTH + 1)], INVALID, "window"),
    "support above the limit": ([open_proposals(max_support=1025)], INVALID, "open.max_support"),
    "negative least probability": ([open_proposals(min_draft_prob=-0.1)], INVALID, "open.min_draft_prob"),
    "least probability above one": ([open_proposals(min_draft_prob=1.1)], INVALID, "open.min_draft_prob"),
    "least probability NaN": ([open_proposals(min_draft_prob=math.nan)], INVALID, "open.min_draft_prob"),
    "another tokenizer": ([open_proposals(tokenizer=OTHER_TOKENIZER)], INVALID, "open.tokenizer"),
    "commit id out of range": (
        commits(commit_of(1, span([VOCAB_SIZE], T, PROMPT), window=T + 2)), INVALID, "commit.span.token_ids",
    ),
    "commit without a token": (commits(commit_of(1, span([]), window=T + 2)), INVALID, "commit.span"),
    "commit of odd bytes": (commits(commit_of(1, ODD, window=T + 2)), INVALID, "commit.span.token_ids"),
    "window behind the commit": (commits(commit_of(1, span([3, 4], T, PROMPT), window=T + 1)), INVALID, "window"),
    "commit's window beyond the context": (
        commits(commit_of(1, span([3], T, PROMPT), window=CONTEXT_LENGTH + 1)), INVALID, "window",
    ),
    "span with a hole": (commits(commit_of(1, HOLE, window=T + 9)), FAILED, "span.start_position"),
    "another prefix": (commits(commit_of(1, WRONG_DIGEST, window=T + 9)), FAILED, "span.prefix_digest"),
    "a commit left out": (commits(commit_of(2, span([3], T, PROMPT), window=T + 9)), FAILED, "commit_index"),
}  # fmt: skip


def refusal_of(stream: RawStream) -> grpc.RpcError:
    """Return the status that the stream ends with, whatever came before it."""
    with pytest.raises(grpc.RpcError) as refusal:
        list(stream.call)
    return refusal.value


@pytest.mark.parametrize(("messages", "code", "field"), VERIFY.values(), ids=VERIFY)
def test_the_target_refuses_by_name_and_carries_on(target, models, messages, code, field):
    with RawStream(target.stub.Verify, *messages) as stream:
        refusal = refusal_of(stream)
    assert refusal.code() == code, refusal.details()
    assert field in refusal.details()
    assert reason_of(refusal) == REASONS[code]
    check_target_serves(target, models.target)


@pytest.mark.parametrize(("messages", "code", "field"), PROPOSE.values(), ids=PROPOSE)
def test_the_draft_refuses_by_name_and_carries_on(draft, models, messages, code, field):
    with RawStream(draft.stub.Propose, *messages) as stream:
        refusal = refusal_of(stream)
    assert refusal.code() == code, refusal.details()
    assert field in refusal.details()
    assert reason_of(refusal) == REASONS[code]
    check_draft_serves(draft, models.draft)


def retry_delay_s(error: grpc.RpcError) -> float:
    status = rpc_status.from_call(error)
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info.retry_delay.ToMilliseconds() / 1000


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason of the ErrorInfo by which the service marks an error as its own."""
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    assert info.domain == "outrider"
    return info.reason


def test_a_full_target_says_when_to_come_again_and_its_session_goes_on(services, models):
    server = services.start(TARGET, models.target_path, max_sessions=1)
    with RawStream(server.stub.Verify, open_verification(), round_of(span(PROMPT))) as stream:
        stream.receive()
        with RawStream(server.stub.Verify, open_verification()) as second:
            refusal = refusal_of(second)
        assert refusal.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay_s(refusal) > 0
        proposals = [(3, [3, 4])]
        check_rows(models.target, stream.ask(round_of(span(PROMPT), proposals)).rows, PROMPT, proposals)
        assert server.stats().num_sessions_refused == 1
    server.wait_until_idle()
    check_target_serves(server, models.target)
    server.stop()


def test_a_full_draft_says_when_to_come_again_and_its_session_goes_on(services, models):
    server = services.start(DRAFT, models.draft_path, max_sessions=1)
    with RawStream(server.stub.Propose, open_proposals(ahead=2)) as stream:
        proposals, _ = receive_proposals(stream, 2)
        with RawStream(server.stub.Propose, open_proposals()) as second:
            refusal = refusal_of(second)
        assert refusal.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay_s(refusal) > 0
        stream.send(commit_of(1, span([], T, PROMPT), window=T + 4))
        check_proposals(models.draft, [*proposals, *receive_proposals(stream, 2)[0]], PROMPT)
    server.wait_until_idle()
    check_draft_serves(server, models.draft)
    server.stop()


def test_a_target_without_a_tokenizer_has_none_to_send(target, models):
    with pytest.raises(grpc.RpcError) as refusal:
        list(target.stub.GetTokenizer(target_pb2.GetTokenizerRequest(), timeout=PATIENCE_S))
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
    check_target_serves(target, models.target)


def test_a_deadline_ends_its_session_alone(target, models):
    with RawStream(target.stub.Verify, open_verification(), timeout=0.1) as stream:
        assert refusal_of(stream).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        target.wait_until_idle()
    check_target_serves(target, models.target)


# A model that returns NaN for one token.

POISON = 50  # its embedding is NaN; not among the tokens with which a service tries its model


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory) -> str:
    model = tiny_models.make_model(FAMILY, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    return tiny_models.save(model, tmp_path_factory.mktemp("poisoned"))


def test_nan_logits_fail_their_own_round_alone(services, models, poisoned_path):
    server = services.start(TARGET, poisoned_path)
    proposals = [(3, [3, 4]), (7, [7])]
    with (
        RawStream(server.stub.Verify, open_verification()) as healthy,
        RawStream(server.stub.Verify, open_verification([*PROMPT, POISON])) as poisoned,
    ):
        for _ in range(20):  # side by side, so that some passes serve both
            healthy.send(round_of(span(PROMPT), proposals))
        poisoned.send(round_of(span([*PROMPT, POISON]), proposals))
        assert refusal_of(poisoned).code() == grpc.StatusCode.INTERNAL
        for _ in range(20):
            check_rows(models.target, healthy.receive().rows, PROMPT, proposals)
    with RawStream(server.stub.Verify, open_verification([POISON]), round_of(span([POISON]))) as poisoned:  # alone
        assert refusal_of(poisoned).code() == grpc.StatusCode.INTERNAL
    server.wait_until_idle()
    check_target_serves(server, models.target)
    server.stop()


def test_nan_logits_end_their_own_drafting_alone(services, models, poisoned_path):
    server = services.start(DRAFT, poisoned_path)
    ahead = 30
    with (
        # The poison is neither proposed nor, in this session, committed.
        RawStream(server.stub.Propose, open_proposals(ahead=ahead, vocab_size=POISON)) as healthy,
        RawStream(server.stub.Propose, open_proposals([*PROMPT, POISON])) as poisoned,
    ):
        assert refusal_of(poisoned).code() == grpc.StatusCode.INTERNAL
        check_proposals(models.target, receive_proposals(healthy, ahead)[0], PROMPT, vocab_size=POISON)
    with RawStream(server.stub.Propose, open_proposals([*PROMPT, POISON])) as poisoned:  # with nobody beside it
        assert refusal_of(poisoned).code() == grpc.StatusCode.INTERNAL
    server.wait_until_idle()
    with RawStream(server.stub.Propose, open_proposals(vocab_size=POISON)) as healthy:
        check_proposals(models.target, receive_proposals(healthy, 4)[0], PROMPT, vocab_size=POISON)
    server.stop()


# A failure that nobody foresaw.


def fail_once(monkeypatch, owner, name: str) -> None:
    """Have a function raise the first time it is called."""
    works, failures = getattr(owner, name), [RuntimeError("out of luck")]

    def call(*arguments, **named):
        if failures:
            raise failures.pop()
        return works(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("place", [(ModelRunner, "forward"), (scheduler, "begin_reading")], ids=["model", "rows"])
def test_a_pass_that_fails_is_internal_and_tells_nothing_of_why(target, models, monkeypatch, place):
    fail_once(monkeypatch, *place)
    with RawStream(target.stub.Verify, open_verification([3]), round_of(span(PROMPT))) as stream:
        refusal = refusal_of(stream)
    assert refusal.code() == grpc.StatusCode.INTERNAL
    assert "luck" not in refusal.details()
    check_target_serves(target, models.target)


@pytest.mark.parametrize("place", [(ModelRunner, "forward"), (drafter, "draft_tokens")], ids=["model", "draws"])
def test_a_draft_that_fails_is_internal_and_tells_nothing_of_why(draft, models, monkeypatch, place):
    fail_once(monkeypatch, *place)
    with RawStream(draft.stub.Propose, open_proposals()) as stream:
        refusal = refusal_of(stream)
    assert refusal.code() == grpc.StatusCode.INTERNAL
    assert "luck" not in refusal.details()
    check_draft_serves(draft, models.draft)
