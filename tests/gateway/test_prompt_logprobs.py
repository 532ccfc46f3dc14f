"""Prompts are scored as vLLM and OpenAI have it: `echo`, `logprobs`, `prompt_logprobs`, `max_tokens`."""

from __future__ import annotations

import pytest

from outrider import SamplingParams

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
PROMPT = "Once upon a time, Zoë"
ALONE: dict = {"method": "autoregressive"}


@pytest.fixture(scope="module")
def ids(gateway) -> list[int]:
    return gateway.post("/tokenize", prompt=PROMPT).json["tokens"]


@pytest.fixture(scope="module")
def expected(client, ids):
    sampling = SamplingParams(max_new_tokens=4, temperature=0.0, logprobs=3, prompt_logprobs=3)
    return client.generate(ids, sampling, **ALONE)


def post(gateway, **fields):
    answer = gateway.post(PLAIN, **({"prompt": PROMPT, "max_tokens": 4, "temperature": 0} | fields))
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_an_echo_with_logprobs_tells_of_prompt_and_text(gateway, ids, expected, max_tokens, as_ids):
    prompt = ids if as_ids else PROMPT
    answer = post(gateway, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"].startswith(PROMPT)
    found, scored = choice["logprobs"], [*expected.prompt_logprobs, *expected.logprobs[:max_tokens]]
    assert all(len(values) == len(scored) for values in found.values())
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert found["token_logprobs"][1:] == [its.logprob for its in scored[1:]]
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == [its.likeliest[0][1] for its in scored[1:]]
    assert 2 <= max(len(top) for top in found["top_logprobs"][1:]) <= 3
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:index]) for index in range(len(lengths))]
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_an_echo_of_nothing_written_is_the_prompt(gateway):
    [choice] = post(gateway, echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPT, None, "length")


def test_a_list_of_prompts_of_ids_is_scored_each(gateway, ids, expected):
    """The request of lm-eval for a batch of loglikelihoods."""
    batch = [ids, ids[:3], ids[:1]]
    choices = post(gateway, prompt=batch, echo=True, logprobs=1, max_tokens=1, seed=1234)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    whole = choices[0]["logprobs"]["token_logprobs"]
    assert len(whole) == len(ids) + 1
    assert choices[1]["logprobs"]["token_logprobs"][:3] == whole[:3]
    assert choices[2]["logprobs"]["token_logprobs"][0] is None
    first, second, *_ = expected.logprobs
    assert whole[-1] == first.logprob != second.logprob


def test_a_stream_begins_with_the_echo_of_each_text(gateway, ids):
    fields = {"prompt": [ids, ids[:3]], "echo": True, "logprobs": 2, "n": 2, "seed": 3, "temperature": 1}
    whole = post(gateway, **fields)["choices"]
    answer = gateway.post(PLAIN, **fields, max_tokens=4, stream=True)
    streamed = [choice for event in answer.events for choice in event["choices"]]
    assert len(whole) == 4
    for choice in whole:
        its = [each for each in streamed if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in its) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for each in its for value in each["logprobs"][name]] == values


def test_prompt_logprobs_have_vllms_form(gateway, ids, expected):
    [choice] = post(gateway, prompt_logprobs=2, max_tokens=1)["choices"]
    assert len(choice["text"]) == 1
    check_vllms_form(choice["prompt_logprobs"], ids, expected)
    assert "prompt_logprobs" not in post(gateway)["choices"][0]


def check_vllms_form(found, ids, expected):
    first, *others = found
    assert first is None
    assert len(others) == len(ids) - 1
    for token_id, entry, its in zip(ids[1:], others, expected.prompt_logprobs[1:], strict=True):
        own = entry[str(token_id)]
        assert (own["logprob"], own["rank"]) == (its.logprob, its.rank)
        assert {int(key): value["logprob"] for key, value in entry.items()} == dict(its.likeliest[:2]) | {
            token_id: its.logprob
        }
        assert sorted(value["rank"] for value in entry.values()) == sorted({1, 2, its.rank})
    assert others[0][str(ids[1])]["decoded_token"] == "n"


def test_a_chat_has_them_beside_its_choices(gateway, client):
    answer = gateway.post(CHAT, messages=MESSAGES, prompt_logprobs=2, max_tokens=0).json
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    expected = client.generate(MESSAGES, SamplingParams(max_new_tokens=0, prompt_logprobs=2), **ALONE)
    found = answer["prompt_logprobs"]
    assert [next(iter(each.values()))["logprob"] for each in found[1:]] == [
        its.logprob for its in expected.prompt_logprobs[1:]
    ]


def test_the_likeliest_of_tokens_with_one_text_counts(gateway):
    """Every byte above 127 is shown as the same replacement: a token must not hide the likeliest one."""
    prompt = [5, *range(200, 240)]
    [choice] = post(gateway, prompt=prompt, echo=True, logprobs=20, max_tokens=0)["choices"]
    [plain] = post(gateway, prompt=prompt, prompt_logprobs=1, max_tokens=0)["choices"]
    tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
    assert tops == [max(its["logprob"] for its in each.values()) for each in plain["prompt_logprobs"][1:]]
    assert any(top != own for top, own in zip(tops, choice["logprobs"]["token_logprobs"][1:], strict=True))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused_by_name(gateway, fields, name):
    answer = gateway.post(PLAIN, **({"prompt": PROMPT} | fields))
    assert (answer.status, answer.error["param"]) == (400, name), answer.body
