"""Compiled code reads rows as numpy in float64 would, draws by the distribution it reports, and marks what is none.

Shapes: N rows, V vocabulary size, S tokens of a support.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from outrider.common.compiling import compiled, exponential, largest
from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling import cpu_kernels, pipeline
from outrider.sampling.cpu_kernels import draft_rows, report_support, target_rows
from outrider.sampling.distribution import COLDEST, DistributionParams
from outrider.sampling.draws import MIN_SUPPORT_PROB, noise_addresses
from outrider.sampling.filters import filtered
from outrider.sampling.race import race
from outrider.sampling.readers import cpu, reference
from outrider.sampling.rng import Noise, Purpose, uniforms
from tests.rows import draft_tokens, draw_drafts, probability_rows, read_logits, read_target_rows
from tests.toy_services import addresses_of

LAST = 1 - 2**-53  # the greatest uniform
VOCAB_SIZES = [1, 2, 63, 64, 65, 1000, 4099]  # the draw goes by blocks of 64
TEMPERATURES = [0.3, 0.7, 1.0, 1.3, 2.0]
# Of a probability, relatively, in units of 2^-24, half of float32's last place: the difference to the largest logit,
# the inverse temperature and their product are each off by 1 of a score, which matters where the score is above -64;
# the exponential is off by 4, and the sum by no more than its terms.
FLOAT32_ERROR = (3 * 64 + 2 * 4) * 2.0**-24


def logits_of(num_rows: int, vocab_size: int, seed: int = 0, std: float = 3.0) -> np.ndarray:
    """Return `[N, V] float32`."""
    return (
        np.random.default_rng([seed, num_rows, vocab_size]).normal(scale=std, size=(num_rows, vocab_size)).astype("f4")
    )


def distributions_of(rows: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Return the distributions `[N, V] float64` that rows stand for."""
    return np.stack([distribution_of(row.astype(float), it) for row, it in zip(rows, temperatures, strict=True)])


def distribution_of(row: np.ndarray, temperature: float) -> np.ndarray:
    if temperature == 0:
        return (np.arange(len(row)) == row.argmax()).astype(float)
    weights = np.exp((row - row.max()) / temperature)
    return weights / weights.sum()


