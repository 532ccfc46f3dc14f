"""A session says which model it expects, and another model answers FAILED_PRECONDITION. Over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.engine.models.loader import ModelRefusedError
from tests.servers import DRAFT, TARGET, RawStream, RunningServer
from tests.service.conftest import (
    PROMPT,
    check_draft_serves,
    check_proposals,
    check_rows,
    check_target_serves,
    open_proposals,
    open_verification,
    receive_proposals,
    round_of,
    span,
)


def opening(kind: str, identity: str) -> Any:
    message = open_verification() if kind == "target" else open_proposals()
    message.open.model_identity = identity
    return message


@pytest.fixture(params=["target", "draft"])
def service(request, target, draft) -> tuple[str, RunningServer, Callable]:
    """Return which service it is, the service, and the method that opens a session."""
    server = {"target": target, "draft": draft}[request.param]
    return request.param, server, server.stub.Verify if request.param == "target" else server.stub.Propose


def test_another_model_is_told_from_a_session_out_of_step(service, models, target, draft):
    kind, server, method = service
    expected = (draft if kind == "target" else target).model_info().model.identity
    here = server.model_info().model.identity
    assert expected != here
    with RawStream(method, opening(kind, expected)) as stream, pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert expected in caught.value.details()
    assert here in caught.value.details()
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("MODEL_CHANGED", "outrider")
    check = check_target_serves if kind == "target" else check_draft_serves
    check(server, models.target if kind == "target" else models.draft)


def test_an_identity_beyond_all_is_told_as_any_other(service):
    """What is reported of it fits into an error's metadata."""
    _, server, method = service
    with RawStream(method, opening(service[0], "x\n" * 30_000)) as stream, pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "open.model_identity" in caught.value.details()
    assert server.model_info().model.identity in caught.value.details()


def test_the_model_that_is_expected_serves(models, target, draft):
    proposals = [(7, [2, 7, 30]), (12, [12, 50])]
    identity = target.model_info().model.identity
    with RawStream(target.stub.Verify, opening("target", identity), round_of(span(PROMPT), proposals)) as stream:
        check_rows(models.target, stream.receive().rows, PROMPT, proposals)
    with RawStream(draft.stub.Propose, opening("draft", draft.model_info().model.identity)) as stream:
        check_proposals(models.draft, receive_proposals(stream, 4)[0], PROMPT)


def test_the_same_model_at_another_place_has_the_same_identity(services, models, target, tmp_path):
    models.target.save_pretrained(tmp_path)
    other = services.start(DRAFT, str(tmp_path))
    try:
        assert other.model_info().model.identity == target.model_info().model.identity
    finally:
        other.stop()


def test_a_model_that_cannot_be_described_is_refused_at_start(services, models):
    """Not answered with an error at each call: here the operator's bytes are no text."""
    with pytest.raises(ModelRefusedError, match="cannot be described to clients"):
        services.start(TARGET, models.target_path, revision="caf\udce9")
