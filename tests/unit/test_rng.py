"""Addressed uniforms are Philox4x32-10, depend on nothing but their address, and are uniform.

The chi-square tests use fixed seeds, so that they pass always or never; one in a million right generators fails.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.sampling.rng import AddressedUniforms, Purpose, philox4x32, uniforms

SEEDS = st.integers(0, 2**64 - 1)
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # kat_vectors of Random123 1.14, philox4x32 with 10 rounds: counter, key, words
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES, ONES, ONES, ONES], (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
NUM_BINS = 64
CHI_SQUARE_LIMIT = 131.37  # scipy.stats.chi2.isf(1e-6, df=64 - 1)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, words):
    assert philox4x32(np.array([counter]), key).tolist() == [words]


def test_a_batch_of_counters_gives_each_counter_its_own_words():
    counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS])
    batch = philox4x32(counters, (7, 11))
    alone = [philox4x32(counter[None], (7, 11))[0].tolist() for counter in counters]
    assert batch.tolist() == alone


def test_a_uniform_is_made_of_53_bits_of_the_first_two_words():
    """The address (seed, position, purpose) is the key (low, high) and the counter (position, 0, purpose, 0)."""
    seed = 0x299F31D0_A4093822
    words = philox4x32(np.array([[5, 0, int(Purpose.RESIDUAL), 0]]), (0xA4093822, 0x299F31D0))[0]
    expected = ((int(words[0]) >> 5) * 2**26 + (int(words[1]) >> 6)) / 2**53
    assert uniforms(seed, np.array([5]), Purpose.RESIDUAL).tolist() == [expected]


@given(
    seed=SEEDS, positions=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), purpose=st.sampled_from(Purpose)
)
def test_a_uniform_depends_on_its_own_address_only(seed, positions, purpose):
    together = uniforms(seed, np.array(positions), purpose).tolist()
    alone = [uniforms(seed, np.array([position]), purpose)[0] for position in positions]
    assert together == alone
    assert all(0 <= uniform < 1 for uniform in together)


@given(seed=SEEDS, positions=st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_blocks_give_the_same_whatever_was_asked_before(seed, positions):
    blocks = AddressedUniforms(seed, Purpose.ACCEPT)
    assert [blocks.at(position) for position in positions] == uniforms(
        seed, np.array(positions), Purpose.ACCEPT
    ).tolist()


@pytest.mark.parametrize("position", [0, 127, 128, 255, 256, 4095], ids=str)
def test_block_borders_are_no_seam(position):
    values = AddressedUniforms(3, Purpose.DRAFT)
    expected = uniforms(3, np.array([position, position + 1]), Purpose.DRAFT).tolist()
    assert [values.at(position), values.at(position + 1)] == expected
    assert [values.at(position + 1), values.at(position)] == expected[::-1]


def test_no_two_addresses_share_a_uniform():
    """5 purposes, 8 seeds and 1,000 positions: two of 40,000 right numbers of 53 bits are equal with chance 9e-8."""
    seeds = [0, 1, 2, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1]
    values = [uniforms(seed, np.arange(1000), purpose) for seed in seeds for purpose in Purpose]
    assert len(np.unique(np.concatenate(values))) == len(seeds) * len(Purpose) * 1000


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("purpose", Purpose)
def test_uniforms_of_consecutive_positions_are_uniform(purpose):
    counts, _ = np.histogram(uniforms(20_240_601, np.arange(64_000), purpose), bins=NUM_BINS, range=(0, 1))
    assert chi_square(counts) < CHI_SQUARE_LIMIT


def test_uniforms_of_consecutive_seeds_at_one_position_are_uniform():
    values = [uniforms(seed, np.array([17]), Purpose.DRAFT)[0] for seed in range(6_400)]
    counts, _ = np.histogram(values, bins=NUM_BINS, range=(0, 1))
    assert chi_square(counts) < CHI_SQUARE_LIMIT


SAME_POSITION = [((one, 0), (other, 0)) for one, other in itertools.combinations(Purpose, 2)]
NEXT_POSITION = [((purpose, 0), (purpose, 1)) for purpose in Purpose]


@pytest.mark.parametrize(("one", "other"), SAME_POSITION + NEXT_POSITION)
def test_two_addresses_are_independent(one, other):
    """Chi-square of the joint counts in 8 x 8 bins: correlated purposes would bend the distribution of a round."""
    left, right = (uniforms(99, np.arange(0, 128_000, 2) + shift, purpose) for purpose, shift in (one, other))
    counts, _, _ = np.histogram2d(left, right, bins=8, range=((0, 1), (0, 1)))
    assert chi_square(counts) < CHI_SQUARE_LIMIT
