"""Arrays survive the wire bit for bit; what is no array, no id, no support and no probability is named and refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider import wire
from outrider.errors import InvalidArgumentError
from outrider.scales import PROB_UNIT
from outrider.v1 import common_pb2
from outrider.warping import Warping

VOCAB_SIZE = 100


@given(ids=st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_back_as_they_went(ids):
    unpacked = wire.unpack_ids(wire.pack_ids(ids), "ids", 2**32)
    assert unpacked.tolist() == ids
    assert unpacked.dtype == np.int64


def test_tokens_are_little_endian_without_padding():
    assert wire.pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"


sorted_ids = st.lists(st.integers(0, 2**32 - 1), unique=True).map(sorted)
units = st.lists(st.integers(0, 2**18))


@given(supports=st.lists(sorted_ids, max_size=5))
def test_supports_come_back_as_they_went(supports):
    unpacked = wire.unpack_supports(wire.pack_supports(supports), "supports[{}]", 2**32)
    assert [ids.tolist() for ids in unpacked] == supports
    assert all(ids.dtype == np.int64 for ids in unpacked)


@given(rows=st.lists(units, max_size=5))
def test_probabilities_come_back_as_they_went(rows):
    probs = [np.array(row, dtype=np.float64) * PROB_UNIT for row in rows]
    unpacked = wire.unpack_probs(wire.pack_probs(probs), "rows[{}]")
    assert [row.tolist() for row in unpacked] == [row.tolist() for row in probs]


@given(rows=st.lists(st.lists(st.integers(1, 2**33)), max_size=5))
def test_weights_come_back_as_they_went(rows):
    unpacked = wire.unpack_weights(wire.pack_weights([np.array(row, dtype=np.int64) for row in rows]), "rows[{}]")
    assert [row.tolist() for row in unpacked] == rows


@pytest.mark.parametrize(
    ("ids", "data"),
    [
        ([], b""),
        ([3, 4, 15], b"\x03\x1a"),  # the example in common.proto
        ([7], b"\x0f"),
        ([0, 64, 65], b"\xf0\x07"),
        ([64], b"\x88\x09"),
        ([2**32 - 1], b"\xff\xff\xff\xff\xff\x0b"),
    ],
)
def test_a_support_is_octal_digits_of_how_many_ids_are_skipped(ids, data):
    assert wire.pack_supports([ids]) == [data]
    assert wire.unpack_supports([data], "support_ids", 2**32)[0].tolist() == ids


def test_probabilities_are_whole_units():
    assert wire.pack_probs([np.array([0.0, 2.0**-18, 2.0**-15, 1.0])]) == [b"\x10\x18\x88\x88\x88\x09"]


def test_weights_are_less_by_one():
    assert wire.pack_weights([np.array([1, 2, 9])]) == [b"\x10\x18"]


def ids_of(data: bytes) -> None:
    wire.unpack_ids(data, "field", VOCAB_SIZE)


def support_of(data: bytes) -> None:
    """Unpack the field between two that are right."""
    wire.unpack_supports([b"\x0d", data, b"\x0e"], "field[{}]", VOCAB_SIZE)


def probs_of(data: bytes) -> None:
    wire.unpack_probs([b"\x0d", data, b"\x0e"], "field[{}]")


@pytest.mark.parametrize(
    ("unpack", "data", "message"),
    [
        pytest.param(ids_of, b"\0\0\0", "field has 3 bytes", id="ids_of_three_bytes"),
        pytest.param(ids_of, wire.pack_ids([3, 100]), "field holds id 100", id="id_too_large"),
        pytest.param(ids_of, wire.pack_ids([2**32 - 1]), "field holds id 4294967295", id="largest_uint32"),
        pytest.param(support_of, b"\xcc\x09", "field[1] holds id 100", id="support_id_too_large"),
        pytest.param(support_of, b"\x6a\x6a", "field[1] holds id 101", id="support_sum_too_large"),
        pytest.param(support_of, b"\xff\xff\xff\xff\xff\x7f" * 9, "field[1] holds id", id="support_far_too_large"),
        pytest.param(support_of, b"\1\x8f", "field[1] ends within", id="support_cut_short"),
        pytest.param(
            support_of, b"\x88" * 6 + b"\x08", "field[1] holds a number of more", id="support_thirteen_digits"
        ),
        pytest.param(probs_of, b"\1\x8f", "field[1] ends within", id="probs_cut_short"),
        pytest.param(probs_of, b"\x88" * 6 + b"\x08", "field[1] holds a number of more", id="probs_thirteen_digits"),
        pytest.param(probs_of, b"\x89\x88\x88\x09", "field[1] holds 1.0000038", id="prob_above_1"),
    ],
)
def test_a_bad_array_is_refused_by_the_name_of_its_field(unpack, data, message):
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(message)}"):
        unpack(data)


@given(fields=st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_are_read_or_refused(fields):
    """Whatever is read is a support: ascending ids of the vocabulary."""
    try:
        supports = wire.unpack_supports(fields, "fields[{}]", VOCAB_SIZE)
    except InvalidArgumentError as error:
        index = int(re.match(r"fields\[(\d)\]", str(error))[1])
        with pytest.raises(InvalidArgumentError, match=r"^fields\[0\]"):
            wire.unpack_supports([fields[index]], "fields[{}]", VOCAB_SIZE)
        return
    for ids in supports:
        assert ids.tolist() == sorted({*ids.tolist()} & {*range(VOCAB_SIZE)})


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
