"""What one generation commits, counts and sends each service, message by message.

Proposals here have a support of one, and rows accept (p = 1) or overrule (p = 0, another token outside) as a test
wants it.
"""

from __future__ import annotations

import pytest

from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.messages import params_from_proto
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_client.conversation.committed import Task
from outrider_client.conversation.draft_link import DraftLink
from outrider_client.conversation.generation import Generation
from outrider_client.errors import CacheMismatchError, InvalidRequestError, ServiceFailedError
from outrider_client.params import SpeculationParams
from outrider_client.rules.rules import rule_of

PROMPT_IDS = [10, 11, 12]
T = len(PROMPT_IDS)  # the first undecided position
INFO = common_pb2.ModelInfo(vocab_size=100, context_length=50)
SEED = (1 << 63) + 5


def make_generation(max_new_tokens: int = 40, target_info=INFO, draft_info=INFO, **speculation) -> Generation:
    """Return a generation whose draft has described itself and been opened."""
    params = SpeculationParams(**speculation)
    rule = rule_of(params.rule, has_seed=False)(SEED)
    generation = Generation(Task(PROMPT_IDS, DistributionParams(0.7, 9), rule, params, T + max_new_tokens, target_info))
    generation.draft.info = draft_info
    open_draft(generation)
    generation.target.open()
    return generation


def length_of(generation: Generation) -> int:
    """Return K, which is 5 where a test does not care."""
    length = generation.task.speculation.num_speculative_tokens
    return length if isinstance(length, int) else 5


def open_draft(generation: Generation) -> draft_pb2.OpenProposals:
    return generation.draft.open(length_of(generation)).open


def begin_round(generation: Generation, num_proposals: int) -> target_pb2.VerifyRequest:
    generation.target.begin_round(generation.draft.proposals[:num_proposals])
    return generation.target.round_request()


def commit_to_draft(generation: Generation) -> draft_pb2.Commit:
    return generation.draft.commit(length_of(generation)).commit


def response(
    position: int, token_ids: list[int], prefix_ids: list[int], commit_index: int = 0, stopped: bool = False
) -> draft_pb2.ProposeResponse:
    """Return what a draft sends that has drafted `token_ids` behind `prefix_ids`, all its tokens so far."""
    cached = TokenLog([*prefix_ids, *token_ids[:-1]])
    assert len(prefix_ids) == position
    return draft_pb2.ProposeResponse(
        commit_index=commit_index,
        start_position=position,
        proposals=[
            draft_pb2.Proposal(token_id=token_id, support_gaps=[token_id], support_weights=[1])
            for token_id in token_ids
        ],
        stopped=stopped,
        cache=common_pb2.CacheState(num_cached_tokens=len(cached), digest=cached.digest(len(cached))),
    )


def propose(generation: Generation, *token_ids: int, commit_index: int = 0) -> None:
    """Have the draft propose behind everything that is committed and proposed."""
    ahead = [proposal.token_id for proposal in generation.draft.proposals]
    prefix_ids = [*generation.committed[:], *ahead]
    generation.draft.on_response(response(len(prefix_ids), list(token_ids), prefix_ids, commit_index))


def proposed(draft: DraftLink) -> list[int]:
    return [proposal.token_id for proposal in draft.proposals]


def answer(
    generation: Generation, request: target_pb2.VerifyRequest, num_accepted: int, token_id: int
) -> target_pb2.VerifyResponse:
    """Return rows that accept the first `num_accepted` proposals and put `token_id` in the place of the next."""
    proposed_ids = [proposal.token_id for proposal in request.round.proposals]
    rows = [target_pb2.TargetRow(support_units=[2**18]) for _ in proposed_ids[:num_accepted]] + [
        target_pb2.TargetRow(support_units=[0], outside_mass=1.0, outside_token_id=token_id)
        for _ in proposed_ids[num_accepted:]
    ]
    if not proposed_ids:
        rows = [target_pb2.TargetRow(outside_mass=1.0, outside_token_id=token_id)]
    cached = TokenLog([*generation.committed[:], *proposed_ids[:-1]])
    cache = common_pb2.CacheState(num_cached_tokens=len(cached), digest=cached.digest(len(cached)))
    return target_pb2.VerifyResponse(round_index=request.round.round_index, rows=rows, cache=cache)


