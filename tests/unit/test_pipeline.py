"""Logits become the distributions that transformers' own warpers make, and draws follow them.

Shapes: N rows, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling import filters, pipeline, readers
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import MIN_SUPPORT_PROB
from outrider.sampling.race import race
from outrider.sampling.readers import reference, tables
from outrider.sampling.readers.reference import inverse_cdf
from outrider.sampling.rng import Noise, Purpose, uniforms
from tests.rows import draft_tokens, draw_drafts, probability_rows, read_logits, read_target_rows
from tests.toy_services import addresses_of

VOCAB_SIZE = 50
TOLERANCE = 1e-14  # a softmax of 50 values near 1 in float64 loses a few units in the last place, 2^-53 = 1.1e-16 each
GRID = [
    DistributionParams(temperature, top_k, top_p, min_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, VOCAB_SIZE, 10 * VOCAB_SIZE)
    for top_p in (1.0, 0.9, 0.35, 1e-6)
    for min_p in (0.0, 0.04, 0.5, 1.0)
]


def logits_of(num_rows: int, seed: int, std: float = 2.0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Return `[N, V] float64`; a standard deviation of 2 puts about a third of the mass on the likeliest token."""
    return std * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformers_probs(logits: torch.Tensor, params: DistributionParams) -> torch.Tensor:
    """Return `[N, V]` as transformers' `generate` makes them, its warpers in its order."""
    warpers: list = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("std", [0.1, 2.0, 10.0], ids=["flat", "usual", "sharp"])
def test_rows_are_those_of_transformers_for_every_combination_of_filters(std):
    logits = logits_of(8, seed=1, std=std)
    for params in GRID:
        actual = probability_rows(logits, [params] * len(logits))
        assert (actual - transformers_probs(logits, params)).abs().max() < TOLERANCE, params


def test_a_mixed_batch_gives_each_row_what_it_gets_alone():
    all_params = [*GRID, DistributionParams(0.0), DistributionParams(0.0, top_k=3)]
    logits = logits_of(len(all_params), seed=2)
    together = probability_rows(logits, all_params)
    for row, params, probs in zip(logits, all_params, together, strict=True):
        assert torch.equal(probs, probability_rows(row[None], [params])[0]), params


def test_a_batch_of_plain_rows_is_a_softmax():
    logits = logits_of(4, seed=3)
    assert torch.equal(probability_rows(logits, [DistributionParams()] * 4), logits.softmax(-1))


def test_temperature_0_is_one_hot_at_the_lowest_of_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert probability_rows(logits, [DistributionParams(0.0)] * 2).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_the_likeliest_token_survives_every_filter():
    logits = logits_of(8, seed=4)
    params = DistributionParams(1.0, top_k=1, top_p=1e-9, min_p=1.0)
    assert torch.equal(probability_rows(logits, [params] * 8), probability_rows(logits, [DistributionParams(0.0)] * 8))


def test_filters_that_keep_all_change_nothing():
    logits = logits_of(8, seed=4)
    for off, on in (
        (DistributionParams(top_k=2**31 - 1), DistributionParams()),
        (DistributionParams(top_k=3, top_p=1.0, min_p=0.0), DistributionParams(top_k=3)),
    ):
        difference = probability_rows(logits, [off] * 8) - probability_rows(logits, [on] * 8)
        assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_keep_their_type_and_are_what_their_logits_are_in_float32(dtype):
    logits = logits_of(3, seed=5).to(dtype)
    probs = probability_rows(logits, [DistributionParams(0.5, top_k=5)] * 3)
    assert filters.filtered(logits, [DistributionParams(0.5, top_k=5)] * 3).dtype == dtype
    assert torch.equal(probs, probability_rows(logits.float(), [DistributionParams(0.5, top_k=5)] * 3))


