"""Each route, whole and streamed, against real services."""

from __future__ import annotations

import pytest

from outrider import SamplingParams
from outrider import __version__ as version
from tests.gateway.conftest import TEMPLATE

MESSAGES = [{"role": "user", "content": "Say something."}]
RENDERED = "user: Say something.\nassistant: "
SEEDED = {"seed": 7, "max_tokens": 12, "temperature": 1.0}


def texts_of(events, is_chat):
    found = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "") if is_chat else choice["text"]
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return [found[index] for index in sorted(found)]


def test_models_are_listed_with_their_length(gateway):
    listed = gateway.get("/v1/models").json
    assert listed["object"] == "list"
    assert [(each["id"], each["object"], each["max_model_len"]) for each in listed["data"]] == [
        ("tiny", "model", 512),
        ("single", "model", 512),
    ]
    assert gateway.get("/v1/models/tiny").json == listed["data"][0]
    missing = gateway.get("/v1/models/other")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_a_completion_is_the_text_that_the_client_writes(gateway, client):
    answer = gateway.post("/v1/completions", model="tiny", prompt="Once", **SEEDED)
    assert answer.status == 200, answer.body
    result = client.generate("Once", SamplingParams(seed=7, max_new_tokens=12, temperature=1.0))
    [choice] = answer.json["choices"]
    assert choice == {"index": 0, "text": result.text, "logprobs": None, "finish_reason": "length"}
    assert answer.json["object"] == "text_completion"
    assert answer.json["model"] == "tiny"
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 12, 16)


def test_a_chat_is_the_text_that_the_client_writes(gateway, client):
    answer = gateway.post("/v1/chat/completions", messages=MESSAGES, **SEEDED).json
    result = client.generate(MESSAGES, SamplingParams(seed=7, max_new_tokens=12, temperature=1.0))
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": result.text, "refusal": None}
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(RENDERED) == len(result.prompt_token_ids)


def test_the_fingerprint_is_the_models_identity_with_and_without_a_draft(gateway, target):
    identity = target.model_info().model.identity
    for name in ("tiny", "single"):
        answers = [gateway.post("/v1/completions", model=name, prompt="Once", **SEEDED).json for _ in range(2)]
        assert {answer["system_fingerprint"] for answer in answers} == {identity}
        assert len({answer["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_holds_the_same_text_and_usage(gateway, is_chat):
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    prompt = {"messages": MESSAGES} if is_chat else {"prompt": "Once"}
    whole = gateway.post(path, **prompt, n=3, **SEEDED).json
    streamed = gateway.post(path, **prompt, n=3, **SEEDED, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"] == "text/event-stream"
    *events, last = streamed.events
    expected = [choice["message"]["content"] if is_chat else choice["text"] for choice in whole["choices"]]
    assert texts_of(events, is_chat) == expected
    assert len(set(expected)) == 3
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == ["length"] * 3
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole["usage"][name]
    assert len({event["id"] for event in events}) == 1
    if is_chat:
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_usage_goes_along_with_each_event_if_asked(gateway):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = gateway.post("/v1/completions", prompt="Once", **SEEDED, stream=True, stream_options=options).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 12


def test_several_prompts_of_ids_and_of_text_are_answered_in_order(gateway):
    texts = gateway.post("/v1/completions", prompt=["Once", "Twice"], n=2, **SEEDED).json["choices"]
    ids = [gateway.post("/tokenize", prompt=prompt).json["tokens"] for prompt in ("Once", "Twice")]
    same = gateway.post("/v1/completions", prompt=ids, n=2, **SEEDED).json
    assert [choice["index"] for choice in texts] == [0, 1, 2, 3]
    assert same["choices"] == texts
    assert same["usage"]["prompt_tokens"] == 9
    single = gateway.post("/v1/completions", prompt=ids[1], **SEEDED).json["choices"][0]
    assert single["text"] == texts[2]["text"]


def test_tokens_go_there_and_back(gateway):
    found = gateway.post("/tokenize", prompt="Zoë", return_token_strs=True).json
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert gateway.post("/detokenize", tokens=[*found["tokens"], 1]).json == {"prompt": "Zoë</s>"}
    chat = gateway.post("/tokenize", messages=MESSAGES).json
    assert gateway.post("/detokenize", tokens=chat["tokens"]).json == {"prompt": RENDERED}
    out_of_range = gateway.post("/detokenize", tokens=[1 << 40])
    assert (out_of_range.status, out_of_range.error["param"]) == (400, "tokens")


def test_the_tokenizer_describes_itself(gateway):
    found = gateway.get("/tokenizer_info").json
    assert (found["bos_token"], found["eos_token"], found["chat_template"]) == ("<s>", "</s>", TEMPLATE)


def test_the_gateway_says_that_it_lives_and_what_it_is(gateway):
    assert gateway.get("/health").status == 200
    assert gateway.get("/version").json == {"version": version}


def test_the_description_names_every_route_and_every_field(gateway):
    found = gateway.get("/openapi.json").json
    assert found["openapi"] == "3.1.0"
    assert "/v1/chat/completions" in found["paths"]
    properties = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "prediction", "speculation"} <= properties.keys()


def test_what_is_not_there_is_told_as_openai_tells_it(gateway):
    for method, path, status in (("GET", "/v1/other", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        answer = gateway.ask(method, path)
        assert answer.status == status
        assert answer.error["message"]


def test_a_request_id_is_echoed_if_it_is_sane(gateway):
    for path in ("/health", "/nowhere"):
        assert gateway.ask("GET", path, headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert gateway.ask("GET", path, headers={"X-Request-Id": 'a"b'}).headers["x-request-id"] != 'a"b'
