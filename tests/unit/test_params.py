"""A caller's settings are checked where they are said, and each refusal names the field."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from outrider.sampling.distribution import DistributionParams
from outrider_client.errors import InvalidRequestError
from outrider_client.params import NEUTRAL, PARAMETERS, SamplingParams, SpeculationParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.5),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("stop", ("",)),
        ("stop", ("end", 3)),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1001),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", [3]),
        ("logit_bias", {1: "much"}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("allowed_token_ids", [1 << 32]),
        ("allowed_token_ids", "all"),
        ("allowed_token_ids", range(4097)),
        ("bad_words", [[]]),
        ("bad_words", [3]),
        ("bad_words", "word"),
        ("bad_words", [range(1025)]),
        ("bad_words", [range(1025), "word"]),
        ("bad_words", [""]),
        ("bad_words", [" "]),
        ("bad_words", ["\ud800"]),
        ("bad_words", {"word": 1}),
        ("no_repeat_ngram_size", -1),
        ("min_tokens", 1 << 31),
        ("stop_token_ids", [-1]),
        ("logprobs", 21),
        ("logprobs", True),
        ("stop_token_ids", [1.5]),
    ],
)
def test_a_sampling_setting_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidRequestError, match=f"^{field} "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "oracle"),
        ("num_speculative_tokens", -1),
        ("window", 0),
        ("min_draft_prob", 1.1),
        ("min_draft_prob", float("nan")),
        ("rule", "tree"),
    ],
)
def test_a_speculation_setting_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidRequestError, match=f"^{field} "):
        SpeculationParams(**{field: value})


def test_fewer_tokens_than_at_most_are_asked_for_at_least():
    """Where `max_new_tokens` is left open, this is known when the target's own is."""
    with pytest.raises(InvalidRequestError, match=r"^min_tokens is 129: give at most max_new_tokens, which is 128"):
        SamplingParams(min_tokens=129, max_new_tokens=128)
    with pytest.raises(InvalidRequestError, match=r"^min_tokens is 129: give at most max_new_tokens, which is 128"):
        SamplingParams(min_tokens=129).resolved({})
    assert SamplingParams(min_tokens=129).resolved({"max_new_tokens": 200}).max_new_tokens == 200


def test_what_is_left_open_is_the_models_or_else_the_neutral_value():
    own = {"temperature": 0.7, "top_k": 5, "bad_words": ((3,),), "max_new_tokens": 50, "min_tokens": 9}
    asked = SamplingParams(top_k=0, bad_words=(), seed=4, max_new_tokens=6).resolved(own)
    assert asked == SamplingParams(0.7, 0, 1.0, 0.0, 4, 6, repetition_penalty=1.0, logit_bias=(), bad_words=(),
                                   no_repeat_ngram_size=0, min_tokens=6)  # fmt: skip
    assert SamplingParams().resolved(own).max_new_tokens == 50
    assert asked.resolved({"top_p": 0.5}) == asked


def test_all_parameters_of_a_distribution_can_be_asked_for():
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for param in PARAMETERS:
        assert defaults[param.name] == (None if param.name in NEUTRAL else param.default)


def test_refusals_are_value_errors_too():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2.0)


def test_lists_of_every_kind_become_plain_ones():
    params = SamplingParams(
        logit_bias={np.int64(7): 1, 3: np.float32(0.5)},
        allowed_token_ids=np.array([4, 2]),
        bad_words=(word for word in ([1], np.array([2, 3]))),
        stop_token_ids=range(2),
    )
    assert params.logit_bias == ((3, 0.5), (7, 1.0))
    assert (params.allowed_token_ids, params.stop_token_ids) == ((4, 2), (0, 1))
    assert params.bad_words == ((1,), (2, 3))
    assert hash(params.distribution) == hash(params.distribution)


def test_words_may_be_texts_until_a_tokenizer_makes_ids_of_them():
    params = SamplingParams(bad_words=["one", np.array([2, 3]), "two"], seed=4)
    assert params.bad_words == ("one", (2, 3), "two")
    with pytest.raises(InvalidRequestError, match=r"^bad_words holds texts"):
        params.distribution  # noqa: B018 - what is asked for is the error
    ids = {"one": [[1], [7, 1]], "two": [[2]]}
    assert params.with_word_ids(ids.__getitem__) == SamplingParams(bad_words=[[1], [7, 1], [2, 3], [2]], seed=4)
    with pytest.raises(InvalidRequestError, match=r"^bad_words .* up to 1024 ids in all"):
        params.with_word_ids(lambda _: [range(600)])


def test_defaults_draw_plainly():
    params = SamplingParams()
    assert params.distribution == DistributionParams(1.0, 0, 1.0, 0.0)
    assert (params.resolved({}).max_new_tokens, params.stop, params.ignore_eos) == (128, (), False)
    assert params.resolved({}).distribution == params.distribution


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="end").stop == ("end",)


def test_the_whole_range_of_seeds_is_taken():
    assert SamplingParams(seed=0).seed_or_new() == 0
    assert SamplingParams(seed=(1 << 64) - 1).seed_or_new() == (1 << 64) - 1


def test_without_a_seed_each_generation_gets_its_own():
    """Two of 64 random bits are equal with chance 5e-20."""
    params = SamplingParams()
    seeds = {params.seed_or_new(), params.seed_or_new()}
    assert len(seeds) == 2
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize(
    ("settings", "overlaps", "num_ahead"),
    [({}, True, 10), ({}, False, 5), ({"window": 3}, True, 3), ({"window": 7}, False, 7)],
    ids=["overlap", "no_overlap", "window", "window_wins"],
)
def test_how_far_ahead_the_draft_may_go(settings, overlaps, num_ahead):
    assert SpeculationParams(**settings).num_ahead(5, overlaps) == num_ahead


@pytest.mark.parametrize(("overlap", "have_one", "overlaps"), [
    (None, False, True), (None, True, False), (True, True, True), (False, False, False),
])  # fmt: skip
def test_a_draft_goes_on_meanwhile_unless_it_would_hold_up_the_target(overlap, have_one, overlaps):
    assert SpeculationParams(overlap=overlap).overlaps(have_one) is overlaps


@pytest.mark.parametrize(
    ("settings", "uses_draft"),
    [
        ({}, True),
        ({"num_speculative_tokens": 0}, False),
        ({"method": "autoregressive"}, False),
        ({"method": "draft"}, True),
    ],
    ids=["speculative", "k_0", "autoregressive", "draft"],
)
def test_which_methods_need_a_draft(settings, uses_draft):
    assert SpeculationParams(**settings).uses_draft is uses_draft
