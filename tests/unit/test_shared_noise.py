"""With noise that draft and target share, a seed's text is the target's own, whatever happens.

Against the toy services, as in test_conversation; that draws follow their distribution is shown in test_race.
"""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_client.conversation.effects import Link
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow, decide_shared_noise
from tests import toy_services as toys
from tests.toy_services import EVERY_K, NUM_TOKENS, Stream, World, make_conversation


def run(world: World | None = None, **settings):
    world = world or World()
    return world.run(make_conversation(world, rule="shared_noise", max_new_tokens=NUM_TOKENS, **settings))[0]


def own_text(temperature: float = 1.0, seed: int = 11) -> list[int]:
    """Return what the target chooses, token by token, without rounds or services."""
    tokens, noise = toys.TokenLog(toys.PROMPT_IDS), toys.SharedNoise(seed)
    model = toys.ToyModel(toys.TARGET_LOGITS, temperature)
    for position in range(len(tokens), len(tokens) + NUM_TOKENS):
        tokens.extend([toys.draw(model.probs(tokens, position), noise.at(position))])
    return tokens[len(toys.PROMPT_IDS) :]


TEXT = own_text()


class TestDecision:
    @staticmethod
    def decide(proposed_ids: list[int], chosen_ids: list[int]) -> Decision:
        rows = [TargetRow(Proposal.of_token(0).draft_probs, 1.0, token_id) for token_id in chosen_ids]
        return decide_shared_noise([Proposal.of_token(token_id) for token_id in proposed_ids], rows)

    def test_perfect_match_keeps_all_and_adds_nothing(self):
        assert self.decide([5, 0, 7], [5, 0, 7]) == Decision([5, 0, 7], 3)

    def test_a_mismatch_is_replaced_and_ends_the_round(self):
        assert self.decide([5, 6, 7], [4, 6, 7]) == Decision([4], 0)
        assert self.decide([5, 6, 7], [5, 0, 7]) == Decision([5, 0], 1)
        assert self.decide([5, 6, 7], [5, 6, 8]) == Decision([5, 6, 8], 2)

    def test_without_proposals_the_targets_own_choice_is_taken(self):
        assert self.decide([], [42]) == Decision([42], 0)


class TestText:
    @settings(max_examples=25)
    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    @given(
        order=st.integers(0, 2**32),
        impatience=st.sampled_from([0.0, 0.3, 0.7]),
        draft_speed=st.sampled_from([0.05, 1.0, 10.0]),
        overlap=st.booleans(),
        min_draft_prob=st.sampled_from([0.0, 0.3]),
    )
    def test_under_any_order_of_events(self, num_speculative_tokens, order, impatience, draft_speed, **speculation):
        """Rounds that the draft misses included."""
        world = World(order, draft_speed, impatience=impatience)
        assert run(world, num_speculative_tokens=num_speculative_tokens, **speculation).token_ids == TEXT

    @pytest.mark.parametrize("without_draft", [{"method": "autoregressive"}, {"num_speculative_tokens": 0}])
    @pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.5])
    def test_without_a_draft(self, without_draft, temperature):
        assert run(temperature=temperature, **without_draft).token_ids == own_text(temperature)

    @pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
    @pytest.mark.parametrize(
        "draft",
        [{}, {"greedy_draft": True}, {"max_support": 1}, {"max_support": 3}],
        ids=["plain", "greedy", "support of one", "support of three"],
    )
    def test_for_every_way_to_draft(self, temperature, draft):
        for num_speculative_tokens in EVERY_K:
            settings = {"temperature": temperature, "num_speculative_tokens": num_speculative_tokens}
            assert run(World(num_speculative_tokens), **settings, **draft).token_ids == own_text(temperature)

    def test_with_another_draft(self, monkeypatch):
        monkeypatch.setattr(toys, "DRAFT_LOGITS", toys.DRAFT_LOGITS[::-1].copy())
        assert run().token_ids == TEXT

    def test_another_seed_gives_another_text(self):
        assert run(seed=12).token_ids == own_text(seed=12) != TEXT

    def test_services_that_break_again_and_again_change_nothing(self):
        world, num_requests = World(5), 0

        def fail(stream: Stream, message) -> None:
            nonlocal num_requests
            num_requests += 1
            if num_requests % 4 == 0:
                stream.end(grpc.StatusCode.UNAVAILABLE)

        world.on_arrival = fail
        result = run(world)
        assert result.token_ids == TEXT
        assert min(result.stats.num_target_retries, result.stats.num_draft_failures) > 0
        assert result.stats.num_rounds_without_draft > 0

    def test_the_draft_alone_writes_its_own(self):
        model, noise, tokens = toys.ToyModel(toys.DRAFT_LOGITS), toys.SharedNoise(11), toys.TokenLog(toys.PROMPT_IDS)
        for position in range(len(tokens), len(tokens) + NUM_TOKENS):
            tokens.extend([toys.draft_proposal(model, tokens, noise.at(position), 0).token_id])
        assert run(method="draft").token_ids == tokens[len(toys.PROMPT_IDS) :]


