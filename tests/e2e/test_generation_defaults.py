"""A model's own generation_config gives the defaults of what the caller leaves open; the text is transformers' own.

In float64. The draft is a disagreeing copy of the target, whose own generation_config says something else.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import PreTrainedModel

from outrider import AsyncSpeculativeClient, SamplingParams, SpeculativeClient
from outrider_client.__main__ import main
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET

PROMPT = [5, 17, 3, 88, 41, 9]
NUM_NEW = 40
OWN = {"repetition_penalty": 1.3, "top_k": 5, "max_new_tokens": NUM_NEW, "num_beams": 1}
UNUSED = {"typical_p": 0.9, "top_p": 0.0}  # not supported, and out of our range
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Pair:
    """Services whose target has settings of its own, and the target as transformers runs it."""

    model: PreTrainedModel
    target: str
    draft: str
    suppressed_id: int
    log: str  # of the target's start

    def generate(self, sampling: SamplingParams | None, num_proposals: int) -> Any:
        with SpeculativeClient(self.target, self.draft, patience=NEVER_WITHOUT_DRAFT) as client:
            return client.generate(PROMPT, sampling, num_speculative_tokens=num_proposals)

    def written_by_transformers(self, **settings: Any) -> list[int]:
        return written_by_transformers(self.model, **settings)


def written_by_transformers(model: PreTrainedModel, **settings: Any) -> list[int]:
    prompt = torch.tensor([PROMPT])
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(prompt, **given)[0, len(PROMPT) :].tolist()  # type: ignore[operator]


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("defaults")
    tokenizer = tiny_models.byte_tokenizer()
    model = tiny_models.make_model(FAMILY, 1, vocab_size=len(tokenizer))
    draft = tiny_models.disagreeing_copy(model, 2)
    for it, own in ((model, OWN), (draft, {"repetition_penalty": 2.0, "max_new_tokens": 3})):
        it.generation_config.update(do_sample=True, **own)
    suppressed_id = written_by_transformers(model)[3]
    model.generation_config.suppress_tokens = [suppressed_id]
    paths = [tiny_models.save(it, folder / name, tokenizer) for it, name in ((model, "t"), (draft, "d"))]
    file = folder / "t" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | UNUSED))
    records: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("outrider_target.servicer")
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    servers = [services.start(kind, path) for kind, path in zip((TARGET, DRAFT), paths, strict=True)]
    logger.removeHandler(handler)
    yield Pair(model, *(server.address for server in servers), suppressed_id, "\n".join(records))
    for server in servers:
        server.stop()


@pytest.mark.parametrize("num_proposals", [0, 4])
def test_a_greedy_text_is_that_of_transformers_with_the_models_own_settings(pair, num_proposals):
    result = pair.generate(GREEDY, num_proposals)
    assert result.token_ids == pair.written_by_transformers()
    assert len(result.token_ids) == NUM_NEW
    if num_proposals:
        assert 0 < result.stats.num_accepted_tokens < result.stats.num_draft_tokens


@pytest.mark.parametrize("num_proposals", [0, 4])
def test_a_value_of_the_callers_takes_the_place_of_the_models(pair, num_proposals):
    """The neutral ones too; each of them makes another text."""
    asked: list[dict[str, Any]] = [{"repetition_penalty": 1.0}, {"max_new_tokens": 9}, {"bad_words": ()}]
    of_transformers: list[dict[str, Any]] = [asked[0], asked[1], {"suppress_tokens": None}]
    for fields, settings in zip(asked, of_transformers, strict=True):
        text = pair.generate(SamplingParams(temperature=0, **fields), num_proposals).token_ids
        assert text == pair.written_by_transformers(**settings)
        assert text != pair.written_by_transformers()


@pytest.mark.parametrize("num_proposals", [0, 4])
def test_what_is_drawn_is_as_if_the_caller_had_asked_for_it(pair, num_proposals):
    """The seed's text with shared noise is the target's own."""
    values = {"repetition_penalty": 1.3, "top_k": 5, "max_new_tokens": NUM_NEW, "bad_words": [[pair.suppressed_id]]}
    left_open = pair.generate(SamplingParams(seed=3), num_proposals).token_ids
    assert left_open == pair.generate(SamplingParams(seed=3, **values), num_proposals).token_ids  # type: ignore[arg-type]
    assert left_open != pair.generate(SamplingParams(seed=3, top_k=0), num_proposals).token_ids


def test_without_any_parameters_texts_are_drawn_though_do_sample_is_not_asked(pair):
    assert len(pair.generate(None, 4).token_ids) == NUM_NEW


def test_the_asyncio_client_and_the_command_line_do_the_same(pair):
    async def write() -> list[int]:
        async with AsyncSpeculativeClient(pair.target, pair.draft) as client:
            return (await client.generate(PROMPT, GREEDY)).token_ids

    addresses = [f"--target={pair.target}", f"--draft={pair.draft}"]
    prompt = ",".join(map(str, PROMPT))
    given = ["generate", prompt, "--token-ids", *addresses, "--temperature=0", "--json"]
    expected = pair.written_by_transformers()
    assert asyncio.run(write()) == expected
    assert json.loads(CliRunner().invoke(main, given).stdout)["token_ids"] == expected


def test_the_targets_log_names_what_is_not_used_in_one_line(pair):
    assert pair.log.count("\n") == 0
    for name, reason in (("typical_p 0.9", "not supported"), ("top_p 0.0", "give a number above 0")):
        assert f"{name}: " in pair.log
        assert reason in pair.log


def test_info_shows_the_defaults_and_what_is_not_used(pair):
    given = ["info", f"--target={pair.target}", f"--draft={pair.draft}"]
    document = json.loads(CliRunner().invoke(main, [*given, "--json"]).stdout)
    found = document["target"]["generation_defaults"]
    assert {name: value for name, value in found.items() if value and name != "unused"} == {
        "repetition_penalty": 1.3,
        "top_k": 5,
        "max_new_tokens": NUM_NEW,
        "bad_words": [{"token_ids": [pair.suppressed_id]}],
    }
    assert [each.partition(":")[0] for each in found["unused"]] == ["top_p 0.0", "typical_p 0.9"]
    printed = CliRunner().invoke(main, given).stdout
    suppressed = f"bad_words (({pair.suppressed_id},),)"
    for shown in ("defaults", "repetition_penalty 1.3", "top_k 5", f"max_new_tokens {NUM_NEW}", suppressed):
        assert shown in printed
    sentence = "Texts are written without what the target's generation_config sets here: typical_p 0.9: not supported."
    assert sentence in " ".join(printed.split())


def test_bench_takes_them_and_says_so(pair, tmp_path):
    saved = tmp_path / "result.json"
    given = [f"--target={pair.target}", f"--draft={pair.draft}", f"--save-result={saved}", "--repetitions=1"]
    small = ["--warm-up=0", "--num-prompts=1", "--temperature=0", "-k2", "--methods=autoregressive,speculative"]
    result = CliRunner().invoke(main, ["bench", *given, *small])
    assert result.exit_code == 0, result.output
    sampling = json.loads(saved.read_text())["settings"]["sampling"]
    assert (sampling["repetition_penalty"], sampling["top_k"], sampling["max_new_tokens"]) == (1.3, 5, NUM_NEW)
    assert (sampling["top_p"], sampling["bad_words"]) == (1.0, [[pair.suppressed_id]])
