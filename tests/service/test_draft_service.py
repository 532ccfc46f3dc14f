"""The draft service over a real socket: what it proposes, drawn from what, how far, and what a commit does to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.protocol.tokens import TokenLog
from outrider_draft import drafter
from tests.servers import DRAFT, RawStream
from tests.service.conftest import (
    CONTEXT_LENGTH,
    PROMPT,
    VOCAB_SIZE,
    check_proposals,
    commit_of,
    open_proposals,
    receive_proposals,
    span,
)

AHEAD = 6
DISTRIBUTIONS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "top_k": {"temperature": 0.9, "top_k": 12},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all filters": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
    "small support": {"temperature": 1.5, "max_support": 3},
    "padded vocabulary": {"temperature": 1.5, "vocab_size": 10},
    "another branch": {"branch": (1 << 32) - 1},
}


def check_nothing_more_comes(draft, stream: RawStream) -> None:
    """Assert that the service has no proposal left to send."""
    draft.stats()  # answered by the model thread between two steps; so, if a session still wanted a token,
    draft.stats()  # there would be a step between these two, and a proposal before the end of the stream
    assert stream.half_close() == []


def another(token_id: int) -> int:
    return (token_id + 1) % VOCAB_SIZE


@pytest.mark.parametrize("fields", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_proposals_are_drawn_from_the_distribution_that_comes_with_them(draft, models, fields):
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD, **fields)) as stream:
        proposals, response = receive_proposals(stream, AHEAD)
    check_proposals(models.draft, proposals, PROMPT, **fields)
    fed = [*PROMPT, *(proposal.token_id for proposal in proposals[:-1])]
    assert (response.cache.num_cached_tokens, response.cache.digest) == (len(fed), TokenLog(fed).digest(len(fed)))
    assert response.commit_index == 0


@pytest.mark.parametrize("by", ["session", "service"])
def test_a_greedy_draft_proposes_the_likeliest_token_with_a_support_of_one(services, draft, models, by):
    server = services.start(DRAFT, models.draft_path, greedy=True) if by == "service" else draft
    fields = {"greedy": True} if by == "session" else {}
    with RawStream(server.stub.Propose, open_proposals(ahead=AHEAD, temperature=1.3, **fields)) as stream:
        proposals, _ = receive_proposals(stream, AHEAD)
    check_proposals(models.draft, proposals, PROMPT, temperature=0.0)
    assert all(len(proposal.support_weights) == 1 for proposal in proposals)
    if by == "service":
        server.stop()


def test_the_services_own_limit_cuts_every_support(services, models):
    server = services.start(DRAFT, models.draft_path, max_support=5)
    with RawStream(server.stub.Propose, open_proposals(ahead=AHEAD, temperature=2.0)) as stream:
        check_proposals(models.draft, receive_proposals(stream, AHEAD)[0], PROMPT, max_support=5, temperature=2.0)
    server.stop()


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_nothing_is_proposed_at_the_window_or_beyond(draft, ahead):
    with RawStream(draft.stub.Propose, open_proposals(ahead=ahead)) as stream:
        if ahead:
            _, response = receive_proposals(stream, ahead)
            assert response.start_position + len(response.proposals) == len(PROMPT) + ahead
        check_nothing_more_comes(draft, stream)


def test_the_window_may_reach_the_end_of_the_context(draft):
    prompt = [index * 7 % VOCAB_SIZE for index in range(CONTEXT_LENGTH - 3)]
    with RawStream(draft.stub.Propose, open_proposals(prompt, ahead=3)) as stream:
        receive_proposals(stream, 3)
        check_nothing_more_comes(draft, stream)


def test_a_commit_that_agrees_keeps_what_was_drafted_behind_it(draft, models):
    end = len(PROMPT) + AHEAD
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD)) as stream:
        proposals, _ = receive_proposals(stream, AHEAD)
        num_fed = draft.stats().num_tokens_fed
        agreed = [proposal.token_id for proposal in proposals[:2]]
        stream.send(commit_of(1, span(agreed, len(PROMPT), PROMPT), window=end + 2))
        more, response = receive_proposals(stream, 2)
        assert draft.stats().num_tokens_fed - num_fed == 2  # one for each further token: nothing was computed again
        check_nothing_more_comes(draft, stream)
    assert response.commit_index == 1
    assert response.start_position + len(response.proposals) == end + 2
    check_proposals(models.draft, [*proposals, *more], PROMPT)


def test_a_commit_that_contradicts_is_drafted_anew_behind_it(draft, models):
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD)) as stream:
        proposals, _ = receive_proposals(stream, AHEAD)
        committed = [proposals[0].token_id, another(proposals[1].token_id)]
        stream.send(commit_of(1, span(committed, len(PROMPT), PROMPT), window=len(PROMPT) + 2 + 4))
        anew, response = receive_proposals(stream, 4)
        check_nothing_more_comes(draft, stream)
    assert response.commit_index == 1
    assert response.start_position + len(response.proposals) == len(PROMPT) + 2 + 4
    check_proposals(models.draft, anew, [*PROMPT, *committed])


def test_a_commit_may_be_ahead_of_the_draft(draft, models):
    committed = [33, 44, 55]
    with RawStream(draft.stub.Propose, open_proposals(ahead=0)) as stream:
        stream.send(commit_of(1, span(committed, len(PROMPT), PROMPT), window=len(PROMPT) + 3 + 4))
        check_proposals(models.draft, receive_proposals(stream, 4)[0], [*PROMPT, *committed])


def test_a_commit_may_rewrite_what_was_committed(draft, models):
    rewritten = [70, 71]
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD)) as stream:
        receive_proposals(stream, AHEAD)
        stream.send(commit_of(1, span(rewritten, 2, PROMPT[:2]), window=4 + 3))
        check_proposals(models.draft, receive_proposals(stream, 3)[0], [*PROMPT[:2], *rewritten])


def test_a_commit_may_begin_another_branch_of_random_numbers(draft, models):
    """What was drafted behind it is discarded, although the commit agrees with it, and drawn anew."""
    with RawStream(draft.stub.Propose, open_proposals(ahead=2)) as stream:
        first, _ = receive_proposals(stream, 2)
        agreed = first[0].token_id
        stream.send(commit_of(1, span([agreed], len(PROMPT), PROMPT), window=len(PROMPT) + 1 + AHEAD, branch=9))
        anew, response = receive_proposals(stream, AHEAD)
    assert response.start_position + len(response.proposals) == len(PROMPT) + 1 + AHEAD
    check_proposals(models.draft, first, PROMPT)
    check_proposals(models.draft, anew, [*PROMPT, agreed], branch=9)


def test_a_window_that_moves_back_discards_nothing(draft, models):
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD)) as stream:
        proposals, _ = receive_proposals(stream, AHEAD)
        agreed = [proposals[0].token_id]
        stream.send(commit_of(1, span(agreed, len(PROMPT), PROMPT), window=len(PROMPT) + 1))
        stream.send(commit_of(2, span([], len(PROMPT) + 1, [*PROMPT, *agreed]), window=len(PROMPT) + AHEAD + 1))
        more, response = receive_proposals(stream, 1)
    assert (response.commit_index, response.start_position) == (2, len(PROMPT) + AHEAD)
    check_proposals(models.draft, [*proposals, *more], PROMPT)


def test_drafting_stops_below_the_least_probability_until_the_next_commit(draft, models):
    # No token of this model is certain, so each one falls below 1.
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD, min_draft_prob=1.0)) as stream:
        proposals, response = receive_proposals(stream, 1)
        assert response.stopped
        draft.stats()
        agreed = [proposals[0].token_id]
        stream.send(commit_of(1, span(agreed, len(PROMPT), PROMPT), window=len(PROMPT) + AHEAD))
        more, response = receive_proposals(stream, 1)
        assert (response.stopped, response.commit_index, response.start_position) == (True, 1, len(PROMPT) + 1)
        check_nothing_more_comes(draft, stream)
    check_proposals(models.draft, [*proposals, *more], PROMPT)


def test_a_draft_that_is_sure_enough_does_not_stop(draft):
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD, temperature=0.0, min_draft_prob=1.0)) as stream:
        _, response = receive_proposals(stream, AHEAD)
    assert not response.stopped


def test_alternatives_are_what_is_proposed_behind_a_commit_that_ends_so(draft, models, monkeypatch):
    """They come without being asked for again, and count as sent once their case has come true."""
    monkeypatch.setattr(drafter.Drafter, "_has_time_for_forks", lambda *_: True)
    with RawStream(
        draft.stub.Propose, open_proposals(ahead=AHEAD, batch_until=len(PROMPT) + 3, max_alternatives=2)
    ) as stream:
        proposals, alternatives = [], []
        while len(proposals) < AHEAD or len(alternatives) < 2:
            response = stream.receive()
            proposals += response.proposals
            alternatives += response.alternatives
        check_proposals(models.draft, proposals, PROMPT)
        for it in alternatives:
            index = it.position - len(PROMPT)
            assert proposals[index].token_id != it.token_id
            assert len(it.proposals) == 3
            behind = [*PROMPT, *(proposal.token_id for proposal in proposals[:index]), it.token_id]
            check_proposals(models.draft, it.proposals, behind)
        chosen = alternatives[0]
        committed = [proposal.token_id for proposal in proposals[: chosen.position - len(PROMPT)]] + [chosen.token_id]
        end = len(PROMPT) + len(committed)
        stream.send(commit_of(1, span(committed, len(PROMPT), PROMPT), window=end + AHEAD))
        more, response = receive_proposals(stream, AHEAD - 3)
        check_nothing_more_comes(draft, stream)
    assert response.start_position + len(response.proposals) == end + AHEAD
    check_proposals(models.draft, [*chosen.proposals, *more], [*PROMPT, *committed])


def test_many_sessions_share_forward_passes_and_disturb_nobody(services, models):
    server = services.start(DRAFT, models.draft_path)
    prompts = [[*PROMPT, *range(10, 10 + index)] for index in range(16)]

    def work(prompt: list[int]) -> None:
        with RawStream(server.stub.Propose, open_proposals(prompt, ahead=40)) as stream:
            check_proposals(models.draft, receive_proposals(stream, 40)[0], prompt)

    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(work, prompts))
    stats = server.stats()
    by_size = np.array(stats.num_passes_by_batch_size)
    assert by_size[1:].sum() > 0, "no pass served more than one sequence"
    assert by_size.sum() == stats.num_forward_passes
    assert stats.num_rows == len(prompts) * 40
    server.wait_until_idle()
    server.stop()


def test_a_client_that_goes_away_frees_its_cache(draft):
    streams = [RawStream(draft.stub.Propose, open_proposals(ahead=100)) for _ in range(8)]  # still drafting
    for stream in streams:
        stream.receive()
    for stream in streams:
        stream.cancel()
    draft.wait_until_idle()


def test_a_stream_that_is_half_closed_ends_its_session(draft):
    with RawStream(draft.stub.Propose, open_proposals(ahead=AHEAD)) as stream:
        receive_proposals(stream, AHEAD)
        assert stream.half_close() == []
        draft.wait_until_idle()
