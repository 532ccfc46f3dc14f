"""Arrays come back from the wire as they went; what is no array, id, support or probability is named and refused."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.messages import params_from_proto, params_to_proto
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from tests.processors import EVERY_PROCESSOR

VOCAB_SIZE = 100


@given(ids=st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_back_as_they_went(ids):
    assert wire.unpack_ids(wire.pack_ids(ids), "ids", 2**32) == ids


def test_tokens_are_little_endian_without_padding():
    assert wire.pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"


@given(ids=st.lists(st.integers(0, 2**32 - 1), unique=True).map(sorted))
def test_supports_come_back_as_they_went(ids):
    """Through a message, since its numbers have 32 bits."""
    message = draft_pb2.Proposal(support_gaps=wire.support_gaps(np.array(ids, dtype=np.int64)))
    support = wire.support_of(message.support_gaps[:], "support_gaps", 2**32)
    assert support.tolist() == ids
    assert support.dtype == np.int64


@given(units=st.lists(st.integers(0, 2**18)))
def test_probabilities_come_back_as_they_went(units):
    probs = np.array(units, dtype=np.float64) * PROB_UNIT
    message = target_pb2.TargetRow(support_units=wire.prob_units(probs))
    assert message.support_units == units
    assert wire.probs_of(message.support_units[:], "support_units").tolist() == probs.tolist()


@pytest.mark.parametrize(
    ("ids", "gaps"),
    [
        ([], []),
        ([3, 4, 15], [3, 0, 10]),  # the example in common.proto
        ([0], [0]),
        ([0, 64, 65], [0, 63, 0]),
        ([2**32 - 1], [2**32 - 1]),
    ],
)
def test_a_support_is_how_many_ids_are_skipped(ids, gaps):
    assert wire.support_gaps(np.array(ids, dtype=np.int64)) == gaps
    assert wire.support_of(gaps, "support_gaps", 2**32).tolist() == ids


def test_small_numbers_take_one_byte():
    """As common.proto says; the field's key and length take two."""
    assert len(target_pb2.ProposedToken(support_gaps=[127] * 10).SerializeToString()) == 12


def ids_of(data: bytes) -> None:
    wire.unpack_ids(data, "field", VOCAB_SIZE)


def support_of(gaps: list[int]) -> None:
    wire.support_of(gaps, "field", VOCAB_SIZE)


def probs_of(units: list[int]) -> None:
    wire.probs_of(units, "field")


@pytest.mark.parametrize(
    ("read", "field", "message"),
    [
        pytest.param(ids_of, b"\0\0\0", "field has 3 bytes", id="ids_of_three_bytes"),
        pytest.param(ids_of, wire.pack_ids([3, 100]), "field holds id 100", id="id_too_large"),
        pytest.param(ids_of, wire.pack_ids([2**32 - 1]), "field holds id 4294967295", id="largest_uint32"),
        pytest.param(support_of, [100], "field holds id 100", id="support_id_too_large"),
        pytest.param(support_of, [50, 50], "field holds id 101", id="support_sum_too_large"),
        pytest.param(support_of, [3, 2**32 - 1], "field holds id 4294967299", id="sum_is_small_in_32_bits"),
        pytest.param(support_of, [2**32 - 1] * 9, "field holds id 38654705663", id="support_far_too_large"),
        pytest.param(support_of, [0] * 101, "field holds id 100", id="more_ids_than_there_are"),
        pytest.param(probs_of, [0, 2**18 + 1], "field holds 1.0000038", id="prob_above_1"),
        pytest.param(probs_of, [2**32 - 1], "field holds 16383.99", id="prob_far_above_1"),
    ],
)
def test_a_bad_array_is_refused_by_the_name_of_its_field(read, field, message):
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(message)}"):
        read(field)


@given(gaps=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=12))
def test_any_numbers_are_a_support_or_refused(gaps):
    """Whatever is read is ascending ids of the vocabulary; whatever is refused is none."""
    ids = list(itertools.accumulate(gaps, lambda last, gap: last + gap + 1, initial=-1))[1:]
    if ids and ids[-1] >= VOCAB_SIZE:
        with pytest.raises(InvalidArgumentError, match=f"^gaps holds id {ids[-1]}:"):
            wire.support_of(gaps, "gaps", VOCAB_SIZE)
    else:
        assert wire.support_of(gaps, "gaps", VOCAB_SIZE).tolist() == ids


def test_a_message_full_of_the_largest_gaps_is_refused():
    """4 MiB, gRPC's limit, hold fewer than 2^20 gaps of 2^32: their sum is far below what int64 holds."""
    with pytest.raises(InvalidArgumentError, match=r"^gaps holds id 4503599627370495:"):
        wire.support_of([2**32 - 1] * 2**20, "gaps", VOCAB_SIZE)


def test_token_ids_up_to_the_vocabulary_pass():
    assert wire.check_token_id(99, "token_id", VOCAB_SIZE) == 99
    with pytest.raises(InvalidArgumentError, match="token_id is 100"):
        wire.check_token_id(100, "token_id", VOCAB_SIZE)


@pytest.mark.parametrize("shares_noise", [False, True])
@pytest.mark.parametrize("settings", [{}, *EVERY_PROCESSOR.values()], ids=str)
def test_parameters_and_shared_noise_come_back_as_they_went(settings, shares_noise):
    params = DistributionParams(0.7, 40, 0.9, 0.05, **settings)
    message = params_to_proto(params, shares_noise)
    assert params_from_proto(message) == params
    assert message.shared_noise is shares_noise


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 1e-30),
        ("temperature", 0.000999),
        ("temperature", 1000.1),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", float("nan")),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("min_p", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidArgumentError, match=f"^{field} is"):
        params_from_proto(common_pb2.SamplingParams(**{field: value}))


def test_an_empty_message_is_greedy_without_filters():
    """Values that are not set mean what common.proto says: temperature 0 is greedy, and all filters keep all."""
    assert params_from_proto(common_pb2.SamplingParams()) == DistributionParams(0.0, 0, 1.0, 0.0)
    assert not params_from_proto(common_pb2.SamplingParams(temperature=1.0)).has_filters
    assert not common_pb2.SamplingParams().shared_noise