def commit(
    generation: Generation,
    num_proposals: int,
    num_accepted: int,
    token_id: int = 77,
    num_kept: int | None = None,
    is_sent: bool = True,
) -> None:
    """Go through a round in which the target accepts `num_accepted` proposals and says `token_id` where it does not.

    With `is_sent`, the draft has been sent the commit.
    """
    request = begin_round(generation, num_proposals)
    decision = generation.target.decide_round(answer(generation, request, num_accepted, token_id))
    generation.commit_round(decision, len(decision.token_ids) if num_kept is None else num_kept)
    if is_sent:
        commit_to_draft(generation)


def ids_of(span: common_pb2.TokenSpan) -> list[int]:
    return wire.unpack_ids(span.token_ids, "ids", 100)


class TestTargetMessages:
    def test_a_session_opens_with_everything(self):
        opening = make_generation().target.open().open
        assert (opening.committed.start_position, ids_of(opening.committed), opening.committed.prefix_digest) == (
            0,
            PROMPT_IDS,
            0,
        )
        assert opening.seed == SEED
        assert params_from_proto(opening.sampling) == DistributionParams(0.7, 9)

    def test_the_first_round_adds_nothing_to_the_opening(self):
        generation = make_generation()
        propose(generation, 5, 6)
        work = begin_round(generation, 2).round
        assert (work.committed.start_position, ids_of(work.committed)) == (T, [])
        assert work.committed.prefix_digest == TokenLog(PROMPT_IDS).digest(T)
        assert [proposal.token_id for proposal in work.proposals] == [5, 6]
        assert [proposal.support_gaps for proposal in work.proposals] == [[5], [6]]

    def test_a_later_round_carries_what_the_one_before_committed(self):
        """Two accepted and one recovered: the target's tokens are rewritten from the round's own beginning."""
        generation = make_generation()
        propose(generation, 5, 6, 7)
        commit(generation, 3, num_accepted=2, token_id=77)
        work = begin_round(generation, 0).round
        assert work.round_index == 2
        assert (work.committed.start_position, ids_of(work.committed)) == (T, [5, 6, 77])
        assert work.committed.prefix_digest == TokenLog(PROMPT_IDS).digest(T)

    def test_a_round_sent_again_is_the_same_bytes(self):
        generation = make_generation()
        propose(generation, 5, 6)
        assert begin_round(generation, 2) == generation.target.round_request()

    def test_a_round_sent_to_a_new_session_adds_nothing_to_its_opening(self):
        generation = make_generation()
        propose(generation, 5, 6, 7)
        commit(generation, 2, num_accepted=2)
        before = begin_round(generation, 1).round
        assert ids_of(generation.target.open().open.committed) == [*PROMPT_IDS, 5, 6]
        again = generation.target.round_request().round
        assert (again.committed.start_position, ids_of(again.committed)) == (T + 2, [])
        assert again.committed.prefix_digest == TokenLog([*PROMPT_IDS, 5, 6]).digest(T + 2)
        assert (again.round_index, list(again.proposals)) == (before.round_index, list(before.proposals))

    def test_a_round_may_take_fewer_proposals_than_there_are(self):
        generation = make_generation()
        propose(generation, 5, 6, 7)
        commit(generation, 1, num_accepted=1)
        assert generation.committed[:] == [*PROMPT_IDS, 5]
        assert proposed(generation.draft) == [6, 7]


