"""A draft on paged caches refuses what is out of range, and no block of it is ever lost."""

from __future__ import annotations

import grpc
import pytest

from tests import tiny_models
from tests.conftest import _caches_by_pool, lost_blocks
from tests.servers import DRAFT, RawStream
from tests.service.conftest import CONTEXT_LENGTH, PROMPT, commit_of, open_proposals, receive_proposals, span

T = len(PROMPT)


@pytest.fixture(scope="module")
def paged_draft(services, tmp_path_factory):
    path = tiny_models.save(tiny_models.make_model("llama", 2), tmp_path_factory.mktemp("paged"))
    server = services.start(DRAFT, path, paged=True)
    yield server
    server.stop()


def pool_of(server):
    return server._servicer._host._engine.runner._pool


@pytest.mark.parametrize("batch_until", [T + 5, CONTEXT_LENGTH + 1, CONTEXT_LENGTH + 40, 2**32 - 1])
@pytest.mark.parametrize("where", ["open", "commit"])
def test_a_batch_beyond_the_window_is_refused_by_name(paged_draft, where, batch_until):
    if where == "open":
        messages = [open_proposals(ahead=4, batch_until=batch_until)]
    else:
        commit = commit_of(1, span([], T, PROMPT), window=T + 4)
        commit.commit.batch_until = batch_until
        messages = [open_proposals(ahead=0), commit]
    with RawStream(paged_draft.stub.Propose, *messages) as stream, pytest.raises(grpc.RpcError) as refusal:
        list(stream.call)
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{where}.batch_until" in refusal.value.details()


def test_a_batch_up_to_the_contexts_end_is_drafted_and_gives_all_blocks_back(paged_draft):
    for _ in range(3):
        with RawStream(
            paged_draft.stub.Propose, open_proposals(ahead=CONTEXT_LENGTH - T, batch_until=CONTEXT_LENGTH)
        ) as stream:
            receive_proposals(stream, CONTEXT_LENGTH - T)
        paged_draft.wait_until_idle()
        assert pool_of(paged_draft).num_free == pool_of(paged_draft).num_blocks


def test_what_is_drafted_beyond_the_block_table_loses_no_block(paged_draft, monkeypatch):
    """Even where nothing is checked before."""
    from outrider_draft import session as session_module

    monkeypatch.setattr(session_module.Path, "num_wanted", property(lambda path: CONTEXT_LENGTH + 40 - path.length))
    for _ in range(3):
        with RawStream(paged_draft.stub.Propose, open_proposals([1] * (CONTEXT_LENGTH - 8), ahead=8)) as stream:
            with pytest.raises(grpc.RpcError) as failure:
                list(stream.call)
            assert failure.value.code() == grpc.StatusCode.INTERNAL
    paged_draft.wait_until_idle()
    assert pool_of(paged_draft).num_free == pool_of(paged_draft).num_blocks


def test_a_lost_block_is_found(paged_draft):
    """The check after every test sees this service's blocks."""
    pool = pool_of(paged_draft)
    assert pool in _caches_by_pool
    assert not lost_blocks(pool)
    block = pool.take()
    assert lost_blocks(pool)
    pool.give_back(block)
    pool.give_back(block)
    assert lost_blocks(pool)
    pool._free.remove(block)


def test_a_commit_that_takes_tokens_back_is_drafted_behind_its_end(paged_draft):
    """They agree with what is held, so that only their end tells."""
    with RawStream(paged_draft.stub.Propose, open_proposals(ahead=2)) as stream:
        receive_proposals(stream, 2)
        stream.send(commit_of(1, span(PROMPT[2:4], 2, PROMPT[:2]), window=7))
        response = stream.receive()
    assert (response.commit_index, response.start_position) == (1, 4)
