"""Arrays survive the wire bit for bit; what is no array, no id, no support and no probability is named and refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider import wire
from outrider.errors import InvalidArgumentError
from outrider.v1 import common_pb2
from outrider.warping import Warping

VOCAB_SIZE = 100


@given(ids=st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_back_as_they_went(ids):
    unpacked = wire.unpack_ids(wire.pack_ids(ids), "ids", 2**32)
    assert unpacked.tolist() == ids
    assert unpacked.dtype == np.int64


@given(probs=st.lists(st.floats(0, 1, width=32)))
def test_probabilities_come_back_as_float32_to_the_letter(probs):
    unpacked = wire.unpack_probs(wire.pack_probs(np.array(probs)), "probs")
    assert unpacked.tolist() == probs
    assert unpacked.dtype == np.float64


def test_arrays_are_little_endian_without_padding():
    assert wire.pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"
    assert wire.pack_probs(np.array([0.25, 1.0])) == struct.pack("<2f", 0.25, 1.0)


def test_a_support_comes_back_in_its_order():
    assert wire.unpack_support(wire.pack_ids([0, 7, 99]), "support_ids", VOCAB_SIZE).tolist() == [0, 7, 99]


@pytest.mark.parametrize(
    ("unpack", "data"),
    [
        pytest.param(lambda data: wire.unpack_ids(data, "field", VOCAB_SIZE), b"\0\0\0", id="ids_of_three_bytes"),
        pytest.param(lambda data: wire.unpack_probs(data, "field"), b"\0" * 5, id="probs_of_five_bytes"),
        pytest.param(
            lambda data: wire.unpack_ids(data, "field", VOCAB_SIZE), wire.pack_ids([3, 100]), id="id_too_large"
        ),
        pytest.param(
            lambda data: wire.unpack_ids(data, "field", VOCAB_SIZE), wire.pack_ids([2**32 - 1]), id="largest_uint32"
        ),
        pytest.param(
            lambda data: wire.unpack_support(data, "field", VOCAB_SIZE), wire.pack_ids([5, 4]), id="support_unsorted"
        ),
        pytest.param(
            lambda data: wire.unpack_support(data, "field", VOCAB_SIZE), wire.pack_ids([4, 5, 5]), id="support_repeats"
        ),
        pytest.param(lambda data: wire.unpack_probs(data, "field"), wire.pack_probs(np.array([-0.1])), id="negative"),
        pytest.param(lambda data: wire.unpack_probs(data, "field"), wire.pack_probs(np.array([np.nan])), id="nan"),
        pytest.param(lambda data: wire.unpack_probs(data, "field"), wire.pack_probs(np.array([np.inf])), id="infinite"),
    ],
)
def test_a_bad_array_is_refused_by_the_name_of_its_field(unpack, data):
    with pytest.raises(InvalidArgumentError, match=r"^field"):
        unpack(data)


def test_token_ids_up_to_the_vocabulary_pass():
    assert wire.check_token_id(99, "token_id", VOCAB_SIZE) == 99
    with pytest.raises(InvalidArgumentError, match="token_id is 100"):
        wire.check_token_id(100, "token_id", VOCAB_SIZE)


@pytest.mark.parametrize("is_coupled", [False, True])
def test_a_warping_and_a_coupling_come_back_as_they_went(is_coupled):
    warping = Warping(0.7, 40, 0.9, 0.05)
    message = wire.warping_to_proto(warping, is_coupled)
    assert wire.warping_from_proto(message) == warping
    assert wire.is_coupled_from_proto(message) is is_coupled


def test_a_coupling_that_is_not_known_is_refused_by_its_name():
    with pytest.raises(InvalidArgumentError, match=r"^coupling is 7"):
        wire.is_coupled_from_proto(common_pb2.SamplingParams(coupling=7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
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
        wire.warping_from_proto(common_pb2.SamplingParams(**{field: value}))


def test_an_empty_message_is_greedy_without_filters():
    """Zero values mean what common.proto says: temperature 0 is greedy, 0 keeps all."""
    warping = wire.warping_from_proto(common_pb2.SamplingParams())
    assert warping.is_greedy
    assert not warping.has_filters
    assert not wire.is_coupled_from_proto(common_pb2.SamplingParams())