class TestCommitting:
    @pytest.mark.parametrize(
        ("num_accepted", "num_kept", "tokens", "num_drafted", "num_counted"),
        [
            (3, 3, [5, 6, 7], 3, 3),
            (0, 1, [77], 3, 0),
            (2, 3, [5, 6, 77], 3, 2),
            (3, 1, [5], 1, 1),
            (2, 2, [5, 6], 2, 2),
            (2, 1, [5], 1, 1),
        ],
        ids=["all", "none", "two", "end_in_accepted", "end_before_recovered", "end_in_first"],
    )
    def test_counts_follow_the_cut(self, num_accepted, num_kept, tokens, num_drafted, num_counted):
        """What lies behind the end of the text is neither committed nor counted, as drafted or as accepted."""
        generation = make_generation()
        propose(generation, 5, 6, 7)
        commit(generation, 3, num_accepted, token_id=77, num_kept=num_kept)
        stats = generation.stats
        assert generation.committed[T:] == tokens
        assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (num_drafted, num_counted)
        assert (stats.num_rounds, stats.num_generated_tokens) == (1, num_kept)
        assert stats.num_draft_tokens_per_position == [1] * num_drafted
        assert stats.num_accepted_tokens_per_position == [1] * num_counted + [0] * (num_drafted - num_counted)

    def test_positions_are_counted_over_rounds_of_different_lengths(self):
        generation = make_generation()
        propose(generation, 5, 6, 7)
        commit(generation, 1, num_accepted=1)
        commit(generation, 2, num_accepted=1)
        assert generation.stats.num_draft_tokens_per_position == [2, 1]
        assert generation.stats.num_accepted_tokens_per_position == [2, 0]
        assert generation.stats.acceptance_per_position == [1.0, 0.0]

    def test_a_round_without_proposals_is_counted_as_one_without_draft(self):
        generation = make_generation()
        commit(generation, 0, 0)
        assert (generation.stats.num_rounds, generation.stats.num_rounds_without_draft) == (1, 1)
        assert generation.stats.acceptance_rate == 0.0

    def test_target_only_misses_no_draft(self):
        generation = make_generation(method="autoregressive")
        commit(generation, 0, 0)
        assert generation.stats.num_rounds_without_draft == 0


class TestCacheState:
    def check(self, num_cached_tokens: int, cached_ids: list[int], ahead: list[int]) -> None:
        log = TokenLog(cached_ids)
        cache = common_pb2.CacheState(num_cached_tokens=num_cached_tokens, digest=log.digest(len(log)))
        make_generation().committed.check_cache(cache, ahead)

    @pytest.mark.parametrize("num_ahead", [0, 1, 2])
    def test_of_the_committed_tokens_and_some_ahead_is_right(self, num_ahead):
        self.check(T + num_ahead, [*PROMPT_IDS, *[5, 6][:num_ahead]], [5, 6])

    @pytest.mark.parametrize("num_cached", range(T + 1))
    def test_of_a_beginning_is_right(self, num_cached):
        """A cache that was dropped, or not filled yet, holds less than it could."""
        self.check(num_cached, PROMPT_IDS[:num_cached], [5, 6])

    @pytest.mark.parametrize(
        ("num_cached", "cached_ids", "ahead"),
        [
            (T, [10, 11, 13], []),
            (T + 1, [*PROMPT_IDS, 6], [5, 6]),
            (T + 2, [*PROMPT_IDS, 5, 6], [5]),
            (T - 1, PROMPT_IDS, []),
        ],
        ids=["another_token", "another_proposal", "longer_than_known", "another_length"],
    )
    def test_of_other_tokens_is_a_mismatch(self, num_cached, cached_ids, ahead):
        with pytest.raises(CacheMismatchError):
            self.check(num_cached, cached_ids, ahead)

    def test_of_other_tokens_stops_a_round_before_anything_is_committed(self):
        generation = make_generation()
        propose(generation, 5)
        spoiled = answer(generation, begin_round(generation, 1), 1, 0)
        spoiled.cache.digest ^= 1
        with pytest.raises(CacheMismatchError):
            generation.target.decide_round(spoiled)
        assert generation.committed[:] == PROMPT_IDS
        assert proposed(generation.draft) == [5]


