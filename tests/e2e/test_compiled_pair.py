"""The embedded pair in float32, compiled, in processes of its own: one seed gives one text there too, to the letter.

Elsewhere that takes float64. Compiled code adds up every output in one order, whatever is beside it in a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outrider import SamplingParams, SpeculativeClient
from outrider_client.local_pair import local_pair
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT

PROMPT = "Once upon a time, there was a little girl"
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, seed=1, max_new_tokens=64, ignore_eos=True),
    "plain": SamplingParams(temperature=1, seed=2, max_new_tokens=64, ignore_eos=True),
    "filters": SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=3, max_new_tokens=64, ignore_eos=True),
}
FOUND: dict[str, dict[str, str]] = {}  # texts of the first number of threads


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def client(request) -> Iterator[SpeculativeClient]:
    with (
        local_pair("builtin:target", "builtin:draft", request.param) as pair,
        SpeculativeClient(pair.target, pair.draft, patience=NEVER_WITHOUT_DRAFT) as client,
    ):
        yield client


def write(client: SpeculativeClient, sampling: SamplingParams, **speculation) -> str:
    result = client.generate(PROMPT, sampling, rule="rejection", **speculation)
    assert result.stats.num_rounds_without_draft == 0
    return result.text


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_seeds_text_is_the_same_for_any_number_of_proposals(client, name):
    texts = {
        write(client, SAMPLINGS[name], num_speculative_tokens=length, overlap=overlap)
        for length, overlap in ((1, True), (2, False), (5, True), (9, False), (9, True))
    }
    assert len(texts) == 1


def test_texts_are_those_of_any_number_of_threads(client):
    """Every part of the test finds the texts of the first."""
    texts = {name: write(client, sampling, num_speculative_tokens=4) for name, sampling in SAMPLINGS.items()}
    assert texts == FOUND.setdefault("texts", texts)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_seeds_text_is_the_same_among_others(client, name):
    single = write(client, SAMPLINGS[name], num_speculative_tokens=4)
    with ThreadPoolExecutor(6) as pool:
        lengths = [1, 3, 4, 5, 6, 8]
        together = pool.map(lambda it: write(client, SAMPLINGS[name], num_speculative_tokens=it), lengths)
        assert set(together) == {single}


def test_seeds_differ(client):
    """Else the tests above would pass with a text that depends on nothing."""
    samplings = [SamplingParams(seed=seed, max_new_tokens=32, ignore_eos=True) for seed in range(4)]
    assert len({write(client, sampling, num_speculative_tokens=3) for sampling in samplings}) == 4