def test_tokens_alone_are_exchanged():
    world, num_seen = World(), dict.fromkeys(Link, 0)

    def look_at_response(stream: Stream, message) -> None:
        if stream.link is Link.DRAFT:
            supports = [
                part for proposal in message.proposals for part in (proposal.support_gaps, proposal.support_weights)
            ]
        else:
            supports = [row.support_units for row in message.rows]
        num_seen[stream.link] += len(supports)
        assert not any(supports)

    def look_at_request(stream: Stream, message) -> None:
        if stream.link is Link.TARGET:
            assert not any(proposal.support_gaps for proposal in message.round.proposals)

    world.on_response, world.on_arrival = look_at_response, look_at_request
    run(world)
    assert min(num_seen.values()) >= NUM_TOKENS


@pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
def test_counts_are_those_of_any_generation(num_speculative_tokens):
    world = World(1)
    conversation = make_conversation(
        world, rule="shared_noise", max_new_tokens=NUM_TOKENS, num_speculative_tokens=num_speculative_tokens
    )
    result, chunks = world.run(conversation)
    stats, segments = result.stats, [segment for chunk in chunks for segment in chunk.segments]
    assert len(chunks) == stats.num_rounds
    assert len(segments) == stats.num_generated_tokens == NUM_TOKENS
    assert sum(world.num_proposals_at.values()) == sum(stats.num_draft_tokens_per_position) == stats.num_draft_tokens
    assert sum(segment.is_drafted for segment in segments) == stats.num_accepted_tokens
    assert sum(stats.num_accepted_tokens_per_position) == stats.num_accepted_tokens
    assert 0 < stats.acceptance_rate < 1


def test_a_draft_that_is_the_target_has_all_proposals_accepted(monkeypatch):
    monkeypatch.setattr(toys, "DRAFT_LOGITS", toys.TARGET_LOGITS)
    stats = run().stats
    assert stats.acceptance_rate == 1.0
    assert stats.num_generated_tokens == stats.num_accepted_tokens == NUM_TOKENS


def test_a_draft_with_other_noise_lowers_acceptance_and_leaves_the_text(monkeypatch):
    shared = [run(World(seed)).stats.acceptance_rate for seed in range(5)]
    monkeypatch.setattr(toys.ToyDraft, "draft", with_other_noise(toys.ToyDraft.draft))
    other = [run(World(seed)) for seed in range(5)]
    assert all(result.token_ids == TEXT for result in other)
    assert sum(result.stats.acceptance_rate for result in other) < 0.7 * sum(shared)


def with_other_noise(draft):
    def draft_with_other_noise(session):
        session._numbers = toys.SharedNoise(session._opening.seed + 1)
        return draft(session)

    return draft_with_other_noise


def test_noise_that_is_streamed_instead_of_addressed_is_noticed(monkeypatch):
    """The target's noise then depends on how many rows it has read before."""
    answer = toys.ToyTarget.answer

    class Streamed(toys.SharedNoise):
        num_drawn = 0

        def at(self, position: int) -> toys.Noise:
            self.num_drawn += 1
            return super().at(self.num_drawn)

    def answer_with_streamed_noise(session, message):
        if not isinstance(session._numbers, Streamed):
            session._numbers = Streamed(11)
        return answer(session, message)

    monkeypatch.setattr(toys.ToyTarget, "answer", answer_with_streamed_noise)
    texts = {tuple(run(num_speculative_tokens=number).token_ids) for number in (0, *EVERY_K)}
    assert len(texts) > 1


def test_a_token_that_the_target_does_not_know_is_a_failure_of_the_draft():
    world = World()

    def raise_id(stream: Stream, message) -> None:
        if stream.link is Link.DRAFT:
            message.proposals[0].token_id = toys.VOCAB_SIZE

    world.on_response = raise_id
    result = run(world)
    assert result.token_ids == TEXT
    assert result.stats.draft_failures.keys() == {"BROKE_PROTOCOL"}
    assert "proposed token 9" in result.stats.first_draft_failure