class TestDraftMessages:
    def test_a_session_opens_with_everything(self):
        generation = make_generation(num_speculative_tokens=4, max_support=8, min_draft_prob=0.1, greedy_draft=True)
        opening = open_draft(generation)
        assert ids_of(opening.committed) == PROMPT_IDS
        assert (opening.seed, opening.window, opening.vocab_size) == (SEED, T + 8, 100)
        assert (opening.max_support, opening.min_draft_prob, opening.greedy) == (8, 0.1, True)
        assert params_from_proto(opening.sampling) == DistributionParams(0.7, 9)
        assert not opening.HasField("tokenizer")

    def test_the_targets_tokenizer_is_named_when_it_has_one(self):
        target_info = common_pb2.ModelInfo(vocab_size=100, context_length=50)
        target_info.tokenizer.num_pieces = 7
        assert open_draft(make_generation(target_info=target_info)).tokenizer.num_pieces == 7

    @pytest.mark.parametrize(("draft_size", "target_size"), [(100, 90), (90, 100)])
    def test_padded_ids_are_never_proposed(self, draft_size, target_size):
        generation = make_generation(
            target_info=common_pb2.ModelInfo(vocab_size=target_size, context_length=50),
            draft_info=common_pb2.ModelInfo(vocab_size=draft_size, context_length=50),
        )
        assert open_draft(generation).vocab_size == 90

    @pytest.mark.parametrize(
        ("settings", "window"),
        [
            ({"num_speculative_tokens": 4}, T + 8),
            ({"num_speculative_tokens": 4, "overlap": False}, T + 4),
            ({"num_speculative_tokens": 4, "window": 3}, T + 3),
            ({"num_speculative_tokens": 4, "max_new_tokens": 5}, T + 5),
            ({"num_speculative_tokens": 30, "max_new_tokens": 1000}, 50),
            ({"method": "draft", "max_new_tokens": 20}, T + 20),
        ],
        ids=["overlap", "no_overlap", "window", "end_of_text", "context", "draft_only"],
    )
    def test_the_window_ends_where_proposals_are_of_no_more_use(self, settings, window):
        assert open_draft(make_generation(**settings)).window == window

    @pytest.mark.parametrize(
        ("ours", "theirs", "window"),
        [("GPU-1", "GPU-1", T + 4), ("GPU-1", "GPU-2", T + 8), ("", "", T + 8), ("GPU-1", "", T + 8)],
        ids=["one GPU", "two GPUs", "CPUs", "a GPU and a CPU"],
    )
    def test_a_draft_on_the_targets_accelerator_waits_while_it_verifies(self, ours, theirs, window):
        generation = make_generation(
            target_info=common_pb2.ModelInfo(vocab_size=100, context_length=50, accelerator=ours),
            draft_info=common_pb2.ModelInfo(vocab_size=100, context_length=50, accelerator=theirs),
            num_speculative_tokens=4,
        )
        opening = open_draft(generation)
        assert (opening.window, opening.max_alternatives > 0) == (window, window == T + 8)

    def test_a_commit_carries_what_is_new_and_moves_the_window(self):
        generation = make_generation(num_speculative_tokens=2)
        propose(generation, 5, 6, 7)
        commit(generation, 2, num_accepted=1, token_id=77, is_sent=False)
        first = commit_to_draft(generation)
        commit(generation, 0, 0, token_id=78, is_sent=False)
        second = commit_to_draft(generation)
        assert [(it.commit_index, it.span.start_position, ids_of(it.span), it.window) for it in (first, second)] == [
            (1, T, [5, 77], T + 2 + 4),
            (2, T + 2, [78], T + 3 + 4),
        ]
        assert second.span.prefix_digest == TokenLog([*PROMPT_IDS, 5, 77]).digest(T + 2)

    def test_a_commit_carries_all_rounds_since_the_last(self):
        generation = make_generation(num_speculative_tokens=2)
        for token_id in (77, 78, 79):
            commit(generation, 0, 0, token_id, is_sent=False)
        message = commit_to_draft(generation)
        assert (message.commit_index, message.span.start_position) == (1, T)
        assert ids_of(message.span) == [77, 78, 79]
        assert message.batch_until == T + 3 + 2

    def test_opening_again_voids_proposals_and_counts_commits_from_0(self):
        generation = make_generation()
        propose(generation, 5, 6)
        commit(generation, 1, num_accepted=1)
        opening = open_draft(generation)
        assert ids_of(opening.committed) == [*PROMPT_IDS, 5]
        assert proposed(generation.draft) == []
        commit(generation, 0, 0, is_sent=False)
        assert commit_to_draft(generation).commit_index == 1

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({}, 5),
            ({"max_new_tokens": 3}, 3),
            ({"window": 2}, 2),
            ({"draft_info": common_pb2.ModelInfo(vocab_size=100, context_length=T + 4)}, 4),
            ({"draft_info": common_pb2.ModelInfo(vocab_size=100, context_length=T)}, 0),
            ({"draft_info": common_pb2.ModelInfo(vocab_size=12, context_length=50)}, 0),
        ],
        ids=["k", "end_of_text", "window", "draft_context", "draft_context_full", "draft_vocabulary"],
    )
    def test_no_more_proposals_are_wanted_than_can_come(self, settings, wanted):
        """More would be waited for in vain."""
        draft = Generation(make_generation(**settings).task).draft
        draft.info = settings.get("draft_info", INFO)
        assert draft.num_wanted(5) == wanted

    def test_no_more_proposals_are_wanted_than_the_target_takes(self):
        target_info = common_pb2.ModelInfo(vocab_size=100, context_length=50)
        target_info.limits.max_proposals = 2
        assert make_generation(target_info=target_info).draft.num_wanted(5) == 2


