"""At temperature 0 the whole stack writes what transformers' own `generate` writes, token for token, in every family.

In float64. The draft is a disagreeing copy of the target, so that some proposals are kept and some are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from outrider import SamplingParams, SpeculativeClient
from tests import tiny_models
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET

PROMPT = [5, 17, 3, 88, 41, 9]
NUM_NEW = 32
METHODS = {
    "speculative": {"num_speculative_tokens": 4},
    "autoregressive": {"method": "autoregressive"},
}
EVERY_METHOD = pytest.mark.parametrize("speculation", METHODS.values(), ids=METHODS)


@dataclass(frozen=True)
class Case:
    """One family behind services, and what transformers writes with the same target."""

    client: SpeculativeClient
    whole_text: list[int]  # without an end-of-sequence id
    text_with_end: list[int]  # with the one that the services know
    eos_token_id: int


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def case(request, services, tmp_path_factory) -> Iterator[Case]:
    folder, target = tmp_path_factory.mktemp(request.param), tiny_models.make_model(request.param, 1)
    whole_text = written_by_transformers(target)
    eos_token_id = target.generation_config.eos_token_id = token_to_end_with(whole_text)
    draft = tiny_models.disagreeing_copy(target, 2)
    servers = [
        services.start(TARGET, tiny_models.save(target, folder / "t")),
        services.start(DRAFT, tiny_models.save(draft, folder / "d")),
    ]
    with SpeculativeClient(*(server.address for server in servers), patience=NEVER_WITHOUT_DRAFT) as client:
        yield Case(client, whole_text, written_by_transformers(target), eos_token_id)
    for server in servers:
        server.stop()


def written_by_transformers(model) -> list[int]:
    prompt = torch.tensor([PROMPT])
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, len(PROMPT) :].tolist()


def token_to_end_with(text: list[int]) -> int:
    """Return the token that comes for the first time latest, though not in the last quarter."""
    return max(set(text[: NUM_NEW * 3 // 4]), key=text.index)


@EVERY_METHOD
def test_a_greedy_text_is_that_of_transformers(case, speculation):
    sampling = SamplingParams(temperature=0, max_new_tokens=NUM_NEW, ignore_eos=True)
    result = case.client.generate(PROMPT, sampling, **speculation)
    assert result.token_ids == case.whole_text
    assert result.finish_reason == "length"
    if "method" not in speculation:
        assert 0 < result.stats.num_accepted_tokens < result.stats.num_draft_tokens


@EVERY_METHOD
def test_a_greedy_text_ends_where_transformers_ends_it(case, speculation):
    result = case.client.generate(PROMPT, SamplingParams(temperature=0, max_new_tokens=NUM_NEW), **speculation)
    assert result.token_ids == case.text_with_end
    assert result.token_ids[-1] == case.eos_token_id
    assert 1 < len(result.token_ids) < NUM_NEW
    assert result.finish_reason == "stop"


def test_one_seed_writes_one_text_with_any_number_of_proposals(case):
    sampling = SamplingParams(temperature=0.9, seed=7, max_new_tokens=NUM_NEW, ignore_eos=True)

    def write(**speculation) -> list[int]:
        return case.client.generate(PROMPT, sampling, **speculation).token_ids

    one, four = (write(num_speculative_tokens=number, rule="rejection") for number in (1, 4))
    assert one == four
    assert write(num_speculative_tokens=4) == write(method="autoregressive")
