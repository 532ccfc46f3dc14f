"""Noise that draft and target share: a seed's text is the target's own, with the draft on, off, replaced or killed.

As in test_invariance, models are in float64 and texts are compared to the letter; the draft is a disagreeing copy of
the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

import outrider_draft.session
import outrider_target.scheduler
from outrider import Patience, SamplingParams, SpeculationParams, SpeculativeClient
from outrider.sampling.rng import Noise, SharedNoise
from outrider_client.results import GenerationResult
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, RunningServer, Services

PROMPT = [5, 17, 3, 88, 41, 9]
NUM_NEW = 24
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, seed=1, max_new_tokens=NUM_NEW),
    "plain": SamplingParams(temperature=1, seed=3, max_new_tokens=NUM_NEW),
    "filters": SamplingParams(
        temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, seed=(1 << 64) - 1, max_new_tokens=NUM_NEW
    ),
}
EVERY_SAMPLING = pytest.mark.parametrize("name", SAMPLINGS)


@dataclass(frozen=True)
class Trio:
    """A target, its draft, and another draft that knows nothing of it."""

    services: Services
    target: RunningServer
    draft: RunningServer
    another_draft: RunningServer
    draft_path: str
    another_draft_path: str

    def client(self, draft: RunningServer | None = None, patience: Patience = NEVER_WITHOUT_DRAFT) -> SpeculativeClient:
        return SpeculativeClient(self.target.address, (draft or self.draft).address, patience=patience)


@pytest.fixture(scope="module")
def trio(services, tmp_path_factory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("shared_noise")
    target = tiny_models.make_model(FAMILY, 1)
    paths = [
        tiny_models.save(target, folder / "t"),
        tiny_models.save(tiny_models.disagreeing_copy(target, 3, noise=0.012), folder / "d"),
        tiny_models.save(tiny_models.make_model(FAMILY, 2), folder / "a"),
    ]
    servers = [services.start(kind, path) for kind, path in zip((TARGET, DRAFT, DRAFT), paths, strict=True)]
    yield Trio(services, *servers, *paths[1:])
    for server in servers:
        server.stop()


def write(client: SpeculativeClient, name: str, **speculation) -> GenerationResult:
    """Return a text by the rule that a seed has by default."""
    return client.generate(PROMPT, SAMPLINGS[name], SpeculationParams(**speculation))


@pytest.fixture(scope="module")
def texts(trio) -> dict[str, list[int]]:
    """The text of each sampling by the target only, from a client that knows of no draft."""
    with SpeculativeClient(trio.target.address) as client:
        return {name: write(client, name, method="autoregressive").token_ids for name in SAMPLINGS}


@EVERY_SAMPLING
@pytest.mark.parametrize("num_speculative_tokens", [0, 1, 2, 3, 5, 8])
def test_any_number_of_proposals(trio, texts, name, num_speculative_tokens):
    with trio.client() as client:
        for overlap in (True, False):
            result = write(client, name, num_speculative_tokens=num_speculative_tokens, overlap=overlap)
            assert result.token_ids == texts[name]
            assert result.stats.num_rounds_without_draft == 0


@EVERY_SAMPLING
@pytest.mark.parametrize(
    "drafting",
    [{"window": 2}, {"window": 100}, {"min_draft_prob": 0.5}, {"greedy_draft": True}, {"max_support": 2}],
    ids=str,
)
def test_any_way_to_draft(trio, texts, name, drafting):
    with trio.client() as client:
        assert write(client, name, **drafting).token_ids == texts[name]


@EVERY_SAMPLING
def test_another_draft(trio, texts, name):
    with trio.client(trio.another_draft) as client:
        result = write(client, name, num_speculative_tokens=1)
    assert result.token_ids == texts[name]
    with trio.client() as client:
        assert write(client, name, num_speculative_tokens=1).stats.acceptance_rate > result.stats.acceptance_rate + 0.2


@EVERY_SAMPLING
def test_a_draft_that_is_killed_in_the_middle(trio, texts, name):
    """And comes back as another one, at the same address."""
    draft = trio.services.start(DRAFT, trio.draft_path)
    with trio.client(draft, Patience(draft_wait_s=0.2, describe_draft_s=0.2)) as client:
        stream = client.stream(PROMPT, SAMPLINGS[name], num_speculative_tokens=2)
        token_ids = next(stream).token_ids
        draft.stop()
        for chunk in (next(stream) for _ in range(3)):
            token_ids += chunk.token_ids
        draft = trio.services.start(DRAFT, trio.another_draft_path, listen=draft.address)
        for chunk in stream:
            token_ids += chunk.token_ids
    draft.stop()
    assert token_ids == stream.result.token_ids == texts[name]
    assert stream.result.stats.num_draft_failures >= 1
    assert stream.result.stats.num_rounds_without_draft >= 1


def test_shared_noise_is_the_default_of_a_seed(trio, texts):
    with trio.client() as client:
        assert write(client, "plain", rule="shared_noise").token_ids == texts["plain"]
        assert write(client, "plain", rule="rejection").token_ids != texts["plain"]


def test_another_seed_writes_another_text(trio, texts):
    with trio.client() as client:
        sampling = replace(SAMPLINGS["plain"], seed=99)
        assert client.generate(PROMPT, sampling).token_ids != texts["plain"]


def test_rounds_carry_fewer_bytes(trio):
    """Supports are the greater part of a round: ids and weights from the draft, ids to the target, and its answer."""
    with trio.client() as client:
        shared = write(client, "plain").stats
        free = client.generate(PROMPT, SAMPLINGS["plain"], rule="rejection").stats
    num_bytes = [stats.num_bytes_sent + stats.num_bytes_received for stats in (shared, free)]
    assert num_bytes[0] < num_bytes[1] / 4


# Broken rules.


def test_a_draft_with_other_noise_lowers_acceptance_and_leaves_the_text(trio, texts, monkeypatch):
    class OtherNoise(SharedNoise):
        def __init__(self, seed: int):
            super().__init__(seed ^ 1)

    with trio.client() as client:
        shared = write(client, "plain")
        monkeypatch.setattr(outrider_draft.session, "SharedNoise", OtherNoise)
        other = write(client, "plain")
    assert shared.token_ids == other.token_ids == texts["plain"]
    assert other.stats.acceptance_rate < shared.stats.acceptance_rate / 2


def test_noise_that_is_streamed_instead_of_addressed_is_noticed(trio, monkeypatch):
    class Streamed(SharedNoise):
        num_drawn = 0

        def at(self, position: int) -> Noise:
            self.num_drawn += 1
            return super().at(self.num_drawn)

    monkeypatch.setattr(outrider_target.scheduler, "SharedNoise", Streamed)
    with trio.client() as client:
        written = {tuple(write(client, "plain", num_speculative_tokens=number).token_ids) for number in (0, 1, 3, 8)}
    assert len(written) > 1
