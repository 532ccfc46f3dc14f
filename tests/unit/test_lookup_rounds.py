"""Rounds whose proposals are looked up, with no draft service and beside one, against the toy services.

With no other source a seed's text is computed here token by token, as in test_conversation.
"""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.protocol.tokens import TokenLog
from outrider.sampling.rng import Purpose
from outrider_client.conversation.effects import Describe, Link
from outrider_client.lookup.experience import Experience
from outrider_client.lookup.lookup import Lookup
from outrider_client.results import GenerationResult
from outrider_client.rules.acceptance import Proposal, decide
from tests.toy_services import EVERY_K, SeedText, World, fail_requests, make_conversation

PROMPT = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 8, 4, 7, 2, 3, 1, 4, 0, 2, 1, 1, 3, 0, 6, 2, 4, 4, 8, 8, 5, 7, 0, 7, 6, 3]
NUM_NEW = 40
RULES = ("rejection", "block", "shared_noise")


def run(world: World | None = None, has_draft: bool = False, **how) -> GenerationResult:
    """Return a text whose proposals are looked up."""
    world = world or World()
    known = how.pop("experience", None) or Experience()
    how = {"prompt_ids": PROMPT, "max_new_tokens": NUM_NEW} | how
    return world.run(make_conversation(world, has_draft=has_draft, experience=known, **how))[0]


class LookupText(SeedText):
    """What a seed says where proposals are looked up, token by token, by rejection."""

    def next_token(self, token_ids) -> int:
        found = Lookup(token_ids, Experience(), length=1).propose(1).token_ids
        if not found:
            return self.next_token_target_only(token_ids)
        tokens, support = TokenLog(token_ids), np.array(found)
        uniforms = [[self._uniform(purpose, tokens)] for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL)]
        return decide([Proposal(found[0], support, np.ones(1), 0)], [self._row(tokens, support)], *uniforms).token_ids[
            0
        ]


@pytest.fixture(autouse=True)
def _no_word_to_a_draft_that_is_not_there(monkeypatch) -> None:
    """World.run opens whatever it is asked to; a conversation without a draft must not ask."""
    run_conversation = World.run

    def checked(world: World, conversation):
        if not conversation._task.has_draft:
            world.on_effect = lambda effect: pytest.fail(f"{effect}") if _is_for_draft(effect) else None
        return run_conversation(world, conversation)

    monkeypatch.setattr(World, "run", checked)


def _is_for_draft(effect) -> bool:
    return isinstance(effect, Describe) or getattr(effect, "link", None) is Link.DRAFT