class TestProposals:
    """The draft sends ahead of what it has been sent; what it drafted on an overruled prefix must not be used."""

    def test_pile_up_in_order(self):
        generation = make_generation()
        propose(generation, 5)
        propose(generation, 6, 7)
        assert proposed(generation.draft) == [5, 6, 7]

    def test_behind_accepted_ones_stay(self):
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        commit(generation, 2, num_accepted=2)
        assert proposed(generation.draft) == [7, 8]
        propose(generation, 9, commit_index=0)
        assert proposed(generation.draft) == [7, 8, 9]

    def test_behind_an_overruled_one_are_void_and_so_are_those_in_flight(self):
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        commit(generation, 2, num_accepted=1, token_id=77)
        assert proposed(generation.draft) == []
        overruled = [*PROMPT_IDS, 5, 6, 7, 8]
        generation.draft.on_response(response(T + 4, [9, 4], overruled))
        assert proposed(generation.draft) == []
        generation.draft.on_response(response(T + 2, [20], [*PROMPT_IDS, 5, 77], commit_index=1))
        assert proposed(generation.draft) == [20]

    def test_that_agree_with_a_token_of_the_targets_own_stay(self):
        """The recovered token is what the draft had proposed next, on the far side of the round's last proposal."""
        generation = make_generation()
        propose(generation, 5)
        commit(generation, 0, 0, token_id=5)
        assert proposed(generation.draft) == []
        propose(generation, 6, commit_index=0)
        assert proposed(generation.draft) == [6]

    def test_in_flight_that_agree_with_a_round_without_them_are_used_from_there(self):
        """A round went without; then a response drafted before it shows the same token, and one more."""
        generation = make_generation()
        commit(generation, 0, 0, token_id=5)
        generation.draft.on_response(response(T, [5, 6], PROMPT_IDS))
        assert proposed(generation.draft) == [6]
        propose(generation, 7, commit_index=0)
        propose(generation, 8, commit_index=1)
        assert proposed(generation.draft) == [6, 7, 8]

    def test_in_flight_that_contradict_a_round_without_them_are_void(self):
        generation = make_generation()
        commit(generation, 0, 0, token_id=77)
        generation.draft.on_response(response(T, [5, 6], PROMPT_IDS))
        generation.draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 5, 6]))
        assert proposed(generation.draft) == []
        propose(generation, 8, commit_index=1)
        assert proposed(generation.draft) == [8]

    def test_that_contradict_the_second_of_two_rounds_wait_for_that_commit(self):
        """The draft agreed with the first commit and went on: what it says under it is void too."""
        generation = make_generation()
        commit(generation, 0, 0, token_id=5)
        commit(generation, 0, 0, token_id=77)
        generation.draft.on_response(response(T, [5, 6], PROMPT_IDS, commit_index=0))
        generation.draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 5, 6], commit_index=1))
        assert proposed(generation.draft) == []
        propose(generation, 8, commit_index=2)
        assert proposed(generation.draft) == [8]

    def test_that_contradict_the_first_of_two_rounds_count_again_from_that_commit(self):
        """At the first commit the draft truncates and drafts anew; under it, it may agree with the second."""
        generation = make_generation()
        commit(generation, 0, 0, token_id=77)
        commit(generation, 0, 0, token_id=6)
        generation.draft.on_response(response(T, [5], PROMPT_IDS, commit_index=0))
        generation.draft.on_response(response(T + 1, [6, 7], [*PROMPT_IDS, 77], commit_index=1))
        assert proposed(generation.draft) == [7]

    def test_that_contradict_one_commit_after_the_other_wait_for_each(self):
        generation = make_generation()
        commit(generation, 0, 0, token_id=77)
        commit(generation, 0, 0, token_id=78)
        generation.draft.on_response(response(T, [5], PROMPT_IDS, commit_index=0))
        generation.draft.on_response(response(T + 1, [6], [*PROMPT_IDS, 77], commit_index=1))
        generation.draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 77, 6], commit_index=1))
        assert proposed(generation.draft) == []
        propose(generation, 8, commit_index=2)
        assert proposed(generation.draft) == [8]

    def test_that_a_longer_commit_contradicts_in_its_middle_are_void(self):
        """Proposals 5 and 6 are accepted, 6 was the last of them here; 77 follows, where the draft says 7."""
        generation = make_generation()
        propose(generation, 5, 6)
        request = begin_round(generation, 2)
        generation.commit_round(generation.target.decide_round(answer(generation, request, 2, 0)), 2)
        commit_to_draft(generation)
        commit(generation, 0, 0, token_id=77)
        generation.draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 5, 6], commit_index=0))
        generation.draft.on_response(response(T + 3, [8], [*PROMPT_IDS, 5, 6, 7], commit_index=1))
        assert proposed(generation.draft) == []
        propose(generation, 9, commit_index=2)
        assert proposed(generation.draft) == [9]

    def test_after_a_hundred_unanswered_rounds_are_understood(self):
        generation = make_generation(400, draft_info=common_pb2.ModelInfo(vocab_size=100, context_length=500))
        for token_id in range(300):
            commit(generation, 0, 0, token_id=token_id % 90)
        generation.draft.on_response(response(T, [50, 51], PROMPT_IDS, commit_index=0))
        generation.draft.on_response(response(T + 1, [1, 2], [*PROMPT_IDS, 0], commit_index=1))
        assert proposed(generation.draft) == []
        propose(generation, 9, commit_index=300)
        assert proposed(generation.draft) == [9]

    @pytest.mark.parametrize("is_known_before", [False, True])
    def test_that_contradict_a_round_the_draft_was_not_sent_wait_for_the_next_commit(self, is_known_before):
        """Two rounds went without proposals and without a word; the draft's own 6 contradicts the second."""
        generation = make_generation()
        commit(generation, 0, 0, token_id=5, is_sent=False)
        if is_known_before:
            generation.draft.on_response(response(T, [5, 6], PROMPT_IDS))
        commit(generation, 0, 0, token_id=77, is_sent=False)
        if not is_known_before:
            generation.draft.on_response(response(T, [5, 6], PROMPT_IDS))
        generation.draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 5, 6]))
        assert proposed(generation.draft) == []
        commit_to_draft(generation)
        generation.draft.on_response(response(T + 3, [8], [*PROMPT_IDS, 5, 6, 7]))
        assert proposed(generation.draft) == []
        propose(generation, 9, commit_index=1)
        assert proposed(generation.draft) == [9]

    def test_a_stop_holds_until_the_next_commit(self):
        generation = make_generation()
        draft = generation.draft
        draft.on_response(response(T, [5], PROMPT_IDS, stopped=True))
        assert draft.has_stopped
        commit(generation, 1, num_accepted=1)
        assert not draft.has_stopped

    def test_a_stop_from_before_the_last_commit_is_none(self):
        """The draft takes it back when the commit reaches it."""
        generation = make_generation()
        propose(generation, 5)
        commit(generation, 1, num_accepted=1)
        generation.draft.on_response(response(T + 1, [6], [*PROMPT_IDS, 5], commit_index=0, stopped=True))
        assert proposed(generation.draft) == [6]
        assert not generation.draft.has_stopped

    def test_any_answer_ends_the_trial_even_a_void_one(self):
        """A draft that speaks is there, and waited for again."""
        generation = make_generation()
        draft = generation.draft
        propose(generation, 5, 6)
        commit(generation, 2, num_accepted=0, token_id=77)
        draft.is_on_trial = True
        draft.on_response(response(T + 2, [7], [*PROMPT_IDS, 5, 6], commit_index=0))
        assert proposed(draft) == []
        assert not draft.is_on_trial

    def test_on_another_cache_are_a_mismatch(self):
        generation = make_generation()
        message = response(T, [5], PROMPT_IDS)
        message.cache.digest ^= 1
        with pytest.raises(CacheMismatchError):
            generation.draft.on_response(message)

    def test_that_leave_a_gap_break_the_protocol(self):
        generation = make_generation()
        with pytest.raises(ServiceFailedError, match="out of order"):
            generation.draft.on_response(response(T + 1, [5], [*PROMPT_IDS, 4]))

    def test_that_come_twice_break_the_protocol(self):
        generation = make_generation()
        propose(generation, 5)
        with pytest.raises(ServiceFailedError, match="out of order"):
            generation.draft.on_response(response(T, [5], PROMPT_IDS))


