"""Draws with shared noise follow their distribution, and two distributions agree as often as the theory says.

Statistics use fixed seeds, so that they pass always or never; one in a million right draws fails.

Shapes: N positions, V vocabulary size.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.protocol.scales import PROB_UNIT, WEIGHT_UNIT
from outrider.sampling import race as race_module
from outrider.sampling.race import race_at_once
from outrider.sampling.readers.reference import inverse_cdf
from outrider.sampling.rng import Noise, Purpose, SharedNoise, key_of, noise_bits, philox4x32
from tests.rows import draw_drafts, read_target_rows
from tests.toy_services import addresses_of, rates_among

SEED = (0x299F31D0 << 32) | 0xA4093822
VOCAB_SIZE = 7
NUM_DRAWS = 20_000
CHI_SQUARE_LIMIT = 38.26  # scipy.stats.chi2.isf(1e-6, df=7 - 1)
NORMAL_LIMIT = 4.89  # scipy.stats.norm.isf(1e-6 / 2)
TARGET_PROBS = np.array([0.3, 0.02, 0.25, 0.0, 0.13, 0.1, 0.2])
DRAFT_PROBS = np.array([0.1, 0.15, 0.25, 0.05, 0.2, 0.0, 0.25])


def noises(number: int, seed: int = SEED) -> list[Noise]:
    return [SharedNoise(seed).at(position) for position in range(number)]


def race(weights: torch.Tensor, addresses: list[Noise]) -> list[int]:
    return race_module.race(weights, addresses_of(addresses)).tolist()


def winners(probs: np.ndarray, number: int = NUM_DRAWS, seed: int = SEED) -> np.ndarray:
    """Return the winner at each position `[N]`."""
    return race_at_once(torch.from_numpy(probs).expand(number, -1), addresses_of(noises(number, seed))).numpy()


def gumbel(position: int, token_id: int, seed: int = SEED) -> float:
    """Return g(x) by the formula of common.proto, without arrays."""
    words = philox4x32(np.array([[position, token_id // 2, 4, 0]]), (seed & 0xFFFFFFFF, seed >> 32))[0]
    high, low = words[2:] if token_id % 2 else words[:2]
    uniform = ((int(high) >> 6) * 2**26 + (int(low) >> 6) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def test_the_winner_is_that_of_the_formula():
    assert int(Purpose.NOISE) == 4
    for position in range(200):
        scores = [math.log(p) + gumbel(position, x) if p else -math.inf for x, p in enumerate(TARGET_PROBS)]
        assert race(torch.from_numpy(TARGET_PROBS)[None], [Noise(SEED, position)]) == [int(np.argmax(scores))]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_to_compute_choose_the_same(vocab_size, dtype):
    """The one for accelerators runs on any device, as here, and rows on the host are read by compiled code."""
    weights = torch.from_numpy(np.random.default_rng(0).exponential(size=(40, vocab_size))).to(dtype)
    addresses = [Noise(seed, position) for seed in (0, 7, SEED, 2**64 - 1) for position in (*range(9), 2**32 - 1)]
    chosen = race(weights, addresses)
    assert read_target_rows(weights, [np.empty(0, np.int64)] * 40, addresses).outside_token_ids == chosen
    for row, address, token_id in zip(weights.double().numpy(), addresses, chosen, strict=True):
        assert rates_among(np.arange(vocab_size), row, address).argmax() == token_id


@pytest.mark.parametrize("max_elements", [1, 21, 1 << 22])
def test_an_accelerator_races_in_parts_of_limited_size(monkeypatch, max_elements):
    weights, sizes = torch.from_numpy(TARGET_PROBS).expand(10, -1).clone(), []

    def race_part(part, addresses):
        sizes.append(len(addresses))
        return race_at_once(part, addresses)

    expected = race(weights, noises(10))
    monkeypatch.setattr(race_module, "MAX_ELEMENTS", max_elements)
    monkeypatch.setattr(race_module, "race_at_once", race_part)
    assert race(weights, noises(10)) == expected
    assert sizes == {1: [1] * 10, 21: [3, 3, 3, 1], 1 << 22: [10]}[max_elements]


def test_some_tokens_race_with_the_noise_that_they_have_among_all():
    """In any order; the winner among all, if it is one of them, wins here too."""
    ids = np.array([6, 0, 5, 2])
    for address in noises(300):
        [winner] = race(torch.from_numpy(TARGET_PROBS)[None], [address])
        chosen = ids[rates_among(ids, TARGET_PROBS[ids], address).argmax()]
        assert chosen == winner or winner not in ids


def test_tokens_that_filters_rule_out_take_no_part():
    """The winner among the few that are left is that of the whole row."""
    weights = torch.from_numpy(TARGET_PROBS * [0, 0, 1, 0, 0, 1, 0])[None].expand(300, -1)
    rows = read_target_rows(weights, [np.empty(0, np.int64)] * 300, noises(300))
    assert rows.outside_token_ids == race(weights, noises(300))


def test_noise_has_one_number_for_each_token_and_position():
    """No two of 4,000 right numbers of 52 bits are equal, but with chance 2e-9."""
    pairs = np.arange(100, dtype=np.uint64)
    positions = np.arange(10, dtype=np.uint64)[:, None]
    values = [word for seed in (1, 2) for word in noise_bits(key_of(seed), positions, pairs)]
    assert all(value.shape == (10, 100) for value in values)
    assert len(np.unique(values)) == 4000
    assert max(value.max() for value in values) < 1 << 52


def test_draws_follow_the_distribution():
    counts = np.bincount(winners(TARGET_PROBS), minlength=VOCAB_SIZE)
    assert counts[3] == 0
    expected = NUM_DRAWS * TARGET_PROBS
    possible = expected > 0
    assert (((counts - expected) ** 2)[possible] / expected[possible]).sum() < CHI_SQUARE_LIMIT


def test_draws_of_consecutive_seeds_at_one_position_follow_the_distribution():
    counts = np.zeros(VOCAB_SIZE)
    for seed in range(4000):
        [winner] = race(torch.from_numpy(TARGET_PROBS)[None], [Noise(seed, 17)])
        counts[winner] += 1
    expected = 4000 * TARGET_PROBS
    possible = expected > 0
    assert (((counts - expected) ** 2)[possible] / expected[possible]).sum() < CHI_SQUARE_LIMIT


def test_draws_at_consecutive_positions_are_independent():
    """Chi-square of pairs; with one noise for all positions both tokens would be the same."""
    drawn = winners(TARGET_PROBS)
    counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(counts, (drawn[::2], drawn[1::2]), 1)
    expected = len(drawn) / 2 * np.outer(TARGET_PROBS, TARGET_PROBS)
    possible = expected > 0
    statistic = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    assert statistic < 95.60  # scipy.stats.chi2.isf(1e-6, df=36 - 1)


def agreement(target_probs: np.ndarray, draft_probs: np.ndarray) -> float:
    """Return the probability that both choose one token: for each x, that no other arrives before it in either race.

    All E / p(y) of the rivals, scaled by max(p(y) / p(x), q(y) / q(x)), must be later than E(x): 1 / (sum of these).
    """
    both = np.flatnonzero((target_probs > 0) & (draft_probs > 0))
    return sum(1 / np.maximum(target_probs / target_probs[x], draft_probs / draft_probs[x]).sum() for x in both)


def test_two_distributions_agree_as_often_as_the_theory_says():
    expected = agreement(TARGET_PROBS, DRAFT_PROBS)
    seen = (winners(TARGET_PROBS) == winners(DRAFT_PROBS)).mean()
    deviation = math.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert abs(seen - expected) < NORMAL_LIMIT * deviation
    variation = np.abs(TARGET_PROBS - DRAFT_PROBS).sum() / 2
    assert (1 - variation) / (1 + variation) <= expected <= 1 - variation


def test_noise_of_another_seed_agrees_by_chance_only():
    expected = float(TARGET_PROBS @ DRAFT_PROBS)
    seen = (winners(TARGET_PROBS) == winners(DRAFT_PROBS, seed=SEED + 1)).mean()
    assert abs(seen - expected) < NORMAL_LIMIT * math.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert seen < agreement(TARGET_PROBS, DRAFT_PROBS) / 2


def test_a_draft_chooses_among_its_support_and_sends_the_token_alone():
    probs = torch.from_numpy(DRAFT_PROBS)[None]
    for address in noises(50):
        [draft] = draw_drafts(probs, [VOCAB_SIZE], [address])
        assert [draft.token_id] == race(probs, [address])
        assert len(draft.support_ids) == len(draft.weights) == 0
        assert draft.token_prob == pytest.approx(DRAFT_PROBS[draft.token_id], abs=WEIGHT_UNIT)
    [draft] = draw_drafts(probs, [2], noises(1))
    assert draft.token_id in (2, 6)
    assert draft.token_prob == 0.5


def test_rows_of_both_kinds_share_a_batch():
    probs = torch.from_numpy(np.stack([TARGET_PROBS, DRAFT_PROBS, TARGET_PROBS]))
    supports = [np.array(ids, dtype=np.int64) for ids in ([0, 2], [], [])]
    numbers = [0.7, Noise(SEED, 5), 0.2]
    rows = read_target_rows(probs, supports, numbers)
    outside = torch.from_numpy(TARGET_PROBS * [0, 1, 0, 1, 1, 1, 1])
    assert rows.outside_token_ids == [
        inverse_cdf(outside[None], torch.tensor([0.7])).item(),
        *race(probs[1:2], [Noise(SEED, 5)]),
        inverse_cdf(probs[2:], torch.tensor([0.2])).item(),
    ]
    assert rows.outside_masses == pytest.approx([0.45, 1.0, 1.0], abs=2 * PROB_UNIT)