@given(weights=st.lists(st.integers(0, 3), min_size=1, max_size=8).filter(any), point=st.floats(0, 1, exclude_max=True))
def test_inverse_cdf_gives_each_index_an_interval_as_long_as_its_share(weights, point):
    """The index drawn is the one whose interval [mass before it, mass up to it) holds the point."""
    index = int(
        inverse_cdf(torch.tensor([weights], dtype=torch.float64), torch.tensor([point], dtype=torch.float64))[0]
    )
    total = sum(weights)
    assert weights[index] > 0
    assert sum(weights[:index]) <= point * total < sum(weights[: index + 1])


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53], ids=["least", "greatest"])
def test_the_ends_of_the_unit_interval_draw_tokens_with_weight(point):
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.4, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0]], dtype=torch.float64)
    expected = [1, 2] if point == 0 else [3, 2]
    assert inverse_cdf(weights, torch.tensor([point, point], dtype=torch.float64)).tolist() == expected


def test_a_row_without_weight_draws_index_0():
    assert inverse_cdf(torch.zeros(1, 4), torch.tensor([0.7])).tolist() == [0]


class TestDrafts:
    """The support is every token of at least MIN_SUPPORT_PROB, cut at the row's own limit."""

    PROBS = probability_rows(logits_of(64, seed=6, std=3.0), [DistributionParams()] * 64)

    def drafts(self, max_support: int):
        return draw_drafts(self.PROBS, [max_support] * 64, uniforms(7, np.arange(64), Purpose.DRAFT).tolist())

    @pytest.mark.parametrize("max_support", [1, 3, VOCAB_SIZE, 10 * VOCAB_SIZE])
    def test_supports_are_the_likeliest_tokens(self, max_support):
        for row, draft in zip(self.PROBS, self.drafts(max_support), strict=True):
            ids = torch.from_numpy(draft.support_ids)
            rest = row.clone().index_fill_(0, ids, 0.0)
            assert rest.max() < MIN_SUPPORT_PROB or len(ids) == max_support
            assert row[ids].min() >= max(rest.max(), MIN_SUPPORT_PROB)
            assert len(ids) <= max_support

    def test_some_support_is_cut_by_the_probability_and_some_by_the_limit(self):
        """Else the test above proves less than it says."""
        sizes = {len(draft.support_ids) for draft in self.drafts(30)}
        assert 30 in sizes
        assert min(sizes) < 30

    def test_ids_ascend_and_weights_are_the_rows_own_to_half_a_unit(self):
        for row, draft in zip(self.PROBS, self.drafts(20), strict=True):
            assert np.array_equal(draft.support_ids, np.unique(draft.support_ids))
            assert np.abs(draft.weights - row[draft.support_ids].numpy() / WEIGHT_UNIT).max() <= 0.5
            assert draft.weights.min() >= 1

    def test_the_token_is_drawn_from_the_weights_that_are_sent(self):
        """Inverse transform of the addressed uniform on the normalised weights, as a receiver would compute it."""
        points = uniforms(7, np.arange(64), Purpose.DRAFT)
        for draft, point in zip(self.drafts(20), points, strict=True):
            cumulative = draft.weights.cumsum()
            index = int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
            assert draft.token_id == draft.support_ids[index]
            assert draft.token_prob == pytest.approx(draft.weights[index] / cumulative[-1], rel=1e-12)

    def test_a_mixed_batch_gives_each_row_what_it_gets_alone(self):
        limits = [1 + row % 9 for row in range(64)]
        points = uniforms(8, np.arange(64), Purpose.DRAFT).tolist()
        together = draw_drafts(self.PROBS, limits, points)
        for row in range(64):
            [alone] = draw_drafts(self.PROBS[row : row + 1], limits[row : row + 1], points[row : row + 1])
            assert alone.token_id == together[row].token_id
            assert np.array_equal(alone.support_ids, together[row].support_ids)
            assert np.array_equal(alone.weights, together[row].weights)

    def test_a_greedy_row_has_a_support_of_one(self):
        drafts = draw_drafts(
            probability_rows(logits_of(4, seed=9), [DistributionParams(0.0)] * 4), [256] * 4, [0.0, 0.3, 0.6, 0.999]
        )
        assert [draft.support_ids.tolist() for draft in drafts] == [[draft.token_id] for draft in drafts]
        assert [draft.weights.tolist() for draft in drafts] == [[8192]] * 4
        assert [draft.token_id for draft in drafts] == logits_of(4, seed=9).argmax(-1).tolist()

    def test_tokens_without_probability_are_in_no_support(self):
        """Masked ids and probabilities that vanish alike."""
        logits = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]], dtype=torch.float64)
        [draft] = draw_drafts(probability_rows(logits, [DistributionParams()]), [4], [0.5])
        assert draft.support_ids.tolist() == [0, 2]

    def test_a_row_without_likely_tokens_keeps_the_likeliest(self):
        """Over a large vocabulary, a flat row may have none of MIN_SUPPORT_PROB."""
        probs = torch.full((1, 20_000), 0.99 / 20_000)
        probs[0, 77] = 0.9 * MIN_SUPPORT_PROB
        [draft] = draw_drafts(probs, [9], [0.5])
        assert draft.support_ids.tolist() == [77]


