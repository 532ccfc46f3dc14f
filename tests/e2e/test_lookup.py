"""Proposals that are looked up, through real services: texts to the letter, and what they cost in target passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from outrider import AsyncSpeculativeClient, InvalidRequestError, SamplingParams, SpeculationParams, SpeculativeClient
from outrider_client.__main__ import main
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.processors import EVERY_PROCESSOR
from tests.servers import DRAFT, TARGET, RunningServer, Services

PROMPT = [5, 17, 3, 88, 41, 9, 5, 17, 3, 88]
NUM_NEW = 40
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, seed=1, max_new_tokens=NUM_NEW),
    "plain": SamplingParams(temperature=1, seed=3, max_new_tokens=NUM_NEW),
    "filters": SamplingParams(temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, seed=7, max_new_tokens=NUM_NEW),
    "processors": SamplingParams(temperature=0.8, seed=5, max_new_tokens=NUM_NEW, **EVERY_PROCESSOR["several"]),
}
EVERY_SAMPLING = pytest.mark.parametrize("name", SAMPLINGS)


@dataclass(frozen=True)
class Pair:
    """Both services."""

    services: Services
    target: RunningServer
    draft: RunningServer
    target_path: str


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("lookup")
    model = tiny_models.make_model(FAMILY, 1)
    paths = [
        tiny_models.save(model, folder / "t"),
        tiny_models.save(tiny_models.disagreeing_copy(model, 3, noise=0.012), folder / "d"),
    ]
    servers = services.start(TARGET, paths[0]), services.start(DRAFT, paths[1])
    yield Pair(services, *servers, paths[0])
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def texts(pair) -> dict[str, list[int]]:
    """The text of each sampling by the target only."""
    with SpeculativeClient(pair.target.address) as client:
        how = {"method": "autoregressive", "rule": "shared_noise"}
        return {name: client.generate(PROMPT, its, **how).token_ids for name, its in SAMPLINGS.items()}


@EVERY_SAMPLING
@pytest.mark.parametrize("number", [1, 2, 5, 16, "auto"])
def test_with_shared_noise_a_seeds_text_is_the_targets_own(pair, texts, name, number):
    with SpeculativeClient(pair.target.address, "lookup") as client:
        result = client.generate(PROMPT, SAMPLINGS[name], num_speculative_tokens=number)
    assert result.token_ids == texts[name]
    assert result.stats.draft_failures == {}


@EVERY_SAMPLING
@pytest.mark.parametrize("prediction", ["right", "half right", "wrong"])
@pytest.mark.parametrize("draft", ["none", "service"])
def test_no_prediction_changes_it_beside_a_draft_or_alone(pair, texts, name, prediction, draft):
    text = texts[name]
    given = {"right": text, "half right": [*text[:9], 1, 2, *text[12:]], "wrong": text[::-1]}[prediction]
    address = pair.draft.address if draft == "service" else None
    with SpeculativeClient(pair.target.address, address, patience=NEVER_WITHOUT_DRAFT) as client:
        result = client.generate(PROMPT, SAMPLINGS[name], num_speculative_tokens=5, prediction=given)
    assert result.token_ids == text
    if prediction == "right":
        assert result.stats.num_accepted_tokens_by_source["prediction"] == len(text)
        assert result.stats.num_rounds == -(-len(text) // 5)


@EVERY_SAMPLING
@pytest.mark.parametrize("rule", ["rejection", "shared_noise"])
def test_a_target_that_is_killed_in_the_middle_and_comes_back(pair, name, rule):
    """By rejection too, a seed has one text as long as there is no other source."""
    how = SpeculationParams(rule=rule, num_speculative_tokens=3)
    with SpeculativeClient(pair.target.address, "lookup") as client:
        expected = client.generate(PROMPT, SAMPLINGS[name], how).token_ids
    target = pair.services.start(TARGET, pair.target_path)
    with SpeculativeClient(target.address, "lookup", patience=NEVER_WITHOUT_DRAFT) as client:
        stream = client.stream(PROMPT, SAMPLINGS[name], how)
        token_ids = next(stream).token_ids
        target.stop()
        target = pair.services.start(TARGET, pair.target_path, listen=target.address)
        for chunk in stream:
            token_ids += chunk.token_ids
    target.stop()
    assert token_ids == stream.result.token_ids == expected
    assert stream.result.stats.num_target_retries >= 1


@EVERY_SAMPLING
def test_by_rejection_a_seeds_text_depends_on_no_number_of_proposals(pair, name):
    with SpeculativeClient(pair.target.address, "lookup") as client:
        texts = {
            tuple(client.generate(PROMPT, SAMPLINGS[name], rule="rejection", num_speculative_tokens=number).token_ids)
            for number in (1, 2, 5, 16, "auto")
        }
    assert len(texts) == 1


@pytest.mark.parametrize("number", [8, "auto"])
def test_a_text_that_repeats_itself_takes_few_passes(services, tmp_path, number):
    """Of a model whose next token depends on the last one alone, so that its greedy text goes round in a circle."""
    model = tiny_models.make_model(FAMILY, 1)
    model.transformer.wpe.weight.data.zero_()
    for layer in model.transformer.h:
        layer.attn.c_proj.weight.data.zero_()
    target, sampling = services.start(TARGET, tiny_models.save(model, tmp_path)), SamplingParams(0, max_new_tokens=100)
    with SpeculativeClient(target.address, "lookup") as client:
        result = client.generate(PROMPT, sampling, num_speculative_tokens=number)
        alone = client.generate(PROMPT, sampling, method="autoregressive")
    target.stop()
    assert result.token_ids == alone.token_ids
    assert alone.stats.num_rounds == 100
    assert result.stats.mean_acceptance_length > 3
    assert result.stats.num_accepted_tokens_by_source["lookup"] > 60


def test_the_asyncio_client_does_the_same(pair, texts):
    async def write() -> list[int]:
        async with AsyncSpeculativeClient(pair.target.address, "lookup") as client:
            result = await client.generate(PROMPT, SAMPLINGS["plain"], prediction=texts["plain"])
            assert result.stats.num_accepted_tokens_by_source["prediction"] > 0
            return result.token_ids

    assert pair.services.run(write()) == texts["plain"]


class TestWhatIsRefused:
    def test_a_prediction_with_an_id_that_the_target_does_not_have(self, pair):
        with (
            SpeculativeClient(pair.target.address) as client,
            pytest.raises(InvalidRequestError, match="prediction holds id 99999"),
        ):
            client.generate(PROMPT, prediction=[1, 99999])

    def test_a_prediction_of_text_where_there_is_no_tokenizer(self, pair):
        with (
            SpeculativeClient(pair.target.address) as client,
            pytest.raises(InvalidRequestError, match="prediction is text, but the target model came without"),
        ):
            client.generate(PROMPT, prediction="a")

    def test_the_draft_alone_without_a_service(self, pair):
        with SpeculativeClient(pair.target.address, "lookup") as client:
            with pytest.raises(InvalidRequestError, match="method 'draft' needs a draft"):
                client.generate(PROMPT, method="draft")
            with pytest.raises(InvalidRequestError, match="give lookup=True"):
                client.generate(PROMPT, lookup=False)


class TestCommandLine:
    """With the conftest's models, which have a tokenizer."""

    def run(self, *arguments: str):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return result

    def test_generate_tells_where_tokens_came_from(self, addresses, tmp_path):
        given = ["generate", "ab ab ab ab", addresses[1], "--temperature=0", "--max-new-tokens=20", "--ignore-eos"]
        alone = json.loads(self.run(*given, "--method=autoregressive", "--json", "--draft=lookup").stdout)
        prediction = tmp_path / "prediction.txt"
        prediction.write_text(alone["text"], encoding="utf-8")
        found = json.loads(self.run(*given, "--draft=lookup", f"--prediction-file={prediction}", "--json").stdout)
        assert found["token_ids"] == alone["token_ids"]
        assert found["stats"]["num_draft_tokens_by_source"].keys() <= {"prediction", "lookup"}
        assert "accepted from " in self.run(*given, "--draft=lookup", f"--prediction-file={prediction}").stderr

    def test_info_needs_no_draft_service(self, addresses):
        assert json.loads(self.run("info", addresses[1], "--draft=lookup", "--json").stdout)["verdict"] == "fits"

    def test_bench_measures_it(self, addresses):
        how = ["-k", "2,auto", "--num-prompts=1", "--repetitions=1", "--warm-up=0", "--max-new-tokens=16"]
        result = self.run("bench", addresses[1], "--draft=lookup", "--temperature=0", *how, "--json")
        samples = json.loads(result.stdout)["samples"]
        assert {sample["method"] for sample in samples} == {"autoregressive", "speculative", "speculative-auto"}
        assert not any(sample["stats"]["draft_failures"] for sample in samples)

    def test_bench_needs_a_draft_to_compare_with_transformers(self, addresses):
        result = CliRunner().invoke(main, ["bench", addresses[1], "--draft=lookup", "--compare=transformers"])
        assert result.exit_code == 2
        assert "give a draft service" in result.stderr
