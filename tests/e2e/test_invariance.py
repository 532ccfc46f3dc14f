"""One seed, one text: nothing but seed, prefix and models decides a token.

Every test writes the same prompts with the same seeds in another way and wants the same tokens to the letter. The
models are in float64, where sums in another order (1e-15) do not change a decision. The draft is a disagreeing copy of
the target, so that rounds end everywhere: at the first proposal, in the middle, and at the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from outrider import Chunk, SamplingParams, SpeculationParams, SpeculativeClient
from outrider.sampling.rng import AddressedUniforms
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Path, Session
from tests import tiny_models
from tests.e2e.conftest import FAMILY, NEVER_WITHOUT_DRAFT
from tests.servers import DRAFT, TARGET, RunningServer, Services, eventually
from tests.unit.test_alternatives import draw_forks_with_other_numbers

PROMPT = [5, 17, 3, 88, 41, 9]
NUM_NEW = 24
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, seed=1, max_new_tokens=NUM_NEW),
    "plain": SamplingParams(temperature=1, seed=3, max_new_tokens=NUM_NEW),
    "filters": SamplingParams(
        temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, seed=(1 << 64) - 1, max_new_tokens=NUM_NEW
    ),
}


@dataclass(frozen=True)
class Pair:
    """Both services, and where their models lie."""

    target: RunningServer
    draft: RunningServer
    target_path: str
    draft_path: str

    def client(self, target: RunningServer | None = None, draft: RunningServer | None = None) -> SpeculativeClient:
        """Return a client of the pair, or of others in their places."""
        addresses = (target or self.target).address, (draft or self.draft).address
        return SpeculativeClient(*addresses, patience=NEVER_WITHOUT_DRAFT)


@pytest.fixture(scope="module")
def pair(services, tmp_path_factory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("invariance")
    target = tiny_models.make_model(FAMILY, 1)
    paths = [
        tiny_models.save(target, folder / "t"),
        tiny_models.save(tiny_models.disagreeing_copy(target, 3, noise=0.012), folder / "d"),
    ]
    servers = services.start(TARGET, paths[0]), services.start(DRAFT, paths[1])
    yield Pair(*servers, *paths)
    for server in servers:
        server.stop()


FREE = {"rule": "rejection"}  # rejection sampling, although there is a seed; shared noise has test_shared_noise


def write(client: SpeculativeClient, sampling: SamplingParams, prompt=PROMPT, **speculation: Any) -> list[int]:
    """Return the tokens of a text of which no round went without proposals."""
    result = client.generate(prompt, sampling, SpeculationParams(**(FREE | speculation)))
    assert result.stats.num_rounds_without_draft == 0
    return result.token_ids


@pytest.fixture(scope="module")
def texts(pair) -> dict[str, list[int]]:
    """The text of each sampling, written one proposal at a time with nothing else going on."""
    with pair.client() as client:
        return {
            name: write(client, sampling, num_speculative_tokens=1, overlap=False)
            for name, sampling in SAMPLINGS.items()
        }


EVERY_SAMPLING = pytest.mark.parametrize("name", SAMPLINGS)


@EVERY_SAMPLING
def test_acceptance_is_neither_rare_nor_certain(pair, name):
    with pair.client() as client:
        stats = client.generate(PROMPT, SAMPLINGS[name], num_speculative_tokens=5, **FREE).stats
    assert 0.3 < stats.acceptance_rate < 0.9
    assert stats.num_rounds < NUM_NEW


@EVERY_SAMPLING
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3, 5, 8])
def test_any_number_of_proposals(pair, texts, name, num_speculative_tokens, overlap):
    with pair.client() as client:
        speculation = {"num_speculative_tokens": num_speculative_tokens, "overlap": overlap}
        assert write(client, SAMPLINGS[name], **speculation) == texts[name]


@EVERY_SAMPLING
@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_any_window(pair, texts, name, window):
    with pair.client() as client:
        assert write(client, SAMPLINGS[name], num_speculative_tokens=4, window=window) == texts[name]


def test_any_number_of_alternatives(pair, texts, monkeypatch):
    """Prepared ends of rounds do come about here, else this shows nothing."""
    monkeypatch.setattr(Drafter, "_has_time_for_forks", lambda *_: True)
    with pair.client() as client:

        def num_used(name: str, number: int) -> int:
            speculation = SpeculationParams(num_speculative_tokens=4, num_alternatives=number, **FREE)
            result = client.generate(PROMPT, SAMPLINGS[name], speculation)
            assert result.token_ids == texts[name]
            return result.stats.num_alternatives_used

        numbers = [num_used(name, number) for name, number in itertools.product(SAMPLINGS, (0, 1, 3, 20))]
        # On a busy machine the target may be quicker each time than the draft prepares anything.
        eventually(lambda: any(numbers) or num_used("greedy", 3) > 0, "a prepared end comes about")


@EVERY_SAMPLING
def test_a_draft_that_stops_when_unsure(pair, texts, name):
    with pair.client() as client:
        assert write(client, SAMPLINGS[name], num_speculative_tokens=6, min_draft_prob=0.5) == texts[name]


@EVERY_SAMPLING
def test_proposals_judged_together_give_one_text_for_one_k(pair, texts, name):
    """Only then do rounds begin and end where they did; with one proposal a round, it is the text of all others."""
    with pair.client() as client:
        assert write(client, SAMPLINGS[name], num_speculative_tokens=1, rule="block") == texts[name]
        runs = [{"overlap": False}, {"overlap": True}, {"window": 4}, {"window": 9}]
        written = [write(client, SAMPLINGS[name], num_speculative_tokens=4, rule="block", **run) for run in runs]
    assert all(token_ids == written[0] for token_ids in written)
    assert (written[0] == texts[name]) == (name == "greedy")


def write_all(client: SpeculativeClient) -> dict[str, list[int]]:
    """Return the text of each sampling."""
    return {name: write(client, sampling, num_speculative_tokens=5) for name, sampling in SAMPLINGS.items()}


def write_among_eight(client: SpeculativeClient) -> dict[str, list[int]]:
    """Return the text of each sampling, written one after the other while eight other texts are being written."""

    def write_another(index: int) -> list[int]:
        sampling = SamplingParams(temperature=0.5 + index / 8, seed=100 + index, max_new_tokens=2 * NUM_NEW)
        prompt = [index, *PROMPT[: index % 4], *range(20, 20 + 3 * index)]
        return write(client, sampling, prompt, num_speculative_tokens=1 + index, overlap=index % 2 == 0)

    with ThreadPoolExecutor(9) as threads:
        others = [threads.submit(write_another, index) for index in range(8)]
        mine = threads.submit(write_all, client).result()
        assert [len(other.result()) for other in others] == [2 * NUM_NEW] * 8
    return mine


def test_among_eight_other_sessions(pair, texts):
    before = pair.target.stats().num_passes_by_batch_size
    with pair.client() as client:
        assert write_among_eight(client) == texts
    assert sum(pair.target.stats().num_passes_by_batch_size[1:]) > sum(before[1:]), "no pass was shared"


@EVERY_SAMPLING
def test_a_target_that_restarts_in_the_middle(services, pair, texts, name):
    target = services.start(TARGET, pair.target_path)
    with pair.client(target=target) as client:
        stream = client.stream(PROMPT, SAMPLINGS[name], num_speculative_tokens=4, **FREE)
        token_ids = take(stream, 3)
        target.stop()
        target = services.start(TARGET, pair.target_path, listen=target.address)
        token_ids += take(stream)
    target.stop()
    assert stream.result.stats.num_target_retries >= 1
    assert stream.result.stats.num_rounds_without_draft == 0
    assert token_ids == texts[name]
    assert stream.result.token_ids == texts[name]


def take(stream, number: int | None = None) -> list[int]:
    """Return the tokens of the next `number` chunks, or of all that are left."""
    token_ids: list[int] = []
    for count, chunk in enumerate(stream, 1):
        assert isinstance(chunk, Chunk)
        token_ids += chunk.token_ids
        if count == number:
            break
    return token_ids


def test_a_draft_that_restarts_in_the_middle_completes(services, pair):
    draft = services.start(DRAFT, pair.draft_path)
    with pair.client(draft=draft) as client:
        stream = client.stream(PROMPT, SAMPLINGS["plain"], num_speculative_tokens=4, **FREE)
        token_ids = take(stream, 3)
        draft.stop()
        draft = services.start(DRAFT, pair.draft_path, listen=draft.address)
        token_ids += take(stream)
    draft.stop()
    # Rounds without proposals draw other tokens: the distribution is the same, the text is not.
    assert len(token_ids) == NUM_NEW
    assert stream.result.stats.num_draft_failures >= 1


SMALL_CACHE = 80  # tokens; each text fits alone (at most 25 + 48), nine do not


def test_caches_that_are_evicted_in_the_middle(services, pair, texts):
    servers = start_both(services, pair, max_cached_tokens=SMALL_CACHE)
    with pair.client(*servers) as client:
        assert write_among_eight(client) == texts
    for server in servers:
        stats = server.stats()
        assert stats.num_evictions > 0
        assert stats.num_tokens_recomputed > 0
        server.stop()


@pytest.mark.parametrize("options", [{"max_batch_tokens": 2}, {"kv_cache": False}], ids=["tiny chunks", "no cache"])
def test_services_that_feed_tokens_in_another_way(services, pair, texts, options):
    servers = start_both(services, pair, **options)
    with pair.client(*servers) as client:
        assert write_all(client) == texts
    for server in servers:
        server.stop()


def start_both(services: Services, pair: Pair, **options: Any) -> list[RunningServer]:
    """Return another target and another draft like the pair's."""
    return [
        services.start(TARGET, pair.target_path, **options),
        services.start(DRAFT, pair.draft_path, **options),
    ]