def prepare(generation: Generation, position: int, token_id: int, *behind: int, commit_index: int = 0) -> None:
    """Have the draft send what it would propose if a token came to a position."""
    proposals = [draft_pb2.Proposal(token_id=it, support_gaps=[it], support_weights=[1]) for it in behind]
    alternative = draft_pb2.Alternative(position=position, token_id=token_id, proposals=proposals)
    generation.draft.on_response(
        draft_pb2.ProposeResponse(commit_index=commit_index, start_position=position, alternatives=[alternative])
    )


class TestAlternatives:
    """Proposals for another end of the round: used when it comes about, whether they are here then or on their way."""

    @pytest.mark.parametrize("is_before", [True, False], ids=["here", "on their way"])
    @pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "not sent"])
    def test_whose_case_comes_true_are_what_is_proposed(self, is_before, is_sent):
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        if is_before:
            prepare(generation, T + 1, 77, 20, 21)
        commit(generation, 3, num_accepted=1, token_id=77, is_sent=is_sent)
        if not is_before:
            assert proposed(generation.draft) == []
            prepare(generation, T + 1, 77, 20, 21)
        assert proposed(generation.draft) == [20, 21]
        assert generation.draft.num_alternatives_used == 1
        if not is_sent:
            commit_to_draft(generation)
        propose(generation, 22, commit_index=1)
        assert proposed(generation.draft) == [20, 21, 22]

    @pytest.mark.parametrize("is_before", [True, False], ids=["here", "on their way"])
    @pytest.mark.parametrize(("position", "token_id"), [(T + 1, 78), (T, 77), (T + 2, 77)])
    def test_to_another_end_are_void(self, is_before, position, token_id):
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        if is_before:
            prepare(generation, position, token_id, 20, 21)
        commit(generation, 3, num_accepted=1, token_id=77)
        if not is_before:
            prepare(generation, position, token_id, 20, 21)
        assert proposed(generation.draft) == []
        assert generation.draft.num_alternatives_used == 0

    def test_to_a_round_that_was_accepted_are_void(self):
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        prepare(generation, T + 1, 77, 20)
        commit(generation, 2, num_accepted=2)
        prepare(generation, T + 2, 78, 21)  # of the round before, on its way when the draft was sent the commit
        commit(generation, 2, num_accepted=0, token_id=78)
        assert proposed(generation.draft) == []

    def test_are_kept_until_the_draft_is_sent_a_commit(self):
        """It then looks at all that was committed since it was last sent."""
        generation = make_generation()
        propose(generation, 5, 6, 7, 8)
        prepare(generation, T + 1, 77, 20, 21)
        commit(generation, 1, num_accepted=1, is_sent=False)
        commit(generation, 1, num_accepted=0, token_id=77, is_sent=False)
        assert proposed(generation.draft) == [20, 21]

    def test_that_a_further_round_agrees_with_are_used_from_there(self):
        generation = make_generation()
        propose(generation, 5, 6)
        commit(generation, 2, num_accepted=0, token_id=77)
        commit(generation, 0, 0, token_id=20)
        prepare(generation, T, 77, 20, 21)
        assert proposed(generation.draft) == [21]

    def test_that_a_further_round_contradicts_are_void_and_so_is_what_was_drafted_behind_them(self):
        generation = make_generation()
        propose(generation, 5, 6)
        commit(generation, 2, num_accepted=0, token_id=77)
        commit(generation, 0, 0, token_id=30)
        prepare(generation, T, 77, 20, 21)
        generation.draft.on_response(response(T + 3, [22], [*PROMPT_IDS, 77, 20, 21], commit_index=1))
        assert proposed(generation.draft) == []
        propose(generation, 31, commit_index=2)
        assert proposed(generation.draft) == [31]

    def test_of_tokens_that_the_target_does_not_have_break_the_protocol(self):
        generation = make_generation()
        propose(generation, 5, 6)
        with pytest.raises(ServiceFailedError, match="token 100, which the target does not have"):
            prepare(generation, T, 77, 100)

    @pytest.mark.parametrize(
        ("settings", "most"),
        [
            ({}, 2),
            ({"greedy_draft": True}, 4),
            ({"rule": "shared_noise"}, 4),
            ({"num_alternatives": 7}, 7),
            ({"num_alternatives": 0}, 0),
            ({"overlap": False}, 0),
            ({"rule": "block"}, 0),
            ({"method": "draft"}, 0),
        ],
    )
    def test_are_asked_for_where_they_are_of_use(self, settings, most):
        assert open_draft(make_generation(**settings)).max_alternatives == most

    @pytest.mark.parametrize("number", [-1, 2.5, True])
    def test_a_number_that_is_none_is_refused(self, number):
        with pytest.raises(InvalidRequestError, match="num_alternatives"):
            SpeculationParams(num_alternatives=number)
