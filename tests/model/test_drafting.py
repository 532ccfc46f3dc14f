"""Drafting several tokens in one compiled call gives what drafting one by one does, and is reported in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest

from outrider.engine.backends.compiled.runner import CompiledLlamaRunner
from outrider.engine.engine import Engine
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider_draft import session as session_module
from outrider_draft.drafter import Drafter
from outrider_draft.session import Drafted, DraftOptions, Session
from tests.model.against_transformers import spec_of
from tests.tiny_models import VOCAB_SIZE, make_model

PROMPTS = [[5, 80, 25, 7], [9], [3, 3, 3, 61, 8, 2, 90]]
AHEAD = 9


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def runner(request) -> CompiledLlamaRunner:
    return CompiledLlamaRunner(spec_of(make_model("llama", 1, head_dim=16).float()), request.param)


def drafted(
    runner: CompiledLlamaRunner,
    temperature: float | Sequence[DistributionParams],
    batch: int,
    vocab_sizes: Sequence[int] = (VOCAB_SIZE,) * 3,
    max_alternatives: int = 0,
    prompts: Sequence[list[int]] = PROMPTS,
) -> tuple[list[TokenLog], list[list[Drafted]]]:
    """Return the sequences of sessions that draft side by side, and what each emitted."""
    worker, emitted = Drafter(Engine(runner, 10_000, 512), 256), [[] for _ in prompts]
    sessions = []
    for index, prompt in enumerate(prompts):
        its = DistributionParams(temperature) if isinstance(temperature, float) else temperature[index]
        ids = vocab_sizes[index], VOCAB_SIZE
        options = DraftOptions(its, index, *ids, min_draft_prob=0.0, max_alternatives=max_alternatives)
        end = len(prompt)
        session = Session(options, emitted[index].append, index, end + AHEAD, end + batch + index if batch else 0)
        session.begin(prompt)
        session.gap_s = math.inf
        worker._begin(session)
        sessions.append(session)
    while worker._step():
        pass
    return [session.main.sequence.tokens for session in sessions], emitted


def ids_of(tokens: TokenLog) -> list[int]:
    return tokens[0 : len(tokens)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_drafting_one_by_one(runner, temperature, monkeypatch):
    together, _ = drafted(runner, temperature, batch=4)
    monkeypatch.setattr(Drafter, "_draft_several", lambda self, paths: False)
    one_by_one, _ = drafted(runner, temperature, batch=4)
    assert list(map(ids_of, together)) == list(map(ids_of, one_by_one))


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9}], ids=str
)
def test_filtered_tokens_are_those_of_drafting_one_by_one(runner, filters, monkeypatch):
    """In one call, too: one session is filtered, the others are not, and one has a smaller vocabulary."""
    arguments = runner, [DistributionParams(1.0), DistributionParams(0.8, **filters), DistributionParams(0.0)], 4
    vocab_sizes = [VOCAB_SIZE, 60, VOCAB_SIZE]
    calls, draft = [], CompiledLlamaRunner.draft
    monkeypatch.setattr(CompiledLlamaRunner, "draft", lambda *args: calls.append(args) or draft(*args))
    together, _ = drafted(*arguments, vocab_sizes)
    assert max(len(feeds) for _, feeds, _ in calls) == 3
    monkeypatch.setattr(Drafter, "_draft_several", lambda self, paths: False)
    assert list(map(ids_of, together)) == list(map(ids_of, drafted(*arguments, vocab_sizes)[0]))
    plain, _ = drafted(
        runner, [DistributionParams(1.0), DistributionParams(0.8), DistributionParams(0.0)], 4, vocab_sizes
    )
    assert list(map(ids_of, together)) != list(map(ids_of, plain))


@pytest.mark.parametrize("num_sessions", [1, 16, 17, 40])
def test_tokens_are_those_of_drafting_one_by_one_for_any_number_of_sessions(runner, num_sessions, monkeypatch):
    random = Random(num_sessions)
    prompts = [random.choices(range(VOCAB_SIZE), k=random.randint(1, 9)) for _ in range(num_sessions)]
    options = {"batch": 4, "vocab_sizes": [VOCAB_SIZE] * num_sessions, "prompts": prompts}
    together, _ = drafted(runner, 1.0, **options)
    monkeypatch.setattr(Drafter, "_draft_several", lambda self, paths: False)
    one_by_one, _ = drafted(runner, 1.0, **options)
    assert list(map(ids_of, together)) == list(map(ids_of, one_by_one))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_target_does_not_have_are_not_drawn(runner, temperature, monkeypatch):
    """A draft's vocabulary may be padded further than its target's; each session says what its target has."""
    vocab_sizes = [VOCAB_SIZE, 50, 60]
    limited, _ = drafted(runner, temperature, 4, vocab_sizes)
    new = [ids_of(tokens)[len(prompt) :] for prompt, tokens in zip(PROMPTS, limited, strict=True)]
    assert all(max(ids) < size for ids, size in zip(new, vocab_sizes, strict=True))
    assert list(map(ids_of, limited)) != list(map(ids_of, drafted(runner, temperature, 4)[0]))
    monkeypatch.setattr(Drafter, "_draft_several", lambda self, paths: False)
    assert list(map(ids_of, limited)) == list(map(ids_of, drafted(runner, temperature, 4, vocab_sizes)[0]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forks_draft_what_they_draft_one_by_one_and_leave_the_main_path_as_it_is(runner, temperature, monkeypatch):
    def described(batches: list[list[Drafted]]) -> list[list]:
        return [
            [(it.position, it.token_id, [draft.token_id for draft in it.drafts]) for it in message.alternatives]
            for messages in batches
            for message in messages
            if message.alternatives
        ]

    monkeypatch.setattr(Drafter, "_most_forks", 3)
    plain, _ = drafted(runner, temperature, 4)
    together, emitted = drafted(runner, temperature, 4, max_alternatives=3)
    assert list(map(ids_of, together)) == list(map(ids_of, plain))
    assert [len(alternatives) for alternatives in described(emitted)] == [3] * len(PROMPTS)
    monkeypatch.setattr(Drafter, "_draft_several", lambda self, paths: False)
    assert described(drafted(runner, temperature, 4, max_alternatives=3)[1]) == described(emitted)


def test_it_does_draft_several(runner, monkeypatch):
    """Else the tests here compare one thing with itself."""
    calls = []
    draft = CompiledLlamaRunner.draft
    monkeypatch.setattr(CompiledLlamaRunner, "draft", lambda *args: calls.append(args) or draft(*args))
    drafted(runner, 1.0, batch=4)
    assert calls


@pytest.mark.parametrize("hold_s", [-1.0, 10.0], ids=["sent at once", "held"])
@pytest.mark.parametrize("batch", [0, 2, 4])
def test_what_is_told_of_the_cache_is_true_whenever_drafts_are_sent(runner, monkeypatch, hold_s, batch):
    monkeypatch.setattr(session_module, "LONGEST_HOLD_S", hold_s)
    sequences, emitted = drafted(runner, 1.0, batch)
    for prompt, tokens, messages in zip(PROMPTS, sequences, emitted, strict=True):
        position = len(prompt)
        for message in messages:
            assert message.start_position == position
            position += len(message.drafts)
            assert message.num_cached_tokens <= position
            assert message.cache_digest == tokens.digest(message.num_cached_tokens)
        sent = [draft.token_id for message in messages for draft in message.drafts]
        assert [*prompt, *sent] == ids_of(tokens)
        assert len(sent) == AHEAD
