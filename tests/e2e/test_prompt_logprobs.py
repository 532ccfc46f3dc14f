"""A prompt's log-probabilities are those of transformers' own logits, with every backend, chunk size and batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from outrider import AsyncSpeculativeClient, InvalidRequestError, SamplingParams, ServiceFailedError, SpeculativeClient
from outrider.engine.backends.runner import ModelRunner
from tests import tiny_models
from tests.servers import TARGET, RunningServer

PROMPTS = [[(7 * index * index + 3 * index + number) % 97 for index in range(90 + number)] for number in range(4)]
NUM_LIKELIEST = 5
# Sums of a few hundred float32 terms of size 10 in another order; ids with logits closer than that may change places.
TOLERANCE = 1e-4
ALONE: dict = {"method": "autoregressive"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Models of two families, of which GPT-2 has no backend but the reference."""
    folder = tmp_path_factory.mktemp("models")
    models = {"llama": tiny_models.make_model("llama", 3, head_dim=16), "gpt2": tiny_models.make_model("gpt2", 3)}
    return {family: tiny_models.save(model, folder / family) for family, model in models.items()}


def laws_of(path: str) -> list[torch.Tensor]:
    """What transformers says of each prompt: `[len(prompt) - 1, V] float32`."""
    model = tiny_models.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def laws(paths) -> list[torch.Tensor]:
    return laws_of(paths["llama"])


@pytest.fixture
def start(services, paths) -> Iterator:
    servers: list[RunningServer] = []

    def start_target(family: str = "llama", dtype: str = "float32", **options) -> RunningServer:
        servers.append(services.start(TARGET, paths[family], dtype=dtype, **options))
        return servers[-1]

    yield start_target
    for server in servers:
        server.stop()


def scored(client: SpeculativeClient, prompt, **sampling) -> list:
    asked = {"prompt_logprobs": NUM_LIKELIEST, "max_new_tokens": 0, "temperature": 0.0}
    return client.generate(prompt, SamplingParams(**(asked | sampling)), **ALONE).prompt_logprobs


def check(found, prompt: list[int], law: torch.Tensor) -> None:
    first, *others = found
    assert first is None
    assert len(others) == len(prompt) - 1
    for row, token_id, its in zip(law, prompt[1:], others, strict=True):
        assert its.token_id == token_id
        assert its.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert [value for _, value in its.likeliest] == pytest.approx(
            row.topk(NUM_LIKELIEST).values.tolist(), abs=TOLERANCE
        )
        assert all(value == pytest.approx(float(row[it]), abs=TOLERANCE) for it, value in its.likeliest)
        least, most = (1 + int((row > row[token_id] + sign * TOLERANCE).sum()) for sign in (1, -1))
        assert least <= its.rank <= most


BACKENDS: dict[str, dict] = {
    "compiled": {},
    "torch": {"dtype": "float64"},
    "transformers": {"family": "gpt2"},
    "paged reference": {"paged": True},
    "paged reference, no graphs": {"paged": True, "cuda_graphs": False},
}


@pytest.mark.parametrize("name", BACKENDS)
def test_they_are_those_of_transformers_and_of_no_chunk_size_or_batch(start, paths, name):
    """Nor of evictions: 400 tokens do not fit into caches of 190."""
    found, laws = [], laws_of(paths[BACKENDS[name].get("family", "llama")])
    for options in ({}, {"max_batch_tokens": 7}, {"max_batch_tokens": 64, "max_cached_tokens": 190}):
        server = start(**BACKENDS[name], **options)
        assert server.model_info().model.backend == name.split(",")[0]
        with SpeculativeClient(server.address) as client:
            sampling = SamplingParams(prompt_logprobs=NUM_LIKELIEST, max_new_tokens=0)
            found.append([result.prompt_logprobs for result in client.generate(PROMPTS, sampling, **ALONE)])
            found.append([scored(client, prompt) for prompt in PROMPTS])
        server.wait_until_idle()
    for each in found:
        for scores, prompt, law in zip(each, PROMPTS, laws, strict=True):
            check(scores, prompt, law)
    if name == "compiled":  # to the last bit: sums are in one order
        assert all(each == found[0] for each in found)


def test_a_check_can_fail(start, laws):
    with SpeculativeClient(start().address) as client, pytest.raises(AssertionError):
        check(scored(client, PROMPTS[0]), PROMPTS[0], laws[0].roll(1, dims=0))


def test_they_do_not_depend_on_how_text_is_drawn_and_move_no_token(start):
    with SpeculativeClient(start().address) as client:
        plain = scored(client, PROMPTS[0])
        odd = {"temperature": 0.3, "top_k": 2, "logit_bias": {4: 50.0}, "repetition_penalty": 2.0, "seed": 3}
        assert scored(client, PROMPTS[0], **odd) == plain
        with_both = client.generate(
            PROMPTS[0], SamplingParams(seed=3, max_new_tokens=20, prompt_logprobs=NUM_LIKELIEST, logprobs=2), **ALONE
        )
        text = client.generate(PROMPTS[0], SamplingParams(seed=3, max_new_tokens=20, logprobs=2), **ALONE)
        assert (with_both.token_ids, with_both.logprobs) == (text.token_ids, text.logprobs)
        assert with_both.prompt_logprobs == plain
        assert text.prompt_logprobs == []
        both = client.generate(
            text.prompt_token_ids + text.token_ids, SamplingParams(max_new_tokens=0, prompt_logprobs=2), **ALONE
        )
        behind = both.prompt_logprobs[len(text.prompt_token_ids) :]
        assert [it.logprob for it in behind] == [it.logprob for it in text.logprobs]


def test_the_edges_of_a_prompt(start):
    with SpeculativeClient(start().address) as client:
        assert scored(client, [5]) == [None]
        one = scored(client, [5, 6], prompt_logprobs=0)
        assert (len(one), one[1].likeliest) == (2, [])
        full = [3] * tiny_models.CONTEXT_LENGTH
        assert len(scored(client, full)) == len(full)
        with pytest.raises(InvalidRequestError, match="prompt has 129 tokens"):
            scored(client, [*full, 3])
        with pytest.raises(InvalidRequestError, match="prompt has 128 tokens"):
            scored(client, full, max_new_tokens=1)
        with pytest.raises(InvalidRequestError, match="prompt_logprobs needs the target"):
            SpeculativeClient("localhost", "localhost").generate([3], SamplingParams(prompt_logprobs=1), method="draft")


async def test_the_asynchronous_client_has_them_before_the_first_chunk(start, laws):
    async with AsyncSpeculativeClient(start().address) as client:
        stream = client.stream(PROMPTS[0], SamplingParams(max_new_tokens=3, prompt_logprobs=NUM_LIKELIEST), **ALONE)
        async for _ in stream:
            check(stream.partial.prompt_logprobs, PROMPTS[0], laws[0])


def test_a_prompt_that_the_model_fails_on_fails_alone(start, monkeypatch):
    server = start(dtype="float64")
    forward = ModelRunner.forward

    def with_nan(self, feeds):
        rows = forward(self, feeds)
        if any(13 in feed.token_ids for feed in feeds):
            rows = rows.clone()
            rows[:] = torch.nan
        return rows

    monkeypatch.setattr(ModelRunner, "forward", with_nan)
    with SpeculativeClient(server.address) as client:
        with pytest.raises(ServiceFailedError, match="NaN"):
            scored(client, [12, 13, 14])
        assert len(scored(client, [12, 14])) == 2