class TestTargetRows:
    """A row is its probabilities on the support, rounded down, and the mass and one draw of what is left."""

    PROBS = probability_rows(logits_of(4, seed=10), [DistributionParams()] * 4)
    SUPPORTS = tuple(np.array(ids, dtype=np.int64) for ids in ([], [3], [0, 7, 49], range(VOCAB_SIZE)))

    def test_probabilities_and_masses_are_the_rows_own(self):
        rows = read_target_rows(self.PROBS, self.SUPPORTS, [0.5] * 4)
        for probs, support, on_support, mass in zip(
            self.PROBS, self.SUPPORTS, rows.support_probs, rows.outside_masses, strict=True
        ):
            assert np.array_equal(on_support, np.floor(probs[support].numpy() / PROB_UNIT) * PROB_UNIT)
            assert mass == pytest.approx(1 - on_support.sum(), abs=1e-14)

    def test_a_full_support_leaves_what_rounding_cuts_off(self):
        mass = read_target_rows(self.PROBS, self.SUPPORTS, [0.5] * 4).outside_masses[3]
        assert 0 < mass < VOCAB_SIZE * PROB_UNIT

    def test_a_small_mass_outside_keeps_its_precision(self):
        """1 - p(S) would give 0 or 1.1e-16 where the mass is e^-40 = 4.2e-18."""
        probs = probability_rows(torch.tensor([[0.0, -40.0, 0.0]], dtype=torch.float64), [DistributionParams()])
        mass = read_target_rows(probs, [np.array([0, 2])], [0.5]).outside_masses[0]
        assert mass == pytest.approx(np.exp(-40) / 2, rel=1e-12)

    def test_outside_tokens_follow_the_row_without_its_support(self):
        """A grid of points draws each outside token in proportion to its probability, to one point."""
        num_points = 20_000
        points = ((np.arange(num_points) + 0.5) / num_points).tolist()
        probs, support = self.PROBS[:1], self.SUPPORTS[2]
        drawn = read_target_rows(probs.expand(num_points, -1), [support] * num_points, points).outside_token_ids
        outside = probs[0].clone().index_fill_(0, torch.from_numpy(support), 0.0)
        expected = (outside / outside.sum()).numpy()
        shares = np.bincount(drawn, minlength=VOCAB_SIZE) / num_points
        assert np.abs(shares - expected).max() <= 1 / num_points + 1e-12
        assert shares[support].max() == 0

    def test_a_mixed_batch_gives_each_row_what_it_gets_alone(self):
        points = [0.1, 0.4, 0.7, 0.9]
        together = read_target_rows(self.PROBS, self.SUPPORTS, points)
        for row in range(4):
            alone = read_target_rows(self.PROBS[row : row + 1], self.SUPPORTS[row : row + 1], points[row : row + 1])
            assert np.array_equal(alone.support_probs[0], together.support_probs[row])
            assert alone.outside_masses[0] == together.outside_masses[row]
            assert alone.outside_token_ids[0] == together.outside_token_ids[row]

    def test_greedy_rows_are_those_of_one_hot_rows(self):
        logits = logits_of(4, seed=3)
        supports = [np.array(ids, dtype=np.int64) for ids in ([], [3], [0, 7, 49])]
        supports.append(np.array([logits[3].argmax().item()]))
        one_hot = probability_rows(logits, [DistributionParams(temperature=0)] * 4)
        expected = read_target_rows(one_hot, supports, [0.3] * 4)
        rows, _ = read_logits(logits, [DistributionParams(temperature=0)] * 4, supports, [0.3] * 4)
        assert rows.outside_masses == expected.outside_masses
        assert rows.outside_token_ids == expected.outside_token_ids
        assert all(map(np.array_equal, rows.support_probs, expected.support_probs))