def test_another_seed_writes_another_text(pair, texts):
    with pair.client() as client:
        assert write(client, replace(SAMPLINGS["plain"], seed=99), num_speculative_tokens=5) != texts["plain"]


def finish_forks_before_commits(monkeypatch) -> list[Path]:
    """Let no commit overtake the forks, however quick the target is; return the list of those that are gone on with."""
    commit, go_to, adopted = Drafter._commit, Session._go_to, []

    def commit_behind_forks(drafter: Drafter, session: Session, given: Commit) -> None:
        session.is_unread = lambda: False
        while session.is_open and (session.may_fork or session.wanting_forks):
            drafter._step()
        commit(drafter, session, given)

    def note_and_go_to(session: Session, path: Path) -> None:
        if path is not session.main:
            adopted.append(path)
        go_to(session, path)

    monkeypatch.setattr(Drafter, "_has_time_for_forks", lambda *_: True)
    monkeypatch.setattr(Drafter, "_most_forks", 9)  # else none while the session of the text before still closes
    monkeypatch.setattr(Drafter, "_commit", commit_behind_forks)
    monkeypatch.setattr(Session, "_go_to", note_and_go_to)
    return adopted


@pytest.mark.parametrize("is_broken", [False, True], ids=["as they are", "with other numbers"])
def test_forks_that_draw_with_other_numbers_are_noticed(pair, monkeypatch, is_broken):
    """Such a text still follows the target's distribution, but is another."""
    adopted, sampling = (
        finish_forks_before_commits(monkeypatch),
        replace(SAMPLINGS["plain"], max_new_tokens=4 * NUM_NEW),
    )
    if is_broken:
        draw_forks_with_other_numbers(monkeypatch)
    with pair.client() as client:
        expected, written = (
            write(client, sampling, num_speculative_tokens=4, num_alternatives=number) for number in (0, 9)
        )
    assert len(adopted) > 1  # the last may be behind the text's end
    assert (written != expected) == is_broken


def test_uniforms_that_are_streamed_instead_of_addressed_are_noticed(pair, monkeypatch):
    at = AddressedUniforms.at

    def next_one(self, position: int) -> float:
        self.num_drawn = getattr(self, "num_drawn", 0) + 1
        return at(self, self.num_drawn)

    monkeypatch.setattr(AddressedUniforms, "at", next_one)
    with pair.client() as client:
        written = [write(client, SAMPLINGS["plain"], num_speculative_tokens=number) for number in (1, 2, 3, 5, 8)]
    assert any(text != written[0] for text in written)