def mixed_rows(vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows `[N, V] float32` and their temperatures: greedy ones too, and two of which one has one token only."""
    temperatures = np.array([*TEMPERATURES, 0.0, 1.0, 1.0])
    rows = logits_of(len(temperatures), vocab_size, seed)
    rows[-1] = np.where(np.arange(vocab_size) == vocab_size // 2, 0.0, -np.inf)
    return rows, temperatures


def draft(rows, temperatures, uniform=0.5, max_support=10**6, min_prob=MIN_SUPPORT_PROB) -> list[tuple]:
    """Return (ids, weights, place, is_finite) of each row; the same uniform for all, or one for each."""
    number = len(rows)
    points = np.broadcast_to(np.asarray(uniform, dtype=float), number).copy()
    limits = np.full(number, max_support)
    sizes = np.full(number, rows.shape[1])
    parts = draft_rows(
        rows, sizes, np.asarray(temperatures, dtype=float), min_prob, limits, points, noise_addresses([0.0] * number), 0
    )
    ids, weights, sizes, places, finite = parts[:5]
    assert len(ids) == len(weights) == sizes.sum()
    borders = sizes.cumsum()[:-1]
    return list(zip(np.split(ids, borders), np.split(weights, borders), places, finite, strict=True))


def read(rows, temperatures, supports, uniform=0.5) -> list[tuple]:
    """Return (reported, mass, token_id, is_finite) of each row."""
    sizes = np.array([len(support) for support in supports])
    ids = np.concatenate([np.asarray(support, dtype=np.int64) for support in supports])
    points = np.broadcast_to(np.asarray(uniform, dtype=float), len(rows)).copy()
    reported, *parts, _ = target_rows(
        rows, np.asarray(temperatures, dtype=float), ids, sizes, points, noise_addresses([0.0] * len(rows))
    )
    return list(zip(np.split(reported, sizes.cumsum()[:-1]), *parts, strict=True))


def random_supports(number: int, vocab_size: int) -> list[np.ndarray]:
    """Return ascending ids `[S]`: none, all and some of the vocabulary, in turn."""
    random = np.random.default_rng(vocab_size)
    some = [np.flatnonzero(random.random(vocab_size) < 0.3) for _ in range(number)]
    kinds = [np.empty(0, np.int64), np.arange(vocab_size)]
    return [kinds[row % 3] if row % 3 < 2 else some[row] for row in range(number)]


def spread(number: int) -> np.ndarray:
    """Return an even grid of the unit interval, `[number]`."""
    return (np.arange(number) + 0.5) / number


def shares(token_ids, vocab_size: int) -> np.ndarray:
    """Return the share of each id among those drawn, `[V]`."""
    return np.bincount(token_ids, minlength=vocab_size) / len(token_ids)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
class TestDraftRows:
    def test_supports_and_weights_are_those_of_the_distribution(self, vocab_size):
        """But for ids so near the threshold that float32 cannot tell on which side they are."""
        rows, temperatures = mixed_rows(vocab_size)
        all_probs = distributions_of(rows, temperatures)
        for probs, (ids, weights, _, is_finite) in zip(all_probs, draft(rows, temperatures), strict=True):
            threshold = min(MIN_SUPPORT_PROB, probs.max())
            is_inside = np.isin(np.arange(vocab_size), ids)
            assert is_finite
            assert np.array_equal(ids, np.unique(ids))
            assert probs[is_inside].min() >= threshold * (1 - FLOAT32_ERROR)
            assert probs[~is_inside].max(initial=0) <= threshold * (1 + FLOAT32_ERROR)
            assert (np.abs(weights - probs[ids] / WEIGHT_UNIT) <= 0.5 + probs[ids] / WEIGHT_UNIT * FLOAT32_ERROR).all()
            assert weights.min() >= 1

    @pytest.mark.parametrize("max_support", [1, 2, 7, 64])
    def test_a_limit_keeps_the_likeliest(self, vocab_size, max_support):
        rows, temperatures = mixed_rows(vocab_size, seed=1)
        all_probs = distributions_of(rows, temperatures)
        for probs, whole, cut in zip(
            all_probs, draft(rows, temperatures), draft(rows, temperatures, max_support=max_support), strict=True
        ):
            ids, weights = cut[:2]
            assert len(ids) == min(max_support, len(whole[0]))
            rest = np.setdiff1d(whole[0], ids)
            assert probs[ids].min() >= probs[rest].max(initial=0) * (1 - FLOAT32_ERROR)
            assert np.array_equal(weights, whole[1][np.isin(whole[0], ids)])

    def test_a_token_is_drawn_as_often_as_its_weight_says(self, vocab_size):
        num_points = 4096
        rows, temperatures = mixed_rows(vocab_size, seed=2)
        for row, temperature in zip(rows[::2], temperatures[::2], strict=True):
            drafts = draft(row[None].repeat(num_points, 0), [temperature] * num_points, spread(num_points), 40)
            weights = drafts[0][1]
            drawn = shares([place for _, _, place, _ in drafts], len(weights))
            assert np.abs(drawn - weights / weights.sum()).max() <= 1 / num_points + 1e-12

    def test_the_ends_of_the_unit_interval_draw_the_ends_of_the_support(self, vocab_size):
        rows, temperatures = mixed_rows(vocab_size, seed=3)
        assert all(place == 0 for _, _, place, _ in draft(rows, temperatures, 0.0))
        assert all(place == len(ids) - 1 for ids, _, place, _ in draft(rows, temperatures, LAST))

    def test_rows_are_what_they_are_alone(self, vocab_size):
        rows, temperatures = mixed_rows(vocab_size, seed=4)
        points = spread(len(rows))
        together = draft(rows, temperatures, points, 9)
        for row, expected in enumerate(together):
            one = slice(row, row + 1)
            [alone] = draft(rows[one], temperatures[one], points[one], 9)
            assert all(map(np.array_equal, alone, expected))


def test_the_first_of_equal_tokens_is_the_greedy_one():
    rows = np.array([[1, 3, 1, 3, 1], [-np.inf, 0, 0, 0, 0]], dtype=np.float32)
    assert [ids.tolist() for ids, *_ in draft(rows, [0.0, 0.0], LAST)] == [[1], [1]]
    assert [token_id for _, _, token_id, _ in read(rows, [0.0, 0.0], [[3], []], LAST)] == [1, 1]


def test_of_equal_tokens_a_limit_keeps_the_lowest_ids():
    row = np.array([[1, 3, 1, 3, 1, 3, 0, 1]], dtype=np.float32)
    kept = [draft(row, [1.0], max_support=most)[0][0].tolist() for most in range(1, 9)]
    assert kept == [
        [1], [1, 3], [1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]  # fmt: skip


def test_a_flat_row_keeps_the_likeliest_though_it_is_below_the_threshold():
    rows = np.zeros((1, 20_000), dtype=np.float32)
    rows[0, 77] = 0.5
    assert draft(rows, [1.0])[0][0].tolist() == [77]


@pytest.mark.parametrize("is_rounded", [False, True], ids=["all differ", "many are equal"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_compiled_filters_keep_what_the_reference_keeps(vocab_size, is_rounded):
    """To the letter, masked and equal logits among them; top_p needs more than the first that are ranked."""
    [row] = torch.from_numpy(logits_of(1, vocab_size, seed=9, std=1.5))
    row[vocab_size // 3] = -torch.inf if vocab_size > 2 else 0.0
    row = row.round() if is_rounded else row
    for settings in itertools.product((0.0, 0.5, 2.0), (0, 1, 7, 10**6), (1.0, 0.99, 0.3), (0.0, 0.05, 1.0)):
        params, actual = DistributionParams(*settings), row.clone()
        cpu_kernels.filter_row(actual.numpy(), *settings)
        expected = filtered(row[None], [params])[0] if params.has_filters else row
        assert torch.equal(actual, expected), params


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
class TestTargetRows:
    def test_the_distribution_is_reported_rounded_down_and_all_of_it_is_reported_or_left(self, vocab_size):
        rows, temperatures = mixed_rows(vocab_size)
        supports = random_supports(len(rows), vocab_size)
        for probs, support, (reported, mass, _, is_finite) in zip(
            distributions_of(rows, temperatures), supports, read(rows, temperatures, supports), strict=True
        ):
            error = probs[support] * FLOAT32_ERROR
            assert is_finite
            assert np.array_equal(reported % PROB_UNIT, np.zeros(len(support)))
            assert (reported <= probs[support] + error).all()
            assert (reported > probs[support] - PROB_UNIT - error).all()
            # A distribution in float32 sums to 1 but for its rounding; logits are divided by their own sum.
            assert reported.sum() + mass == pytest.approx(
                1, abs=1e-12 if probs.sum() == pytest.approx(1, abs=1e-13) else 1e-6
            )

    def test_the_rest_is_drawn_in_proportion_to_what_is_left(self, vocab_size):
        num_points = 4096
        rows, temperatures = mixed_rows(vocab_size, seed=2)
        supports = random_supports(len(rows), vocab_size)
        for row, temperature, support in list(zip(rows, temperatures, supports, strict=True))[::2]:
            probs = distributions_of(row[None], np.array([temperature]))[0]
            answers = read(
                row[None].repeat(num_points, 0), [temperature] * num_points, [support] * num_points, spread(num_points)
            )
            probs[support] -= answers[0][0]
            if not answers[0][1] > 10 * FLOAT32_ERROR:  # nothing is left but what float32 leaves
                continue
            drawn = shares([token_id for _, _, token_id, _ in answers], vocab_size)
            rest = np.maximum(probs, 0) / np.maximum(probs, 0).sum()
            # Each end of a token's interval is off by at most the distribution's error, of what is left.
            assert np.abs(drawn - rest).max() <= 1 / num_points + 2 * FLOAT32_ERROR / answers[0][1]

    @pytest.mark.parametrize("uniform", [0.0, LAST])
    def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_that_are_left(self, vocab_size, uniform):
        rows, temperatures = mixed_rows(vocab_size, seed=3)
        rows[:-2, : vocab_size // 3] = rows[:-2, vocab_size - vocab_size // 4 :] = -np.inf
        all_probs = distributions_of(rows, temperatures)
        for probs, (_, _, token_id, _) in zip(
            all_probs, read(rows, temperatures, [[]] * len(rows), uniform), strict=True
        ):
            assert probs[token_id] > 0
            # What lies behind or before it is too little for the sum of all to show.
            rest = probs[:token_id] if uniform == 0 else probs[token_id + 1 :]
            assert rest.sum() <= 1e-15

    def test_rows_are_what_they_are_alone(self, vocab_size):
        rows, temperatures = mixed_rows(vocab_size, seed=4)
        supports, points = random_supports(len(rows), vocab_size), spread(len(rows))
        for row, expected in enumerate(read(rows, temperatures, supports, points)):
            one = slice(row, row + 1)
            [alone] = read(rows[one], temperatures[one], supports[one], points[one])
            assert all(map(np.array_equal, alone, expected))


def read_distribution(probs: np.ndarray, support, points) -> list[tuple]:
    """Return (reported, mass, token_id) for each point, of a row whose probabilities are known to the last bit."""
    reported, left, sums = np.zeros(len(support)), probs.copy(), np.empty(-(-len(probs) // 64))
    report_support(left, np.asarray(support, dtype=np.int64), reported)
    mass = cpu_kernels._block_sums(left, sums)
    return [(reported, mass, cpu_kernels._draw(left, sums, point * mass)) for point in points]


def dyadic_distribution(vocab_size: int) -> np.ndarray:
    """Return a distribution `[V] float64` of multiples of 2^-40, all of whose sums are exact."""
    cuts = np.sort(np.random.default_rng(vocab_size).integers(0, 2**40, vocab_size - 1))
    return np.diff(cuts, prepend=0, append=2**40) * 2.0**-40


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_reported_and_left_are_the_distribution_to_the_letter(vocab_size):
    """Mass left beside a support is that of the whole less what is reported of each id, without any tolerance."""
    probs = dyadic_distribution(vocab_size)
    supports = [*random_supports(6, vocab_size), *([token_id] for token_id in range(0, vocab_size, 7))]
    for support in supports:
        [(reported, mass, _)] = read_distribution(probs, support, [0.5])
        assert np.array_equal(reported, np.floor(probs[support] / PROB_UNIT) * PROB_UNIT)
        assert mass == 1 - reported.sum()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_what_rounding_leaves_of_a_support_is_drawn_as_often_as_it_weighs(vocab_size):
    """All ids are in the support, so that nothing but the remainders is left."""
    num_points = 4096
    probs, support = dyadic_distribution(vocab_size), np.arange(vocab_size)
    probs = probs if vocab_size > 1 else probs - PROB_UNIT / 3  # else there is no remainder
    rest = probs % PROB_UNIT
    answers = read_distribution(probs, support, spread(num_points))
    drawn = shares([token_id for _, _, token_id in answers], vocab_size)
    assert answers[0][1] == rest.sum()
    assert np.abs(drawn - rest / rest.sum()).max() <= 1 / num_points + 1e-12


def test_a_support_that_takes_all_leaves_nothing_and_draws_nothing():
    [(reported, mass, token_id)] = read_distribution(np.array([0.5, 0.0, 0.25, 0.25]), [0, 2, 3], [LAST])
    assert reported.sum() == 1
    assert (mass, token_id) == (0, 0)


@pytest.mark.parametrize("vocab_size", [2, 65, 1000])
def test_masked_tokens_are_in_no_support_and_never_drawn(vocab_size):
    """Every other id is, at both ends of a block too; a draw of a masked one would be without weight."""
    rows = logits_of(1, vocab_size)
    rows[0, ::2] = -np.inf
    points = np.array([0.0, *spread(500), LAST])
    many = rows.repeat(len(points), 0)
    assert all((ids % 2 == 1).all() and len(ids) for ids, *_ in draft(many, np.ones(len(points)), points))
    for support in ([], [1], range(vocab_size)):
        answers = read(many, np.ones(len(points)), [support] * len(points), points)
        assert all(token_id % 2 == 1 or mass == 0 for _, mass, token_id, _ in answers)
        reported = answers[0][0]
        assert not reported[np.asarray(support, dtype=int) % 2 == 0].any()


INVALID = {
    "one NaN": lambda row: np.where(np.arange(len(row)) == len(row) // 2, np.nan, row),
    "NaN at the end": lambda row: np.where(np.arange(len(row)) == len(row) - 1, np.nan, row),
    "NaN beside infinity": lambda row: np.where(np.arange(len(row)) % 2, np.nan, -np.inf),
    "infinity": lambda row: np.where(np.arange(len(row)) == len(row) // 3, np.inf, row),
    "all masked": lambda row: np.full_like(row, -np.inf),
}


@pytest.mark.parametrize("spoil", INVALID.values(), ids=INVALID)
@pytest.mark.parametrize("vocab_size", [2, 64, 100, 1000])
def test_a_row_that_is_no_distribution_is_marked_and_disturbs_no_other(spoil, vocab_size):
    healthy = logits_of(3, vocab_size)
    rows = np.stack([healthy[0], spoil(healthy[1]), healthy[1], spoil(healthy[2]), healthy[2]]).astype(np.float32)
    temperatures, is_valid = np.array([1.0, 0.7, 0.7, 0.0, 0.0]), np.array([True, False, True, False, True])
    supports = random_supports(5, vocab_size)
    drafts, answers = draft(rows, temperatures), read(rows, temperatures, supports)
    assert [it[-1] for it in drafts] == [it[-1] for it in answers] == is_valid.tolist()
    assert all(len(ids) == 0 for ids, _, _, is_finite in drafts if not is_finite)
    expected = draft(healthy, temperatures[is_valid])
    for alone, beside in zip(expected, [it for it in drafts if it[-1]], strict=True):
        assert all(map(np.array_equal, alone, beside))
    of_valid = [support for support, keep in zip(supports, is_valid, strict=True) if keep]
    for alone, beside in zip(
        read(healthy, temperatures[is_valid], of_valid), [it for it in answers if it[-1]], strict=True
    ):
        assert all(map(np.array_equal, alone, beside))


class TestBothPaths:
    """Float32 logits are read by compiled code; made to go the general way, they give the same but for rounding."""

    NUM_ROWS = 60
    PARAMS = tuple(DistributionParams([*TEMPERATURES, 0.0][row % 6]) for row in range(NUM_ROWS))
    LOGITS = torch.from_numpy(logits_of(NUM_ROWS, 700, seed=5))
    # torch's own softmax rounds each of its steps in float32 too.
    ERROR = 2 * FLOAT32_ERROR

    def test_drafts_agree(self):
        points = uniforms(3, np.arange(self.NUM_ROWS), Purpose.DRAFT).tolist()
        limits = [300] * self.NUM_ROWS
        probs = probability_rows(self.LOGITS, self.PARAMS)
        others = draw_drafts(probs, limits, points)
        num_alike = 0
        for row, actual, other in zip(
            probs, draft_tokens(self.LOGITS, self.PARAMS, limits, points), others, strict=True
        ):
            odd_ids = np.setxor1d(actual.support_ids, other.support_ids)
            assert np.abs(row.numpy()[odd_ids] / MIN_SUPPORT_PROB - 1).max(initial=0) < self.ERROR
            if len(odd_ids) == 0 and np.array_equal(actual.weights, other.weights):
                num_alike += 1
                assert (actual.token_id, actual.token_prob) == (other.token_id, other.token_prob)
        assert num_alike > 0.9 * self.NUM_ROWS  # the seed is fixed; a weight rounds otherwise now and then

    def test_rows_agree(self):
        points = uniforms(3, np.arange(self.NUM_ROWS), Purpose.OUTSIDE).tolist()
        supports = random_supports(self.NUM_ROWS, 700)
        rows, are_valid = read_logits(self.LOGITS, self.PARAMS, supports, points)
        others = read_target_rows(probability_rows(self.LOGITS, self.PARAMS), supports, points)
        assert all(are_valid)
        for actual, other in zip(rows.support_probs, others.support_probs, strict=True):
            assert (np.abs(actual - other) <= PROB_UNIT + other * self.ERROR).all()
        # A unit that is reported or not moves mass, and with it the draw.
        same = [
            row
            for row, pair in enumerate(zip(rows.support_probs, others.support_probs, strict=True))
            if np.array_equal(*pair)
        ]
        assert len(same) > self.NUM_ROWS / 2
        for row in same:
            assert rows.outside_masses[row] == pytest.approx(others.outside_masses[row], abs=self.ERROR)
        alike = [rows.outside_token_ids[row] == others.outside_token_ids[row] for row in same]
        assert np.mean(alike) > 0.9

    def test_a_broken_row_is_told_on_both(self, monkeypatch):
        logits = self.LOGITS[:4].clone()
        logits[1, 5], logits[2, 6] = torch.nan, torch.inf
        arguments = (self.PARAMS[:4], [9] * 4, [0.5] * 4)
        supports = [np.arange(3)] * 4
        for reader in (cpu.READER, reference.READER):
            monkeypatch.setattr(pipeline, "reader_for", lambda logits, reader=reader: reader)
            assert [it is None for it in draft_tokens(logits, *arguments)] == [False, True, True, False]
            assert read_logits(logits, self.PARAMS[:4], supports, [0.5] * 4)[1] == [True, False, False, True]

    @pytest.mark.parametrize("temperature", [0.0, COLDEST])
    @pytest.mark.parametrize("top_k", [0, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_coldest_temperatures_take_the_likeliest(self, temperature, top_k, dtype):
        """The next one is colder by 1 or more here; a session beside it is not disturbed."""
        logits = self.LOGITS[:2].to(dtype).round()
        logits[0, 77] = 20.0
        all_params = [DistributionParams(temperature, top_k), DistributionParams(1.0, top_k)]
        cold, other = draft_tokens(logits, all_params, [9, 9], [0.5, 0.5])
        assert cold.support_ids.tolist() == [cold.token_id] == [77]
        assert len(other.support_ids) == (top_k or 9)
        rows, are_valid = read_logits(logits, all_params, [np.array([cold.token_id])] * 2, [0.5, 0.5])
        assert are_valid == [True, True]
        assert (rows.support_probs[0].tolist(), rows.outside_masses[0]) == ([1.0], 0.0)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 64, 701, 4099])
class TestNoise:
    """What arrives first is what outrider.sampling.race says, on which every device relies."""

    NUM_ROWS = 40

    def rows_and_noises(self, vocab_size: int) -> tuple[torch.Tensor, list[Noise]]:
        logits = torch.from_numpy(logits_of(self.NUM_ROWS, vocab_size, seed=6))
        return logits, [Noise((1 << 64) - 1 - row, row * row) for row in range(self.NUM_ROWS)]

    def test_the_targets_choice(self, vocab_size):
        logits, noises = self.rows_and_noises(vocab_size)
        nothing = [np.empty(0, np.int64)] * self.NUM_ROWS
        rows, _ = read_logits(logits, [DistributionParams()] * self.NUM_ROWS, nothing, noises)
        assert rows.outside_token_ids == race(logits.double().softmax(-1), addresses_of(noises)).tolist()
        assert rows.outside_masses == pytest.approx([1.0] * self.NUM_ROWS)

    def test_among_tokens_most_of_which_are_impossible(self, vocab_size):
        logits, noises = self.rows_and_noises(vocab_size)
        probs = logits.double().softmax(-1)
        probs = probs.where(probs >= probs.topk(min(3, vocab_size), -1).values[:, -1:], 0.0)
        rows = read_target_rows(probs, [np.empty(0, np.int64)] * self.NUM_ROWS, noises)
        assert rows.outside_token_ids == race(probs, addresses_of(noises)).tolist()

    def test_the_drafts_choice_is_among_its_support(self, vocab_size):
        logits, noises = self.rows_and_noises(vocab_size)
        drafts = draft_tokens(logits, [DistributionParams()] * self.NUM_ROWS, [5] * self.NUM_ROWS, noises, 2)
        for probs, noise, draft in zip(logits.double().softmax(-1), noises, drafts, strict=True):
            kept = probs.where(probs >= probs.topk(min(5, vocab_size)).values[-1], 0.0)
            kept = kept.where(probs >= MIN_SUPPORT_PROB, 0.0)
            assert draft.token_id == race(kept[None], addresses_of([noise])).item()
            assert len(draft.support_ids) == len(draft.weights) == 0
            assert len(draft.others) == min(2, int((kept > 0).sum()) - 1)

    def test_rows_of_both_kinds_do_not_disturb_each_other(self, vocab_size):
        logits, noises = self.rows_and_noises(vocab_size)
        all_params, limits = [DistributionParams()] * self.NUM_ROWS, [9] * self.NUM_ROWS
        points = spread(self.NUM_ROWS).tolist()
        mixed = [noises[row] if row % 2 else points[row] for row in range(self.NUM_ROWS)]
        together = draft_tokens(logits, all_params, limits, mixed)
        for row, kind in enumerate([draft_tokens(logits, all_params, limits, it) for it in (points, noises)] * 20):
            assert together[row].token_id == kind[row].token_id
            assert np.array_equal(together[row].weights, kind[row].weights)


def unfair_draft_rows(rows, vocab_sizes, temperatures, min_prob, max_supports, points, noises, num_others):
    """Broken: squares the uniforms, so that low ids are drawn too often."""
    return cpu_kernels.draft_rows(
        rows, vocab_sizes, temperatures, min_prob, max_supports, points**2, noises, num_others
    )


def unfair_target_rows(rows, temperatures, ids, sizes, points, noises):
    """Broken in the same way."""
    return cpu_kernels.target_rows(rows, temperatures, ids, sizes, points**2, noises)


@pytest.mark.parametrize(
    ("name", "broken", "test"),
    [
        ("draft_rows", unfair_draft_rows, TestDraftRows.test_a_token_is_drawn_as_often_as_its_weight_says),
        ("target_rows", unfair_target_rows, TestTargetRows.test_the_rest_is_drawn_in_proportion_to_what_is_left),
    ],
)
def test_a_draw_of_another_distribution_is_found(monkeypatch, name, broken, test):
    monkeypatch.setitem(globals(), name, broken)
    with pytest.raises(AssertionError):
        test(None, 65)


@compiled(on_disk=False)
def exponentials(numbers):
    results = np.empty_like(numbers)
    for index in range(len(numbers)):
        results[index] = exponential(numbers[index])
    return results


@compiled(on_disk=False)
def largest_of(numbers):
    return largest(numbers)


class TestExponential:
    def test_it_is_right_to_2_units_in_the_last_place(self):
        """At a million evenly spaced numbers, and all float32 about the borders of its range reduction."""
        half = np.float32(np.log(2) / 2)
        borders = [
            np.nextafter(np.float32(k * 2 + 1) * half, np.float32(sign * 200))
            for k in range(-125, 126)
            for sign in (-1, 1)
        ]
        numbers = np.array([*np.linspace(-87, 88, 1_000_001), *borders, 0.0, -0.0, 1e-45, -1e-30], dtype=np.float32)
        numbers = numbers[(numbers >= -87) & (numbers <= 88)]
        exact = np.exp(numbers.astype(float))
        unit = np.spacing(exact.astype(np.float32)).astype(float)
        assert (np.abs(exponentials(numbers) - exact) / unit).max() <= 2

    def test_it_is_0_below_its_range_and_1_at_0(self):
        below = np.array([np.nextafter(np.float32(-87), np.float32(-88)), -100, -1e30, -np.inf], dtype=np.float32)
        assert exponentials(below).tolist() == [0.0] * 4
        assert exponentials(np.zeros(9, dtype=np.float32)).tolist() == [1.0] * 9

    def test_nan_stays_nan(self):
        assert np.isnan(exponentials(np.full(9, np.nan, dtype=np.float32))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 64, 100])
class TestLargest:
    def test_it_is_the_largest_wherever_it_lies(self, dtype, size):
        for place in range(size):
            numbers = -1 - np.random.default_rng(size).random(size).astype(dtype)
            for value in (dtype(-0.5), dtype(np.inf)):
                numbers[place] = value
                assert largest_of(numbers) == value
        assert largest_of(np.full(size, -np.inf, dtype=dtype)) == -np.inf

    def test_it_is_nan_where_one_is(self, dtype, size):
        for place in range(size):
            numbers = np.random.default_rng(size).normal(size=size).astype(dtype)
            numbers[place] = np.nan
            assert np.isnan(largest_of(numbers))