class TestAlone:
    @settings(max_examples=10)
    @pytest.mark.parametrize("number", [*EVERY_K, "auto"])
    @given(order=st.integers(0, 2**32))
    def test_a_seed_has_one_text_by_rejection_whatever_rounds_are_like(self, number, order):
        result = run(World(order), num_speculative_tokens=number)
        assert result.token_ids == LookupText().text(NUM_NEW, PROMPT)

    @pytest.mark.parametrize("number", [*EVERY_K, "auto"])
    def test_with_shared_noise_it_is_the_targets_own(self, number):
        result = run(num_speculative_tokens=number, rule="shared_noise")
        assert result.token_ids == run(num_speculative_tokens=0, rule="shared_noise").token_ids
        assert result.stats.num_draft_tokens > 0

    @pytest.mark.parametrize("number", EVERY_K)
    def test_judged_together_it_depends_on_k_alone(self, number):
        texts = {tuple(run(World(order), num_speculative_tokens=number, rule="block").token_ids) for order in range(5)}
        assert len(texts) == 1

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("number", EVERY_K)
    def test_greedy_text_is_that_of_the_target_alone(self, number, rule):
        expected = SeedText(temperature=0.0).text(NUM_NEW, PROMPT, target_only=True)
        result = run(temperature=0.0, num_speculative_tokens=number, rule=rule)
        assert result.token_ids == expected

    @pytest.mark.parametrize("rule", RULES)
    def test_a_target_that_drops_its_stream_changes_nothing(self, rule):
        expected = run(rule=rule, num_speculative_tokens=4).token_ids
        for order in range(5):
            world = World(order)
            fail_requests(world, Link.TARGET, dict.fromkeys((1, 4, 9), grpc.StatusCode.UNAVAILABLE), order % 2 == 0)
            result = run(world, rule=rule, num_speculative_tokens=4)
            assert result.token_ids == expected
            assert result.stats.num_target_retries == 3

    def test_a_text_without_a_match_has_rounds_without_proposals(self):
        result = run(prompt_ids=[3], max_new_tokens=2, num_speculative_tokens=4)
        assert (result.stats.num_rounds, result.stats.num_draft_tokens) == (2, 0)
        assert result.stats.num_rounds_without_draft == 2
        assert result.token_ids == SeedText().text(2, [3], target_only=True)

    def test_the_end_of_the_text_and_the_targets_limit_are_kept(self):
        world = World()
        predicted = run(num_speculative_tokens=0, rule="shared_noise").token_ids
        result = run(world, prediction=predicted, num_speculative_tokens=30, rule="shared_noise")
        assert max(one.num_draft_tokens for one in result.stats.rounds) == 30
        assert sum(one.num_draft_tokens for one in result.stats.rounds) == NUM_NEW
        conversation = make_conversation(
            world, PROMPT, max_new_tokens=NUM_NEW, has_draft=False, experience=Experience(), prediction=predicted,
            num_speculative_tokens=30,
        )  # fmt: skip
        conversation._task.target_info.limits.max_proposals = 3
        assert max(one.num_draft_tokens for one in world.run(conversation)[0].stats.rounds) == 3


class TestPrediction:
    @pytest.mark.parametrize("rule", ["rejection", "shared_noise"])
    def test_one_that_comes_true_is_written_in_full_rounds(self, rule):
        expected = run(num_speculative_tokens=0, rule="shared_noise", temperature=0.0).token_ids
        result = run(prediction=expected, num_speculative_tokens=8, rule=rule, temperature=0.0)
        assert result.token_ids == expected
        assert result.stats.num_rounds == NUM_NEW // 8
        assert result.stats.num_accepted_tokens_by_source == {"prediction": NUM_NEW}

    @pytest.mark.parametrize("prediction", [[0, 1, 2], [8] * 50, [5]])
    def test_one_that_does_not_changes_no_text(self, prediction):
        expected = run(rule="shared_noise", num_speculative_tokens=0).token_ids
        assert run(rule="shared_noise", prediction=prediction, num_speculative_tokens=3).token_ids == expected

    @pytest.mark.parametrize("seed", range(5))
    def test_by_rejection_a_seeds_text_depends_on_no_k(self, seed):
        how = {"prediction": [1, 4, 1, 5, 2, 6, 7, 7, 1], "seed": seed}
        expected = run(num_speculative_tokens=1, **how).token_ids
        for number in (2, 3, 8, "auto"):
            assert run(num_speculative_tokens=number, **how).token_ids == expected

    def test_by_rejection_a_seeds_text_depends_on_the_prediction(self):
        texts = {tuple(run(prediction=[token_id] * 9, seed=2, max_new_tokens=9).token_ids) for token_id in range(9)}
        assert len(texts) > 1


