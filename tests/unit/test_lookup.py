"""Finding matches, what is proposed behind them, and how many proposals are worth it; against plain searches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_client.lookup import index, lookup
from outrider_client.lookup.experience import PRIOR_AGREEMENT, Experience
from outrider_client.lookup.index import Index
from outrider_client.lookup.lookup import LEAST_MATCH, LOOKUP, MOST_PROPOSALS, NOTHING, PREDICTION, Lookup

MANY = 100  # proposals; as many as one likes

texts = st.one_of(
    st.lists(st.integers(0, 1), max_size=60),
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.sampled_from([[1, 2, 3, 4], [2, 3], [5], [1, 2, 6]]), max_size=20).map(
        lambda parts: [token_id for part in parts for token_id in part]
    ),
)


def searched(text: Sequence[int], among: Sequence[int], most: int) -> tuple[int, int]:
    """Return the length of the longest end of `text`, up to `most`, that has something behind it in `among`.

    And how many tokens of `among` lie before that something, the last time; both 0 where there is none.
    """
    for length in range(min(most, len(text)), 0, -1):
        ends = [end for end in range(length, len(among)) if among[end - length : end] == text[len(text) - length :]]
        if ends:
            return length, ends[-1]
    return 0, 0


class TestIndex:
    @settings(max_examples=300)
    @given(text=texts, most=st.sampled_from([1, 2, 3, 5, 32]))
    def test_it_finds_the_longest_match_of_a_text_with_itself_and_its_most_recent_place(self, text, most):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "MOST_MATCH", most)
            found = Index()
            for length, token_id in enumerate(text, start=1):
                end = found.append(token_id)
                assert (found.match_length, end) == searched(text[:length], text[:length], most)

    @settings(max_examples=300)
    @given(text=texts, other=texts, most=st.sampled_from([1, 2, 5, 32]))
    def test_it_matches_another_text_without_taking_it_in(self, text, other, most):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "MOST_MATCH", most)
            found = Index(text)
            found.restart()
            for length, token_id in enumerate(other, start=1):
                found.advance(token_id)
                expected = searched(other[:length], [*text, None], most)  # None: so that the end has something behind
                assert (found.match_length, found.match_length and found.match_end) == expected

    @pytest.mark.parametrize("text", [[7] * 3000, [1, 2, 3] * 1000, list(range(3000)), list(range(1500)) * 2], ids=str)
    def test_its_states_and_transitions_are_few(self, text):
        """Those of a suffix automaton: below 2 n and 3 n."""
        found = Index(text)
        assert len(found._links) < 2 * len(text)
        assert sum(map(len, found._transitions)) < 3 * len(text)

    def test_a_token_takes_a_bounded_number_of_steps_even_in_a_text_that_repeats_itself(self):
        """Without MOST_MATCH the places of all 1,500 suffixes would be written down again for each token."""

        class Counting(list):
            num_written = 0

            def __setitem__(self, *item) -> None:
                Counting.num_written += 1
                super().__setitem__(*item)

        found = Index()
        found._ends = Counting(found._ends)
        for token_id in [1, 2] * 750:
            found.append(token_id)
        assert 1500 < Counting.num_written <= 1500 * (index.MOST_MATCH + 1)


def looked_up(text: Sequence[int], most: int, num_prompt_tokens: int = 1) -> list[int]:
    """Return what a lookup proposes that has read the text token by token."""
    grown = list(text[:num_prompt_tokens])
    found = Lookup(grown, Experience(), length=most)
    for token_id in text[num_prompt_tokens:]:
        found.catch_up()
        grown.append(token_id)
    return list(found.propose(MANY).token_ids)


class TestProposals:
    @settings(max_examples=300)
    @given(text=texts.filter(bool), most=st.integers(1, 8))
    def test_they_are_what_came_behind_the_longest_match_the_most_recent_time(self, text, most):
        length, end = searched(text, text, index.MOST_MATCH)
        proposed = looked_up(text, most)
        if length < LEAST_MATCH:
            assert proposed == []
        else:
            copy = list(text)
            for _ in range(most):
                copy.append(copy[end + len(copy) - len(text)])
            assert proposed == copy[len(text) :]

    @settings(max_examples=200)
    @given(text=texts.filter(bool), most=st.integers(2, 8), num_prompt_tokens=st.integers(1, 60))
    def test_they_do_not_depend_on_where_rounds_begin(self, text, most, num_prompt_tokens):
        """Each is what would be proposed alone, were those before it committed."""
        text, proposed = list(text), looked_up(text, most)
        for number, token_id in enumerate(proposed):
            assert looked_up([*text, *proposed[:number]], 1, min(num_prompt_tokens, len(text))) == [token_id]

    def test_a_repeated_text_is_proposed_to_any_length(self):
        assert looked_up([9, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]

    def test_a_single_token_is_no_match(self):
        assert looked_up([1, 2, 3, 1], 4) == []
        assert looked_up([1, 2, 3, 1, 2], 2) == [3, 1]

    def test_there_are_no_more_than_may_come(self):
        text = [1, 2, 3] * 4
        assert len(Lookup(text, Experience(), length=8).propose(5).token_ids) == 5
        assert Lookup(text, Experience(), length=8).propose(0) == NOTHING


class TestPrediction:
    PROMPT, OUTPUT = [1, 2, 3], [*range(10, 40)]

    def run(self, prediction: Sequence[int], output: Sequence[int]) -> list[tuple[str, int]]:
        """Write `output` in rounds that accept what agrees with it; return source and accepted tokens of each."""
        text, rounds = list(self.PROMPT), []
        found = Lookup(text, Experience(), length=8, prediction_ids=prediction)
        while (start := len(text) - len(self.PROMPT)) < len(output):
            proposal = found.propose(len(output) - start)
            agreeing = 0
            while output[start : start + agreeing + 1] == list(proposal.token_ids[: agreeing + 1]) and agreeing < len(
                proposal.token_ids
            ):
                agreeing += 1
            text += output[start : start + max(1, min(agreeing + 1, len(proposal.token_ids)))]
            rounds.append((proposal.source if proposal.token_ids else "", agreeing))
        return rounds

    def test_it_is_followed_from_its_beginning(self):
        assert self.run(self.OUTPUT, self.OUTPUT) == [(PREDICTION, 8)] * 3 + [(PREDICTION, 6)]

    @pytest.mark.parametrize(
        "predicted", [[], [99], [99, 98, 97, 96]], ids=["inserted", "replaced", "replaced by fewer"]
    )
    @pytest.mark.parametrize("num_left_out", [0, 1, 5])
    def test_it_is_followed_again_as_soon_as_two_tokens_agree(self, predicted, num_left_out):
        """The text has a token at index 12 where the prediction has others, or none."""
        output = [*self.OUTPUT[:12], 77, *self.OUTPUT[12 + num_left_out :]]
        prediction = [*self.OUTPUT[:12], *predicted, *self.OUTPUT[12:]]
        rounds = self.run(prediction, output)
        assert rounds[:2] == [(PREDICTION, 8), (PREDICTION, 4)]
        assert rounds[2:4] == [("", 0), ("", 0)]
        assert all(source == PREDICTION and agreeing >= 2 for source, agreeing in rounds[4:])

    def test_it_comes_before_the_text_where_both_match_as_well(self):
        text = [5, 6, 7, 8, 1]
        found = Lookup(text, Experience(), length=1, prediction_ids=[9, 5, 6, 4])
        found.catch_up()
        text += [5, 6]
        assert (found.propose(MANY).source, found.propose(MANY).token_ids) == (PREDICTION, [4])

    def test_the_longer_match_comes_first(self):
        text = [4, 5, 6, 7, 8, 1]
        found = Lookup(text, Experience(), length=1, prediction_ids=[9, 5, 6, 3])
        found.catch_up()
        text += [4, 5, 6]
        assert (found.propose(MANY).source, found.propose(MANY).token_ids) == (LOOKUP, [7])

    def test_behind_its_end_the_text_itself_is_looked_at(self):
        text = [1, 2, 3, 4]
        found = Lookup(text, Experience(), length=2, prediction_ids=[1, 2])
        assert found.propose(MANY).token_ids == [1, 2]
        text += [1, 2]
        assert (found.propose(MANY).source, found.propose(MANY).token_ids) == (LOOKUP, [3, 4])

    def test_an_empty_one_is_none(self):
        assert Lookup([1, 2], Experience(), length=2).propose(MANY) == NOTHING


class TestExperience:
    def test_each_class_of_matches_has_its_own_agreement(self):
        known = Experience()
        assert [known.agreement(length) for length in (2, 3, 4, 8, 16, 32, 999)] == pytest.approx(
            [PRIOR_AGREEMENT[0], *PRIOR_AGREEMENT, PRIOR_AGREEMENT[-1]]
        )
        known.learn_agreement([(5, False)] * 50 + [(20, True)] * 50)
        assert known.agreement(4) < 0.1 < PRIOR_AGREEMENT[0] == known.agreement(2)
        assert known.agreement(31) > 0.97

    def test_it_is_learned_from_the_text_although_nothing_is_proposed(self):
        """So what once did not pay is known to pay as soon as it does."""
        known = Experience()
        known.learn_agreement([(length, False) for length in (2, 4, 8, 16, 32) for _ in range(60)])
        text = [1, 2, 3, 4, 5, 6]
        found = Lookup(text, known)
        assert found.propose(MANY) == NOTHING
        text += [1, 2, 3, 4, 5, 6] * 60
        assert len(found.propose(MANY).token_ids) > 8

    def test_a_round_is_expected_to_commit_what_agreement_says(self):
        known = Experience()
        one, two = known.agreement(3), known.agreement(4)
        assert known.expected_tokens(3, 4) == pytest.approx(
            [1, 1, 1 + one, 1 + one + one * two, 1 + one + one * two * (1 + two)]
        )
        assert known.expected_tokens(3, 0) == [1]

    def test_the_number_follows_the_length_of_the_match(self):
        known = Experience()
        numbers = [known.best_number(known.expected_tokens(length, MOST_PROPOSALS)) for length in (2, 4, 8, 16, 32)]
        assert numbers == sorted(numbers)
        assert numbers[0] < 8 < numbers[-1]

    @pytest.mark.parametrize(("slope", "least", "most"), [(0.0, 40, 48), (0.5, 2, 6), (2.0, 0, 0)])
    def test_and_what_proposals_cost(self, slope, least, most):
        """A round of K takes 1 + slope (K - 1) seconds."""
        known = Experience()
        for number in (0, 2, 4, 8, 16) * 40:
            known.learn_round(number, 1 + slope * max(0, number - 1))
        assert least <= known.best_number(known.expected_tokens(16, MOST_PROPOSALS)) <= most

    def test_where_a_seed_depends_on_proposals_there_is_one_wherever_there_is_a_match(self):
        known = Experience()
        known.learn_agreement([(2, False)] * 200)
        text = [1, 2, 3, 1, 2]
        assert Lookup(text, known).propose(MANY) == NOTHING
        assert Lookup(text, known, is_wanted=True).propose(MANY).token_ids == [3]

    def test_the_better_source_is_the_one_with_more_tokens_to_expect(self):
        known = Experience()
        found = Lookup([1, 2, 3] * 6, known, length=8)
        weak = Lookup([1, 2, 3, 1, 2], known, length=8)
        for _ in range(100):
            known.learn_draft_round(3)
        assert found.is_better_than_draft(found.propose(MANY))
        assert not weak.is_better_than_draft(weak.propose(MANY))
        for _ in range(100):
            known.learn_draft_round(8)
        assert not found.is_better_than_draft(found.propose(MANY))

    def test_what_is_known_of_the_draft_fades_while_it_has_no_rounds(self):
        known = Experience()
        for _ in range(100):
            known.learn_draft_round(1)
        before = known.draft_tokens
        for _ in range(300):
            known.learn_round(8, 1.0)
        assert before < 1.2 < 2 < known.draft_tokens


def test_the_least_match_is_what_it_says(monkeypatch):
    monkeypatch.setattr(lookup, "LEAST_MATCH", 3)
    assert looked_up([1, 2, 3, 4, 1, 2], 2) == []
    assert looked_up([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
