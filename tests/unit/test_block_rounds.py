"""Rounds whose proposals are judged together: what a seed still fixes, and that no random number decides twice.

Against the toy services, as in test_conversation; test_distribution_block shows that the distribution stays right.
"""

from __future__ import annotations

import grpc
import pytest

from outrider.sampling.rng import uniforms
from outrider_client.conversation.draft_link import DraftLink
from outrider_client.conversation.effects import Link
from outrider_client.conversation.generation import Generation
from outrider_client.rules import acceptance
from tests import toy_services as toys
from tests.toy_services import EVERY_K, NUM_TOKENS, Stream, World, make_conversation


def run(world: World | None = None, rule: str = "block", **settings):
    world = world or World()
    return world.run(make_conversation(world, rule=rule, max_new_tokens=NUM_TOKENS, **settings))[0]


@pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
def test_with_rounds_of_one_length_a_seed_gives_one_text(num_speculative_tokens):
    """Whatever comes first, and however far the draft runs ahead."""
    expected = run(num_speculative_tokens=num_speculative_tokens).token_ids
    for order in range(10):
        world = World(order, draft_speed=(0.05, 1.0, 10.0)[order % 3])
        settings = {"overlap": order % 2 == 0, "window": num_speculative_tokens + order}
        assert run(world, num_speculative_tokens=num_speculative_tokens, **settings).token_ids == expected


def test_a_target_that_fails_again_and_again_changes_nothing():
    world, num_requests = World(3), 0

    def fail(stream: Stream, message) -> None:
        nonlocal num_requests
        num_requests += stream.link is Link.TARGET
        if stream.link is Link.TARGET and num_requests % 3 == 0:
            stream.end(grpc.StatusCode.UNAVAILABLE)

    world.on_arrival = fail
    result = run(world)
    assert result.token_ids == run().token_ids
    assert result.stats.num_target_retries > 1


def test_another_k_gives_another_text():
    texts = {tuple(run(num_speculative_tokens=number).token_ids) for number in (1, 2, 3)}
    assert len(texts) == 3


def test_rounds_of_one_proposal_are_those_of_rejection():
    assert run(num_speculative_tokens=1).token_ids == toys.SeedText().text(NUM_TOKENS)


@pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
def test_greedy_text_is_that_of_the_target_alone(num_speculative_tokens):
    expected = toys.SeedText(temperature=0.0).text(NUM_TOKENS, target_only=True)
    assert run(temperature=0.0, num_speculative_tokens=num_speculative_tokens).token_ids == expected


def test_more_proposals_are_kept():
    """Over 200 texts; one by one, 0.7 of the mass is shared."""
    kept = {
        rule: sum(run(World(seed), rule, seed=seed).stats.num_accepted_tokens for seed in range(200))
        for rule in ("rejection", "block")
    }
    assert kept["block"] > 1.02 * kept["rejection"]


class Numbers:
    """Notes which random number each proposal of a decided round was drawn with: (branch, position)."""

    def __init__(self, monkeypatch):
        self.decided: list[tuple[int, int]] = []
        drawn: dict[int, int] = {}  # the branch that a position was last drawn under
        draft, commit_round = toys.ToyDraft.draft, Generation.commit_round

        def noted_draft(session):
            response = draft(session)
            drawn[response.start_position] = session.branch
            return response

        def noted_commit_round(generation, decision, num_kept):
            first, number = len(generation.committed), generation.target.num_proposals
            self.decided += [(drawn[position], position) for position in range(first, first + number)]
            commit_round(generation, decision, num_kept)

        monkeypatch.setattr(toys.ToyDraft, "draft", noted_draft)
        monkeypatch.setattr(Generation, "commit_round", noted_commit_round)

    @property
    def num_repeated(self) -> int:
        return len(self.decided) - len(set(self.decided))


@pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
def test_no_random_number_of_a_proposal_decides_twice(monkeypatch, num_speculative_tokens):
    """Proposals take part in decisions that drop them; what is drafted in their places is drawn anew."""
    for order in range(20):
        numbers = Numbers(monkeypatch)
        run(World(order, draft_speed=0.5, impatience=0.1), num_speculative_tokens=num_speculative_tokens)
        assert numbers.decided
        assert numbers.num_repeated == 0
        monkeypatch.undo()


def test_a_rejected_token_that_comes_back_keeps_no_proposal_behind_it(monkeypatch):
    """The residual may hold the proposal itself, so that a commit agrees with what it rejects."""
    monkeypatch.setattr(acceptance, "draw_recovered", lambda proposal, *rest: proposal.token_id)
    for order in range(20):
        numbers = Numbers(monkeypatch)
        result = run(World(order, draft_speed=(0.5, 10.0)[order % 2]), num_speculative_tokens=4)
        assert result.stats.num_accepted_tokens < NUM_TOKENS
        assert numbers.num_repeated == 0


def test_a_draft_that_is_not_sent_branches_is_noticed(monkeypatch):
    monkeypatch.setattr(DraftLink, "_branch", property(lambda self: 0, lambda self, value: None), raising=False)
    numbers = Numbers(monkeypatch)
    run(num_speculative_tokens=5)
    assert numbers.num_repeated > 0


def test_branches_are_independent():
    """Two of 2,000 right numbers of 53 bits are equal with chance 2e-10."""
    values = [uniforms(7, range(100, 200), toys.Purpose.DRAFT, branch) for branch in range(20)]
    assert len({value for row in values for value in row.tolist()}) == 2000
