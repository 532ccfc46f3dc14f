"""A conversation that asks for its prompt's log-probabilities gets them once, whatever breaks, and the same text."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from outrider import InvalidRequestError, SamplingParams, ServiceFailedError
from outrider.protocol.tokens import TokenLog
from outrider.v1 import target_pb2
from outrider_client.conversation.effects import Link
from outrider_client.logprobs import prompt_logprobs_of
from tests import toy_services as toys

PROMPT_IDS = (3, 1, 4, 1, 5)


def expected() -> list[float]:
    tokens, model = TokenLog(PROMPT_IDS), toys.ToyModel(toys.TARGET_LOGITS)
    return [float(np.log(model.probs(tokens, length)[PROMPT_IDS[length]])) for length in range(1, len(PROMPT_IDS))]


def check(result) -> None:
    first, *others = result.prompt_logprobs
    assert first is None
    assert [it.token_id for it in others] == list(PROMPT_IDS[1:])
    assert [it.logprob for it in others] == pytest.approx(expected(), abs=1e-6)


def test_they_come_before_the_text_and_move_no_token():
    asked = {"prompt_ids": PROMPT_IDS, "seed": 5}
    result = toys.run(**asked, num_prompt_logprobs=0)
    check(result)
    plain = toys.run(**asked)
    assert result.token_ids == plain.token_ids
    assert plain.prompt_logprobs == []


def test_a_text_of_nothing_is_the_opening_alone():
    world = toys.World()
    sent = []
    world.on_arrival = lambda stream, message: sent.append((stream.link, message.WhichOneof("kind")))
    result = toys.run(world, prompt_ids=PROMPT_IDS, num_prompt_logprobs=0, max_new_tokens=0)
    check(result)
    assert (result.token_ids, result.finish_reason, result.stats.num_rounds) == ([], "length", 0)
    assert sent == [(Link.TARGET, "open")]


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_they_are_asked_for_until_they_have_come_and_never_again(number):
    """The target's n-th answer is lost: the first is that to the opening, the others are rounds'."""
    world, openings = toys.World(), []
    toys.fail_requests(world, Link.TARGET, {number: grpc.StatusCode.UNAVAILABLE}, after_answer=True)

    def note(stream, message):
        if stream.link is Link.TARGET and message.HasField("open"):
            openings.append(message.open.HasField("num_prompt_logprobs"))

    world.on_arrival = note
    asked = {"prompt_ids": PROMPT_IDS, "rule": "shared_noise"}
    result = toys.run(world, **asked, num_prompt_logprobs=0)
    check(result)
    assert result.stats.num_target_retries == 1
    assert openings == [True, number == 1]
    assert result.token_ids == toys.run(**asked).token_ids


RIGHT = {"token": [-1.0, -2.0], "ranks": [1, 2], "likeliest_ids": [3, 2, 3, 1], "likeliest": [-1.0, -2.0, -1.0, -2.0]}


def test_an_answer_becomes_one_entry_for_each_token():
    _, second, third = prompt_logprobs_of([5, 3, 1], target_pb2.PromptLogprobs(**RIGHT), 2, 9)
    assert (second.token_id, second.logprob, second.rank, second.likeliest) == (3, -1.0, 1, [(3, -1.0), (2, -2.0)])
    assert (third.token_id, third.logprob, third.rank, third.likeliest) == (1, -2.0, 2, [(3, -1.0), (1, -2.0)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": [-1.0]},
        {"token": [-1.0, 0.5]},
        {"token": [-1.0, float("nan")]},
        {"ranks": [1]},
        {"ranks": [1, 0]},
        {"likeliest_ids": [3, 2, 3]},
        {"likeliest_ids": [3, 2, 3, 9]},
        {"likeliest": [-1.0, -2.0, -1.0]},
        {"likeliest": [-1.0, -2.0, -1.0, float("-inf")]},
    ],
    ids=str,
)
def test_an_answer_of_another_form_is_the_targets_failure(wrong):
    with pytest.raises(ServiceFailedError, match="other than it was asked for"):
        prompt_logprobs_of([5, 3, 1], target_pb2.PromptLogprobs(**(RIGHT | wrong)), 2, 9)


def test_a_target_that_answers_with_rows_instead_has_failed():
    world = toys.World()
    world.on_response = lambda stream, message: message.ClearField("prompt_logprobs")
    with pytest.raises(ServiceFailedError, match="did not answer the opening"):
        toys.run(world, num_prompt_logprobs=1)


def test_nothing_is_written_only_where_the_prompt_is_scored():
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).max_new_tokens == 0
    with pytest.raises(InvalidRequestError, match=r"max_new_tokens is 0: give .* or 0 with prompt_logprobs"):
        SamplingParams(max_new_tokens=0)
    for number in (-1, 21, 1.5, True):
        with pytest.raises(InvalidRequestError, match="prompt_logprobs"):
            SamplingParams(prompt_logprobs=number)
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        SamplingParams(max_new_tokens=0, prompt_logprobs=0, min_tokens=1)
