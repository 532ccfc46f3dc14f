"""OpenAI's own client, which knows nothing of Outrider."""

from __future__ import annotations

import openai
import pytest

from tests.gateways import gateway_process
from tests.servers import eventually

MESSAGES = [{"role": "user", "content": "Say something."}]
SEEDED = {"seed": 7, "max_tokens": 12, "temperature": 1.0}


@pytest.fixture
def api(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
def expected(gateway):
    return gateway.post("/v1/chat/completions", messages=MESSAGES, **SEEDED).json


def test_a_chat(api, expected):
    answer = api.chat.completions.create(model="tiny", messages=MESSAGES, **SEEDED)
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert answer.system_fingerprint == expected["system_fingerprint"]
    assert answer._request_id


def test_a_streamed_chat(api, expected):
    events = list(
        api.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SEEDED
        )
    )
    pieces = [choice.delta.content or "" for event in events for choice in event.choices]
    assert "".join(pieces) == expected["choices"][0]["message"]["content"]
    assert events[-1].usage.completion_tokens == 12
    assert [choice.finish_reason for event in events for choice in event.choices][-1] == "length"


def test_the_streaming_helper_collects_a_chat(api, expected):
    with api.chat.completions.stream(model="tiny", messages=MESSAGES, **SEEDED) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected["choices"][0]["message"]["content"]


def test_log_probabilities_are_read(api):
    answer = api.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, **SEEDED)
    found = answer.choices[0].logprobs.content
    assert len(found) == 12
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in found)


def test_a_prediction(api):
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    plain = api.chat.completions.create(**asked)
    text = plain.choices[0].message.content
    predicted = api.chat.completions.create(**asked, prediction={"type": "content", "content": text})
    assert predicted.choices[0].message.content == text
    assert predicted.usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_a_completion_with_a_field_of_vllm(api):
    answer = api.completions.create(model="tiny", prompt=["Once", "Twice"], extra_body={"top_k": 3}, **SEEDED)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_models_are_listed(api):
    assert [model.id for model in api.models.list()] == ["tiny", "single"]
    assert api.models.retrieve("tiny").id == "tiny"


def test_errors_have_their_classes(api):
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_who_is_refused_for_too_many_requests_comes_again(target, draft):
    with gateway_process(f"tiny={target.address},{draft.address}", max_requests=1) as gateway:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            held = client.completions.create(model="tiny", prompt="Once", max_tokens=400, stream=True)
            assert next(iter(held))
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="tiny", prompt="Once")
            held.close()
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=20) as patient:
            assert patient.completions.create(model="tiny", prompt="Once").choices[0].text is not None


async def test_the_asynchronous_client_and_leaving_a_stream(gateway, target, expected):
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, **SEEDED)
        assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
        async with await client.completions.create(
            model="tiny", prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            async for event in stream:
                assert event.object == "text_completion"
                break
    eventually(lambda: target.num_sessions == 0, "the text was ended")