def test_greedy_drafts_are_those_of_one_hot_rows():
    logits = logits_of(5, seed=4)
    expected = draw_drafts(probability_rows(logits, [DistributionParams(temperature=0)] * 5), [9] * 5, [0.2] * 5)
    for draft, other in zip(
        draft_tokens(logits, [DistributionParams(temperature=0)] * 5, [9] * 5, [0.2] * 5), expected, strict=True
    ):
        assert (draft.token_id, draft.token_prob) == (other.token_id, other.token_prob)
        assert np.array_equal(draft.support_ids, other.support_ids)
        assert np.array_equal(draft.weights, other.weights)


class TestElsewhere:
    """Rows that an accelerator has are read there; tensors that say that they lie elsewhere stand for them."""

    @pytest.fixture
    def copies(self, monkeypatch) -> list[int]:
        """Have all rows claim to be elsewhere, and count what comes to the host."""
        counts: list[int] = []

        def counted(copy):
            def counting(tensor):
                counts.append(tensor.numel())
                return copy(tensor)

            return counting

        monkeypatch.setattr(torch.Tensor, "cpu", counted(torch.Tensor.cpu))
        monkeypatch.setattr(tables, "begin_to_host", counted(tables.begin_to_host))
        for module in (pipeline, readers, filters):
            monkeypatch.setattr(module, "lies_on_host", lambda tensor: False)
        return counts

    def test_a_batch_of_drafts_takes_one_copy_and_is_what_it_was(self, copies, monkeypatch):
        logits, points = logits_of(5, seed=6).float(), [0.1, 0.3, 0.5, 0.7, 0.9]
        arguments = logits, [DistributionParams()] * 5, [8] * 5, points
        elsewhere = draft_tokens(*arguments)
        assert len(copies) == 1
        monkeypatch.undo()
        for draft, expected in zip(elsewhere, draft_tokens(*arguments), strict=True):
            assert (draft.token_id, draft.token_prob) == (expected.token_id, expected.token_prob)
            assert np.array_equal(draft.support_ids, expected.support_ids)
            assert np.array_equal(draft.weights, expected.weights)

    def test_the_targets_rows_take_one_copy_and_are_what_they_were(self, copies, monkeypatch):
        logits, plain = logits_of(3, seed=7).float(), [DistributionParams()] * 3
        supports = [np.array([1, 4]), np.array([], dtype=np.int64), np.array([0, 2, 49])]
        elsewhere, _ = read_logits(logits, plain, supports, [0.1, 0.5, 0.9])
        assert len(copies) == 1
        monkeypatch.undo()
        expected, _ = read_logits(logits, plain, supports, [0.1, 0.5, 0.9])
        assert elsewhere.outside_masses == pytest.approx(expected.outside_masses, abs=1e-6)
        assert elsewhere.outside_token_ids == expected.outside_token_ids
        for actual, row in zip(elsewhere.support_probs, expected.support_probs, strict=True):
            assert actual.dtype == np.float64
            assert np.array_equal(actual, row)

    @pytest.mark.parametrize(
        "params", [DistributionParams(0.7), DistributionParams(0.7, top_k=9)], ids=["plain", "filtered"]
    )
    def test_what_a_begun_reading_finds_is_what_compiled_code_finds(self, request, params):
        logits, supports, points = logits_of(2, seed=8).float(), [np.array([1, 4])] * 2, [0.2, 0.8]
        expected, _ = read_logits(logits, [params] * 2, supports, points)
        request.getfixturevalue("copies")
        rows, are_valid = pipeline.begin_reading([logits], [params] * 2, supports, points)()
        assert rows.outside_token_ids == expected.outside_token_ids
        assert rows.outside_masses == pytest.approx(expected.outside_masses, abs=1e-5)
        for actual, other in zip(rows.support_probs, expected.support_probs, strict=True):
            assert actual == pytest.approx(other, abs=1e-5)
        assert are_valid == [True, True]

    def test_a_reading_begins_where_rows_are_elsewhere_and_waits_where_the_host_has_them(self, copies, monkeypatch):
        """What happens to the rows between its begin and its result shows when they are read."""
        for is_elsewhere in (True, False):
            logits = logits_of(1, seed=9)
            result = pipeline.begin_reading([logits], [DistributionParams()], [np.array([1])], [0.5])
            logits[0, 1] = 40.0
            rows, _ = result()
            assert bool(rows.support_probs[0][0] < 0.9) is is_elsewhere
            monkeypatch.undo()


