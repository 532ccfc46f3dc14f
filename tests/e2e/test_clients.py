"""What holds of both clients, whatever the moment: how they wait, how they are closed, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from client import AsyncSpeculativeClient, Patience, SamplingParams, SpeculativeClient
from tests import tiny_models
from tests.e2e.conftest import FAMILY
from tests.servers import PATIENCE_S, TARGET, RunningServer

PROMPT = [5, 17, 3, 88, 41, 9]
CONTEXT_LENGTH = 512
ALONE = {"method": "autoregressive"}
NUM_TEXTS = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    model = tiny_models.make_model(FAMILY, 1, n_positions=CONTEXT_LENGTH)
    return tiny_models.save(model, tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def target(services, model_path) -> Iterator[RunningServer]:
    server = services.start(TARGET, model_path)
    yield server
    server.stop()


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_new_tokens=8)


@pytest.fixture(scope="module")
def full(services, model_path) -> Iterator[RunningServer]:
    server = services.start(TARGET, model_path, max_sessions=8)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def seeds_texts(target) -> list[list[int]]:
    with SpeculativeClient(target.address) as client:
        return [client.generate(PROMPT, seeded(seed), **ALONE).token_ids for seed in range(NUM_TEXTS)]


class TestFullTarget:
    """40 texts at once on a target with 8 places: those that find none come again, and all are what their seeds say."""

    PATIENCE = Patience(retry_s=PATIENCE_S, longest_backoff_s=0.05)

    def test_threads(self, full, seeds_texts):
        with SpeculativeClient(full.address, patience=self.PATIENCE) as client, ThreadPoolExecutor(NUM_TEXTS) as pool:
            results = list(pool.map(lambda seed: client.generate(PROMPT, seeded(seed), **ALONE), range(NUM_TEXTS)))
        assert [result.token_ids for result in results] == seeds_texts
        assert sum(result.stats.num_target_retries for result in results) > 0

    def test_tasks(self, services, full, seeds_texts):
        async def all_at_once():
            async with AsyncSpeculativeClient(full.address, patience=self.PATIENCE) as client:
                calls = (client.generate(PROMPT, seeded(seed), **ALONE) for seed in range(NUM_TEXTS))
                return await asyncio.gather(*calls)

        results = services.run(all_at_once())
        assert [result.token_ids for result in results] == seeds_texts
        assert sum(result.stats.num_target_retries for result in results) > 0