class TestBesideADraft:
    @settings(max_examples=25)
    @pytest.mark.parametrize("number", [2, 5])
    @given(
        order=st.integers(0, 2**32),
        draft_speed=st.sampled_from([0.05, 1.0, 10.0]),
        impatience=st.sampled_from([0.0, 0.3]),
    )
    def test_with_shared_noise_the_text_is_the_targets_own(self, number, order, draft_speed, impatience):
        world = World(order, draft_speed, impatience=impatience)
        known, how = Experience(), {"rule": "shared_noise", "num_speculative_tokens": number}
        result = run(world, has_draft=True, experience=known, **how)
        assert result.token_ids == run(num_speculative_tokens=0, rule="shared_noise").token_ids
        assert result.stats.num_cache_mismatches == 0
        assert set(result.stats.draft_failures) <= {"SILENT"}

    @pytest.mark.parametrize("rule", RULES)
    def test_both_have_rounds_and_are_counted(self, rule):
        drafted, accepted = {}, {}
        for seed in range(12):
            stats = run(
                World(seed), has_draft=True, seed=seed, rule=rule, experience=turns(), num_speculative_tokens=4
            ).stats
            assert not stats.draft_failures
            assert sum(stats.num_draft_tokens_by_source.values()) == stats.num_draft_tokens
            assert sum(stats.num_accepted_tokens_by_source.values()) == stats.num_accepted_tokens
            for total, its in (
                (drafted, stats.num_draft_tokens_by_source),
                (accepted, stats.num_accepted_tokens_by_source),
            ):
                total.update({source: total.get(source, 0) + number for source, number in its.items()})
        assert drafted.keys() == accepted.keys() == {"draft", "lookup"}
        assert min(accepted.values()) > 0
        assert min(drafted.values()) > 100

    def test_a_draft_that_is_not_there_leaves_the_rounds_to_lookup(self):
        world = World()
        world.draft_info = None
        expected = run(num_speculative_tokens=0, rule="shared_noise", temperature=0.0).token_ids
        result = run(
            world, has_draft=True, prediction=expected, num_speculative_tokens=4, temperature=0.0, experience=never()
        )
        assert result.token_ids == expected
        assert result.stats.num_accepted_tokens_by_source == {"prediction": NUM_NEW}
        assert result.stats.draft_failures

    def test_where_there_is_no_match_the_draft_is_asked(self):
        result = run(prompt_ids=[3], max_new_tokens=3, has_draft=True, num_speculative_tokens=2, experience=always())
        assert result.stats.num_draft_tokens_by_source.keys() == {"draft"}

    def test_the_better_one_wins(self):
        """A prediction that comes true leaves the draft, which agrees with half of it, no round but the first."""
        expected = run(num_speculative_tokens=0, rule="shared_noise").token_ids
        how = {"rule": "shared_noise", "num_speculative_tokens": 5, "has_draft": True}
        right, wrong = run(prediction=expected, **how), run(prediction=[7, 7, 0] * 20, **how)
        assert right.token_ids == wrong.token_ids == expected
        assert right.stats.num_accepted_tokens_by_source.get("draft", 0) <= 5
        assert wrong.stats.num_accepted_tokens_by_source["draft"] > NUM_NEW / 4

    def test_rounds_that_are_looked_up_end_no_branch_of_the_draft(self):
        """Nothing of the draft's has decided in them, so its random numbers are as new as before."""
        branches: set[int] = set()
        world = World(1)
        world.on_arrival = lambda stream, message: (
            branches.add(message.commit.branch) if stream.link is Link.DRAFT and message.HasField("commit") else None
        )
        result = run(world, has_draft=True, rule="block", num_speculative_tokens=4, experience=always())
        assert result.stats.num_draft_tokens_by_source.get("lookup", 0) > 20
        starts, position = set(), len(PROMPT)
        for one in result.stats.rounds:
            position += one.num_committed_tokens
            starts.add(position)
        drafts_rounds = result.stats.num_draft_tokens_by_source.get("draft", 0)
        assert len(branches - {0}) <= drafts_rounds


class Decided(Experience):
    """Prefers lookup in those rounds of which `choose` says so."""

    def __init__(self, choose):
        super().__init__()
        self._choose, self._num_asked = choose, 0

    @property
    def draft_tokens(self) -> float:
        self._num_asked += 1
        return -1.0 if self._choose(self._num_asked) else 1e9


def always() -> Experience:
    return Decided(lambda number: True)


def never() -> Experience:
    return Decided(lambda number: False)


def turns() -> Experience:
    return Decided(lambda number: number % 2 == 1)