class TestOthers:
    """The likeliest tokens that were not drawn, which every way to draw tells alike."""

    LOGITS = logits_of(12, seed=8, std=3.0)
    NUMBER = 3

    def drafts(self, temperature: float, is_float32: bool, top_k: int = 0, limit: int = VOCAB_SIZE):
        logits = self.LOGITS.float() if is_float32 else self.LOGITS.double()
        points = uniforms(7, np.arange(len(logits)), Purpose.DRAFT).tolist()
        all_params = [DistributionParams(temperature, top_k)] * len(logits)
        return draft_tokens(logits, all_params, [limit] * len(logits), points, self.NUMBER)

    @pytest.mark.parametrize("is_float32", [True, False], ids=["compiled", "general"])
    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_of_a_drawn_token_are_the_likeliest_of_its_distribution(self, temperature, is_float32):
        all_probs = probability_rows(self.LOGITS, [DistributionParams(temperature)] * len(self.LOGITS))
        for probs, draft in zip(all_probs.tolist(), self.drafts(temperature, is_float32), strict=True):
            likeliest = sorted((it for it in range(VOCAB_SIZE) if it != draft.token_id), key=probs.__getitem__)
            assert [token_id for token_id, _ in draft.others] == likeliest[-self.NUMBER :][::-1]
            for token_id, prob in draft.others:
                assert prob == pytest.approx(probs[token_id], rel=1e-4)

    @pytest.mark.parametrize("is_float32", [True, False], ids=["compiled", "general"])
    def test_of_a_greedy_token_have_their_shares_among_themselves_and_it(self, is_float32):
        for row, draft in zip(self.LOGITS, self.drafts(0.0, is_float32), strict=True):
            ids = row.argsort(descending=True)[: self.NUMBER + 1]
            shares = row[ids].double().softmax(-1)
            assert [draft.token_id, *(token_id for token_id, _ in draft.others)] == ids.tolist()
            assert [share for _, share in draft.others] == pytest.approx(shares[1:].tolist(), rel=1e-4)

    def test_of_a_token_drawn_with_noise_are_those_that_would_arrive_next(self):
        probs = probability_rows(self.LOGITS.double(), [DistributionParams()] * len(self.LOGITS))
        for position, row in enumerate(probs):
            [draft] = draw_drafts(row[None], [VOCAB_SIZE], [Noise(3, position)], self.NUMBER)
            arrived = [draft.token_id, *(token_id for token_id, _ in draft.others)]
            for index, token_id in enumerate(arrived):
                left = row.where(row >= MIN_SUPPORT_PROB, 0.0)
                left[arrived[:index]] = 0.0
                assert race(left[None], addresses_of([Noise(3, position)])).item() == token_id

    @pytest.mark.parametrize("is_float32", [True, False], ids=["compiled", "general"])
    def test_there_are_no_more_than_are_possible(self, is_float32):
        assert all(len(draft.others) <= 1 for draft in self.drafts(1.0, is_float32, top_k=2))
        logits = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]).to(
            torch.float32 if is_float32 else torch.float64
        )
        for temperature in (0.0, 1.0):
            assert draft_tokens(logits, [DistributionParams(temperature)], [9], [0.5], self.NUMBER)[0].others == ()

    def test_none_are_told_where_none_are_asked_for(self):
        assert draft_tokens(self.LOGITS, [DistributionParams()] * 12, [9] * 12, [0.5] * 12)[0].others == ()


