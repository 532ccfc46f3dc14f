"""Every field means what it says, or is refused by its name."""

from __future__ import annotations

import math

import pytest

from outrider import SamplingParams

MESSAGES = [{"role": "user", "content": "Say something."}]
SEEDED = {"seed": 7, "max_tokens": 12, "temperature": 1.0}
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def text_of(gateway, **fields):
    answer = gateway.post(PLAIN, **({"prompt": "Once"} | SEEDED | fields))
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.3}, {"min_p": 0.3}),
        ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"70": 100, "71": 99}}, {"logit_bias": {70: 100, 71: 99}}),
        ({"allowed_token_ids": [70, 71, 72]}, {"allowed_token_ids": [70, 71, 72]}),
        ({"stop_token_ids": list(range(2, 120))}, {"stop_token_ids": range(2, 120)}),
        ({"stop_token_ids": list(range(2, 120)), "min_tokens": 6}, {"stop_token_ids": range(2, 120), "min_tokens": 6}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_a_field_of_sampling_means_what_it_means_to_the_client(gateway, client, fields, params):
    expected = client.generate(
        "Once", SamplingParams(**({"seed": 7, "max_new_tokens": 12, "temperature": 1.0} | params))
    )
    assert text_of(gateway, **fields) == expected.text


def test_fields_of_sampling_change_the_text(gateway):
    plain = text_of(gateway)
    for fields in ({"temperature": 0}, {"top_k": 3}, {"logit_bias": {"70": 100}}, {"allowed_token_ids": [70, 71]}):
        assert text_of(gateway, **fields) != plain
    greedy = text_of(gateway, temperature=0, max_tokens=60)
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert text_of(gateway, temperature=0, max_tokens=60, **{name: 2}) != greedy


def test_a_text_ends_before_a_stop_string(gateway):
    plain = text_of(gateway, temperature=0)
    stop = plain[3:5]
    for given in (stop, [stop, "never there"]):
        answer = gateway.post(PLAIN, prompt="Once", max_tokens=12, temperature=0, stop=given).json["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (plain[: plain.index(stop)], "stop")


def test_a_bad_word_is_not_written(gateway):
    plain = text_of(gateway, temperature=0)
    word = next(character for character in plain if character.isascii() and character.isprintable())
    assert word not in text_of(gateway, temperature=0, bad_words=[word])


def test_lengths_have_openais_defaults(gateway):
    completion = gateway.post(PLAIN, prompt="Once", ignore_eos=True).json
    assert completion["usage"]["completion_tokens"] == 16
    chat = gateway.post(CHAT, messages=MESSAGES, max_completion_tokens=5).json
    assert chat["usage"]["completion_tokens"] == 5
    whole = gateway.post(CHAT, messages=MESSAGES, ignore_eos=True, seed=1).json
    assert whole["usage"]["total_tokens"] == 512


def test_an_echo_comes_before_the_text(gateway):
    plain = text_of(gateway)
    ids = gateway.post("/tokenize", prompt="Once").json["tokens"]
    for prompt in ("Once", ids):
        assert text_of(gateway, prompt=prompt, echo=True) == f"Once{plain}"
    events = gateway.post(PLAIN, prompt="Once", echo=True, stream=True, **SEEDED).events
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == f"Once{plain}"


def test_log_probabilities_of_a_chat_are_the_targets_whole_and_streamed(gateway, client):
    asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3} | SEEDED
    [choice] = gateway.post(CHAT, **asked).json["choices"]
    result = client.generate(MESSAGES, SamplingParams(seed=7, max_new_tokens=12, temperature=1.0, logprobs=3))
    found = choice["logprobs"]["content"]
    assert [each["logprob"] for each in found] == [each.logprob for each in result.logprobs]
    assert b"".join(bytes(each["bytes"]) for each in found).decode(errors="replace") == result.text
    assert all(len(each["top_logprobs"]) == 3 for each in found)
    assert all(it["logprob"] <= 0 for each in found for it in each["top_logprobs"])
    events = gateway.post(CHAT, **asked, stream=True).events
    streamed = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [each for part in streamed for each in part["content"]] == found


def test_log_probabilities_of_a_completion_have_offsets_into_the_text(gateway):
    [choice] = gateway.post(PLAIN, prompt="Once", logprobs=2, allowed_token_ids=[70, 71, 72], **SEEDED).json["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    for token, offset, logprob, top in zip(
        found["tokens"], found["text_offset"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert choice["text"][offset:].startswith(token)
        assert math.isclose(top[token], logprob)
    events = gateway.post(
        PLAIN, prompt="Once", logprobs=2, allowed_token_ids=[70, 71, 72], **SEEDED, stream=True
    ).events
    parts = [choice["logprobs"] for event in events for choice in event["choices"]]
    for name, values in found.items():
        assert [value for part in parts for value in part[name]] == values


def test_the_template_gets_its_settings(gateway):
    def rendered(**fields):
        return gateway.post("/detokenize", tokens=gateway.post("/tokenize", messages=MESSAGES, **fields).json["tokens"])

    assert rendered(add_generation_prompt=False).json == {"prompt": "user: Say something.\n"}
    assert rendered(chat_template_kwargs={"shout": "HEY "}).json["prompt"].endswith("HEY assistant: ")
    plain, shouted = (
        gateway.post(CHAT, messages=MESSAGES, chat_template_kwargs=it, **SEEDED).json for it in ({}, {"shout": "HEY "})
    )
    assert shouted["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + 4


def test_parts_of_text_are_joined_and_developers_are_the_system(gateway):
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    same = [{"role": "system", "content": "a\nb"}]
    answers = [gateway.post("/tokenize", messages=messages).json for messages in (parts, same)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rule", ["auto", "shared_noise"])
def test_speculation_moves_no_token_of_a_seed(gateway, rule):
    plain = text_of(gateway, speculation="off")
    answer = gateway.post(PLAIN, prompt="Once", speculation={"rule": rule, "tokens": 4}, **SEEDED).json
    assert answer["choices"][0]["text"] == plain
    assert answer["usage"]["outrider"]["drafted_tokens"] > 0
    alone = gateway.post(PLAIN, prompt="Once", speculation={"tokens": 0}, **SEEDED)
    assert alone.json["usage"]["outrider"] == {
        "generated_tokens": 12,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "target_passes": 12,
    }
    assert alone.headers["x-outrider"] == "generated_tokens=12, drafted_tokens=0, accepted_tokens=0, target_passes=12"


@pytest.mark.parametrize("name", ["tiny", "single"])
def test_a_prediction_that_is_right_saves_passes_and_moves_no_token(gateway, name):
    fields = {"model": name, "prompt": "Once", "temperature": 0, "max_tokens": 40}
    plain = gateway.post(PLAIN, **fields, speculation="off").json["choices"][0]["text"]
    right = gateway.post(PLAIN, **fields, prediction={"type": "content", "content": plain}).json
    assert right["choices"][0]["text"] == plain
    usage = right["usage"]
    details = usage["completion_tokens_details"]
    assert 0 < details["accepted_prediction_tokens"] <= 40
    assert usage["completion_tokens"] == 40 + details["rejected_prediction_tokens"]
    assert usage["outrider"]["target_passes"] < 40
    parts = [{"type": "text", "text": plain[:10]}, {"type": "text", "text": plain[10:]}]
    assert gateway.post(PLAIN, **fields, prediction={"content": parts}).json["choices"][0]["text"] == plain


def test_refused_tokens_of_a_prediction_count_as_completion_tokens(gateway):
    fields = {"model": "single", "prompt": "Once", "temperature": 0, "max_tokens": 24}
    plain = gateway.post(PLAIN, **fields).json["choices"][0]["text"]
    wrong = plain[:8] + "".join("x" if character != "x" else "y" for character in plain[8:])
    found = gateway.post(PLAIN, **fields, prediction={"content": wrong}, speculation={"tokens": 8}).json
    details = found["usage"]["completion_tokens_details"]
    assert found["choices"][0]["text"] == plain
    assert details["rejected_prediction_tokens"] > 0
    assert found["usage"]["completion_tokens"] == 24 + details["rejected_prediction_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "x"},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "best_of": 1, "suffix": None},
        {"unknown": None, "logit_bias": {}, "stop": None},
    ],
)
def test_what_cannot_change_the_text_is_ignored(gateway, fields):
    assert text_of(gateway, **fields) == text_of(gateway)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, {"type": "json_object"}) for name in ("response_format", "structured_outputs")),
        *(("tools", [{"type": "function"}]), ("tool_choice", "required"), ("suffix", "end")),
        *(("best_of", 2), ("use_beam_search", True), ("verbosity", "low"), ("no_such_field", 1), ("best_of", True)),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(gateway, name, value):
    answer = gateway.post(PLAIN, prompt="Once", **{name: value})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, name, "unsupported_parameter")
    assert answer.error["message"].startswith(f"{name} is not supported: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("temperature", -1),
            ("temperature", "hot"),
            ("top_p", 0),
            ("top_k", -2),
            ("min_p", 2),
            ("n", 0),
            ("n", 1000),
        ),
        *(("seed", -1), ("seed", 1 << 70), ("stop", [""]), ("stop", 3), ("max_tokens", 0), ("min_tokens", -1)),
        *(("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("logit_bias", {"a": 1})),
        *(("logit_bias", {"1": 101}), ("logit_bias", {"999999": 1}), ("stop_token_ids", [-1]), ("bad_words", [""])),
        *(("allowed_token_ids", []), ("allowed_token_ids", [999999]), ("ignore_eos", 1), ("logprobs", 21)),
        *(("stream", "yes"), ("stream_options", {"x": 1}), ("speculation", "on"), ("speculation", {"rule": "none"})),
        *(("speculation", {"tokens": -1}), ("prediction", "text"), ("prediction", {"content": [{"type": "image"}]})),
        *(("prompt", []), ("prompt", [[]]), ("prompt", ["a", 1]), ("prompt", [1, True]), ("prompt", [999999])),
        *(("prompt", "x" * 600), ("prompt", None), ("model", 3)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(gateway, name, value):
    answer = gateway.post(PLAIN, **({"prompt": "Once"} | {name: value}))
    assert (answer.status, answer.error["param"]) == (400, name), answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert name in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user"}],
        [{"content": "no role"}],
        [{"role": "tool", "content": "4"}],
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        "text",
    ],
)
def test_messages_that_are_no_text_are_refused(gateway, messages):
    answer = gateway.post(CHAT, messages=messages)
    assert (answer.status, answer.error["param"]) == (400, "messages"), answer.body


def test_fields_that_need_each_other_say_so(gateway):
    for fields, name in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"prediction": {"content": "x"}, "n": 2}, "n"),
        ({"prediction": {"content": "x"}, "speculation": "off"}, "prediction"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        answer = gateway.post(CHAT, messages=MESSAGES, **fields)
        assert (answer.status, answer.error["param"]) == (400, name), answer.body


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100000])
def test_a_body_that_is_no_object_is_refused(gateway, body):
    answer = gateway.ask("POST", CHAT, body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_a_stream_can_say_which_text_the_draft_proposed(gateway):
    asked = {"prompt": "Once", "speculation": {"tokens": 4}, **SEEDED}
    answer = gateway.post(PLAIN, **asked, stream=True, stream_options={"include_drafted": True, "include_usage": True})
    *events, last = answer.events
    choices = [choice for event in events for choice in event["choices"]]
    segments = [segment for choice in choices for segment in choice.get("outrider", {"segments": []})["segments"]]
    assert "".join(text for text, _ in segments) == "".join(choice["text"] for choice in choices)
    assert {drafted for _, drafted in segments} <= {True, False}
    if last["usage"]["outrider"]["accepted_tokens"] == 0:
        assert not any(drafted for _, drafted in segments)
