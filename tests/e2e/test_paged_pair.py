"""Both services on paged caches write what they write on plain ones, with many sessions and blocks that run out.

In float64 on a CPU, where a reference stands for the kernels of a GPU; all else is the code that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outrider import SamplingParams, SpeculativeClient
from outrider.engine.backends.paged.runner import PagedRunner
from outrider_draft.drafter import Drafter
from tests import tiny_models
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, RunningServer

PROMPTS = [[5, 17, 3, 88, 41, 9][:length] for length in (1, 3, 4, 6)]
NUM_NEW = 40


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    folder, target = tmp_path_factory.mktemp("llama"), tiny_models.make_model("llama", 1)
    draft = tiny_models.disagreeing_copy(target, 2)
    return tiny_models.save(target, folder / "t"), tiny_models.save(draft, folder / "d")


@pytest.fixture
def start(services, paths) -> Iterator:
    servers: list[RunningServer] = []

    def start_pair(**options) -> SpeculativeClient:
        servers.extend(services.start(kind, path, **options) for kind, path in zip((TARGET, DRAFT), paths, strict=True))
        target, draft = servers[-2:]
        return SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT)

    start_pair.servers = servers  # type: ignore[attr-defined]
    yield start_pair
    for server in servers:
        server.stop()


def texts(client: SpeculativeClient, temperature: float) -> list[list[int]]:
    """Return what is written after each prompt, all at once."""

    def write(index: int) -> list[int]:
        sampling = SamplingParams(temperature=temperature, seed=index, max_new_tokens=NUM_NEW, ignore_eos=True)
        return client.generate(PROMPTS[index], sampling, num_speculative_tokens=4, rule="rejection").token_ids

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(write, range(len(PROMPTS))))


@pytest.mark.parametrize("num_forks", [0, 3], ids=["no_forks", "forks"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "no_graphs"])
def test_texts_are_those_of_plain_caches(start, cuda_graphs, num_forks, monkeypatch):
    """130 tokens are 9 blocks of 16, where four texts need 12: caches are evicted without notice.

    On a GPU several sessions would have forks, whose caches are the first to go.
    """
    monkeypatch.setattr(Drafter, "_most_forks", num_forks)
    monkeypatch.setattr(Drafter, "_has_time_for_forks", lambda *_: True)
    with start() as plain, start(paged=True, cuda_graphs=cuda_graphs, max_cached_tokens=130) as paged:
        for temperature in (0.0, 0.9):
            assert texts(paged, temperature) == texts(plain, temperature)
    _, _, target, draft = start.servers
    for server in (target, draft):
        runner = server._servicer._host._engine.runner
        assert isinstance(runner, PagedRunner)
        assert bool(runner._graphs) == cuda_graphs
        server.wait_until_idle()
        assert runner._pool.num_free == runner._pool.num_blocks
        assert server.stats().num_evictions > 0