class TestMixedBatches:
    """Filtered rows among plain ones, greedy ones and large supports: each is read by what it needs, as if alone."""

    PARAMS = (
        DistributionParams(),
        DistributionParams(0.7, top_k=5),
        DistributionParams(0.0),
        DistributionParams(1.3, top_p=0.6),
        DistributionParams(0.4),
        DistributionParams(min_p=0.1),
    )
    NUMBERS = (0.1, 0.5, 0.9, Noise(3, 1), Noise(3, 2), 0.7)
    LIMITS = (9, 9, 9, 2000, 2000, 9)

    @pytest.fixture(params=[torch.float32, torch.float64], ids=str)
    def logits(self, request) -> torch.Tensor:
        logits = logits_of(6, 3).to(request.param)
        logits[1, 4] = torch.nan
        return logits

    def same(self, one, other) -> bool:
        parts = (one.token_id, one.token_prob, one.others), (other.token_id, other.token_prob, other.others)
        return parts[0] == parts[1] and all(
            np.array_equal(ours, theirs)
            for ours, theirs in ((one.support_ids, other.support_ids), (one.weights, other.weights))
        )

    def test_every_draft_is_to_the_last_bit_what_it_is_alone(self, logits):
        drafts = draft_tokens(logits, self.PARAMS, self.LIMITS, self.NUMBERS, 2)
        for index, draft in enumerate(drafts):
            its = slice(index, index + 1)
            [alone] = draft_tokens(logits[its], self.PARAMS[its], self.LIMITS[its], self.NUMBERS[its], 2)
            assert (draft is None) == (alone is None) == (index == 1)
            assert draft is None or self.same(draft, alone)

    def test_every_target_row_is_to_the_last_bit_what_it_is_alone(self, logits):
        supports = [np.arange(size) for size in (3, 0, 50, 1, 7, 2)]
        rows, finite = read_logits(logits, self.PARAMS, supports, self.NUMBERS)
        assert finite == [index != 1 for index in range(6)]
        for index in (0, 2, 3, 4, 5):
            its = slice(index, index + 1)
            alone, _ = read_logits(logits[its], self.PARAMS[its], supports[its], self.NUMBERS[its])
            assert np.array_equal(rows.support_probs[index], alone.support_probs[0])
            assert rows.outside_masses[index] == alone.outside_masses[0]
            assert rows.outside_token_ids[index] == alone.outside_token_ids[0]

    def test_plain_rows_do_not_go_through_filters(self, logits, monkeypatch):
        filtered: list = []

        def note(logits, rows, params, vocab_sizes):
            filtered.extend(params[row] for row in rows)

        monkeypatch.setattr(pipeline, "filter_rows", note)
        draft_tokens(logits, self.PARAMS, self.LIMITS, self.NUMBERS)
        assert sorted(map(str, filtered)) == sorted(str(it) for it in self.PARAMS if it.has_filters)

    def test_one_large_support_makes_the_others_no_wider(self, logits, monkeypatch):
        widths: list[tuple[int, int]] = []
        read = reference.READER.draft_table

        def note(rows, sizes, options, limits, min_prob, most, others):
            widths.append((len(rows), most))
            return read(rows, sizes, options, limits, min_prob, most, others)

        monkeypatch.setattr(readers, "table_reader_for", lambda logits: replace(reference.READER, draft_table=note))
        draft_tokens(logits.double(), [DistributionParams()] * 6, self.LIMITS, [0.5] * 6)
        assert widths == [(6, 1024)]
