"""What the ranges of temperature and filters let in follows its distribution: at the ends of each, alone and combined.

The reference is DistributionParams's definitions, token by token in Python's float64. Rows of logits are such as
float32 computes badly: neighbours among the numbers of 1e4, ties at every cut, masks, and numbers that differ by next
to nothing.

Shapes: N rows, V vocabulary size.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling import filters, pipeline
from outrider.sampling.distribution import COLDEST, HOTTEST, MOST_TOP_K, DistributionParams
from outrider.sampling.draws import MIN_SUPPORT_PROB
from outrider.sampling.readers import reference, tables
from outrider.sampling.rng import Noise
from tests.rows import draft_tokens, probability_rows, read_logits

VOCAB_SIZE = 12
RANDOM = np.random.default_rng(5)
USUAL = RANDOM.normal(scale=3, size=VOCAB_SIZE)
STEP = 2.0**-10  # between neighbours among the float32 numbers near 1e4
ROWS = {
    "ends": [1e4, -1e4] * 6,
    "neighbours": 1e4 - STEP * RANDOM.permutation(VOCAB_SIZE),
    "low_neighbours": -1e4 + STEP * RANDOM.permutation(VOCAB_SIZE),
    "spread": RANDOM.permutation(np.linspace(-1e4, 1e4, VOCAB_SIZE)),
    "flat": [0.0] * VOCAB_SIZE,
    "almost_flat": 1e-30 * RANDOM.permutation(VOCAB_SIZE),
    "usual": USUAL,
    "ties": [1, 3, 2, 3, 2, 3, 1, 2, 0, 0, -1, 2],
    "masked": np.where(np.arange(VOCAB_SIZE) % 3 == 1, USUAL, -np.inf),
    "one_left": [-np.inf] * 7 + [-1e4] + [-np.inf] * 4,
}
LOGITS = torch.tensor(np.array(list(ROWS.values())), dtype=torch.float32)  # [N, V]
TEMPERATURES = (0.0, COLDEST, 0.05, 1.0, HOTTEST)
PARAMS = [
    DistributionParams(*settings)
    for settings in itertools.product(
        TEMPERATURES,
        (0, 1, 3, MOST_TOP_K),
        (5e-324, 1e-50, 0.5, 1 - 2**-53, 1.0),
        (0.0, 5e-324, 0.3, 1 - 2**-53, 1.0),
    )
]
PLAIN = [DistributionParams(temperature) for temperature in TEMPERATURES]
# Of a probability: a score s is off by 3 |s| 2^-24 in float32, and e^s matters down to e^-16.
FLOAT32_ERROR = 3 * 16 * 2.0**-24 + 10 * math.exp(-16) * 2**-20 + 2.0**-22
READERS = ["host", "torch", "kernels"]


@cache
def distribution(row: int, params: DistributionParams) -> tuple[float, ...]:
    """Return the distribution of a row of LOGITS, as DistributionParams defines it."""
    logits = LOGITS[row].tolist()
    ranking = sorted(range(VOCAB_SIZE), key=lambda token_id: (-logits[token_id], token_id))
    if params.temperature == 0:
        return tuple(float(token_id == ranking[0]) for token_id in range(VOCAB_SIZE))
    scores = [(logit - logits[ranking[0]]) / params.temperature for logit in logits]
    by_top_k = ranking[: params.top_k or VOCAB_SIZE]
    enough = params.top_p * math.fsum(math.exp(scores[it]) for it in by_top_k)
    kept = []
    for place, token_id in enumerate(by_top_k):
        before = math.fsum(math.exp(scores[it]) for it in by_top_k[:place])
        is_by_top_p = place == 0 or params.top_p == 1 or before < enough
        is_by_min_p = params.min_p == 0 or scores[token_id] >= math.log(params.min_p)
        if is_by_top_p and is_by_min_p:
            kept.append(token_id)
    total = math.fsum(math.exp(scores[it]) for it in kept)
    return tuple(math.exp(scores[it]) / total if it in kept else 0.0 for it in range(VOCAB_SIZE))


def rows_of(cases: list[tuple[int, DistributionParams]]) -> tuple[torch.Tensor, list[DistributionParams], np.ndarray]:
    """Return logits `[N, V]`, all_params and distributions `[N, V]` of some rows under some all_params."""
    all_probs = np.array([distribution(row, params) for row, params in cases])
    return LOGITS[[row for row, _ in cases]], [params for _, params in cases], all_probs


@pytest.fixture(params=READERS)
def reader(request, monkeypatch) -> str:
    """Have rows read by one of the three: compiled code, torch's operations, or Triton's in its interpreter."""
    if request.param != "host":
        module = reference if request.param == "torch" else pytest.importorskip("outrider.sampling.readers.gpu")
        monkeypatch.setattr(filters, "_is_for_compiled_code", lambda logits: False)
        monkeypatch.setattr(pipeline, "reader_for", lambda logits: module.READER)
        monkeypatch.setattr(tables, "MOST_SUPPORT", VOCAB_SIZE)
    return request.param


ALL = list(itertools.product(range(len(LOGITS)), PARAMS))


def cases_for(reader: str) -> list[tuple[int, DistributionParams]]:
    """Return all; for the interpreter, which is slow, some without filters and a few with."""
    return ALL if reader != "kernels" else [*itertools.product((0, 1, 6, 8), PLAIN[:2] + PLAIN[3:]), *ALL[101::997]]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2.0**-22), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_rows_are_what_the_definitions_say(dtype, tolerance):
    logits, all_params, all_probs = rows_of(ALL)
    difference = np.abs(probability_rows(logits.to(dtype), all_params).numpy() - all_probs).max(-1)
    assert difference.max() < tolerance, all_params[difference.argmax()]


def test_the_targets_probabilities_and_what_they_leave_are_those_of_the_distribution(reader):
    logits, all_params, all_probs = rows_of(cases_for(reader))
    supports = [np.arange(VOCAB_SIZE)] * len(all_probs)
    rows, are_valid = read_logits(logits, all_params, supports, [0.5] * len(all_probs))
    assert all(are_valid)
    reported = np.array(rows.support_probs)
    assert (reported <= all_probs + FLOAT32_ERROR).all()
    assert (reported >= all_probs - PROB_UNIT - FLOAT32_ERROR).all()
    assert np.abs(reported.sum(-1) + rows.outside_masses - 1).max() < FLOAT32_ERROR


def test_a_uniform_draws_the_token_in_whose_share_it_falls(reader):
    """In the middle of each share of at least a thousandth; of a tenth, where reading is slow."""
    logits, all_params, all_probs = rows_of(cases_for(reader))
    cases = np.argwhere(all_probs > (0.1 if reader == "kernels" else 1e-3))
    middles = (all_probs.cumsum(-1) - all_probs / 2)[cases[:, 0], cases[:, 1]]
    its_params = [all_params[row] for row in cases[:, 0]]
    nothing = [np.empty(0, np.int64)] * len(cases)
    rows, _ = read_logits(logits[cases[:, 0].tolist()], its_params, nothing, middles.tolist())
    assert rows.outside_token_ids == cases[:, 1].tolist()
    assert rows.outside_token_probs == pytest.approx(all_probs[cases[:, 0], cases[:, 1]], rel=FLOAT32_ERROR)


def test_a_tokens_probability_is_the_whole_one_whatever_of_it_is_told(reader):
    """All ids are in the support, so that what is drawn is what rounding has cut off."""
    logits, all_params, all_probs = rows_of(cases_for(reader)[:: 1 if reader == "kernels" else 7])
    rows, _ = read_logits(logits, all_params, [np.arange(VOCAB_SIZE)] * len(all_probs), [0.3] * len(all_probs))
    expected = all_probs[np.arange(len(all_probs)), rows.outside_token_ids]
    is_there = np.array(rows.outside_masses) > 1e-9
    assert is_there.sum() >= 5
    assert np.array(rows.outside_token_probs)[is_there] == pytest.approx(expected[is_there], rel=1e-3, abs=1e-12)
    assert np.array(rows.part(2, 4).outside_token_probs).tolist() == rows.outside_token_probs[2:4]


def test_a_token_without_probability_is_never_drawn(reader):
    """At both ends of the unit interval, and under shared noise."""
    logits, all_params, all_probs = rows_of(cases_for(reader))
    nothing = [np.empty(0, np.int64)] * len(all_probs)
    for number in (0.0, 1 - 2**-53, Noise(2**63, 9)):
        rows, _ = read_logits(logits, all_params, nothing, [number] * len(all_probs))
        assert all_probs[np.arange(len(all_probs)), rows.outside_token_ids].min() > 0


def test_the_drafts_weights_are_those_of_the_distribution(reader):
    logits, all_params, all_probs = rows_of(cases_for(reader))
    limits = [VOCAB_SIZE] * len(all_probs)
    for its_probs, draft in zip(
        all_probs, draft_tokens(logits, all_params, limits, [0.5] * len(all_probs)), strict=True
    ):
        assert draft is not None
        is_inside = np.isin(np.arange(VOCAB_SIZE), draft.support_ids)
        assert its_probs[is_inside].min() >= MIN_SUPPORT_PROB * (1 - 1e-3)
        assert its_probs[~is_inside].max(initial=0) <= MIN_SUPPORT_PROB * (1 + 1e-3)
        weights = its_probs[draft.support_ids] / WEIGHT_UNIT
        assert np.abs(draft.weights - np.maximum(weights, 1)).max() <= 0.5 + FLOAT32_ERROR / WEIGHT_UNIT


class TestLargeVocabularies:
    @pytest.mark.parametrize("vocab_size", [50_000, 200_000])
    def test_equal_tokens_are_cut_where_the_mass_is_reached_to_the_letter(self, vocab_size):
        logits = torch.zeros(1, vocab_size)
        for top_p in (0.25, 0.5, 0.75):
            probs = probability_rows(logits, [DistributionParams(top_p=top_p)])[0]
            assert probs.nonzero()[:, 0].tolist() == list(range(int(top_p * vocab_size)))

    def test_what_is_kept_has_the_mass_and_no_token_too_many(self):
        logits = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
        whole = logits.double().softmax(-1)[0]
        for top_p in (0.5, 0.9, 0.999):
            kept = whole[probability_rows(logits, [DistributionParams(top_p=top_p)])[0] > 0]
            assert kept.sum() >= top_p - 1e-12
            assert kept.sum() - kept.min() < top_p + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [(COLDEST,), (HOTTEST,), (0.7, 5, 0.9, 0.1)], ids=str)
def test_half_precision_loses_nothing_more_once_it_has_become_a_logit(dtype, settings):
    """A difference of two of them is no number of that type."""
    logits, params = (LOGITS / 10).to(dtype), DistributionParams(*settings)
    supports = [np.arange(VOCAB_SIZE)] * len(logits)
    half, whole = (
        read_logits(it, [params] * len(it), supports, [0.5] * len(it))[0] for it in (logits, logits.double())
    )
    assert np.abs(np.array(half.support_probs) - whole.support_probs).max() <= PROB_UNIT + FLOAT32_ERROR


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", it) for it in (-1.0, 5e-324, 1e-30, 0.000999, 1000.1, 1e300, math.inf, -math.inf, math.nan)),
        *(("top_k", it) for it in (-1, MOST_TOP_K + 1)),
        *(("top_p", it) for it in (0.0, -0.0, -0.1, 1.0000001, math.inf, math.nan)),
        *(("min_p", it) for it in (-5e-324, -0.1, 1.0000001, math.inf, math.nan)),
    ],
)
def test_what_lies_beyond_an_end_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidArgumentError, match=f"^{field} is .*: give "):
        DistributionParams(**{field: value})
