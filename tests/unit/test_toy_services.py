"""The toys of toy_services answer as the services' own drafter and scheduler do, so that what is shown with them holds.

Drafter and scheduler run on their own threads over an engine whose runner reads logits from the toys' tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from random import Random

import numpy as np
import pytest
import torch

from outrider.engine.backends.batch import Feed
from outrider.engine.engine import Engine
from outrider.engine.kv_cache import SequenceCache
from outrider.protocol import wire
from outrider.protocol.errors import InternalError
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.messages import params_to_proto
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_draft import session as session_module
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Drafted, DraftOptions
from outrider_target.scheduler import Round, Scheduler, Span
from tests import toy_services as toys

SEED = 77
NUM_STEPS = 40


class TableRunner:
    """Stands for ModelRunner: its cache entries are the tokens, its rows those of a toy model."""

    device = torch.device("cpu")

    def __init__(self, logits) -> None:
        self._logits = torch.from_numpy(logits)

    def new_cache(self) -> SequenceCache:
        return SequenceCache()

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        rows = []
        for feed in feeds:
            new = torch.tensor(feed.token_ids, dtype=torch.float64).reshape(1, -1, 1)
            log = TokenLog([int(token_id) for token_id in feed.cache.write(0, new, new)[0].flatten()])
            feed.cache.advance(len(feed.token_ids))
            ends = range(len(log) - feed.num_rows + 1, len(log) + 1)
            rows += [self._logits[log.digest(end) % toys.NUM_PREFIX_CLASSES] for end in ends]
        return torch.stack(rows) if rows else torch.empty(0, toys.VOCAB_SIZE)


@contextmanager
def running(worker_class, logits) -> Iterator:
    worker = worker_class(Engine(TableRunner(logits), 10_000, 16), toys.CONTEXT_LENGTH)
    worker.thread.start()
    try:
        yield worker
    finally:
        worker.thread.stop()


def span_of(tokens: TokenLog, start: int) -> common_pb2.TokenSpan:
    return common_pb2.TokenSpan(
        start_position=start, token_ids=wire.pack_ids(tokens[start:]), prefix_digest=tokens.digest(start)
    )


def until_quiet(toy: toys.ToyDraft) -> Iterator[draft_pb2.ProposeResponse]:
    while toy.wants_token:
        yield toy.draft()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_draft_prob", [0.0, 0.4])
@pytest.mark.parametrize("shares_noise", [False, True])
def test_the_toy_draft_is_the_drafter(seed, min_draft_prob, shares_noise):
    """Commits agree with the drafts, contradict them, fall short of them and go beyond them, in a random order.

    Some begin another branch.
    """
    random, emitted = Random(seed), []
    committed = TokenLog(toys.PROMPT_IDS)
    branch = seed
    options = DraftOptions(DistributionParams(), SEED, toys.VOCAB_SIZE, 5, min_draft_prob, branch, shares_noise)
    toy = toys.ToyDraft(
        draft_pb2.ProposeRequest(
            open=draft_pb2.OpenProposals(
                sampling=params_to_proto(DistributionParams(), shares_noise),
                seed=SEED,
                committed=span_of(committed, 0),
                window=8,
                max_support=5,
                min_draft_prob=min_draft_prob,
                branch=branch,
            )
        )
    )
    with running(Drafter, toys.DRAFT_LOGITS) as drafter:
        session = drafter.open(options, committed[:], 8, 0, emitted.append)
        for commit_index in range(1, NUM_STEPS):
            while drafter.thread.ask(lambda: session.wants_token).result(timeout=10):
                pass
            drafts = list(until_quiet(toy))
            assert [message_of(item) for item in emitted] == drafts
            emitted.clear()
            start = len(committed)
            agreeing = [message.proposals[0].token_id for message in drafts if message.start_position >= start]
            num_agreeing = random.randint(0, len(agreeing))
            committed.extend(
                [*agreeing[:num_agreeing], *random.choices(range(toys.VOCAB_SIZE), k=random.randint(0, 2))]
            )
            window = len(committed) + random.randint(0, 6)
            branch = random.choice([branch, len(committed)])
            commit = draft_pb2.Commit(
                commit_index=commit_index, span=span_of(committed, start), window=window, branch=branch
            )
            drafter.commit(session, commit_of(commit_index, committed, start, window, branch=branch))
            toy.commit(draft_pb2.ProposeRequest(commit=commit))


def commit_of(
    index: int, committed: TokenLog, start: int, window: int, batch_until: int = 0, branch: int = 0
) -> Commit:
    return Commit(index, start, committed[start:], committed.digest(start), window, batch_until, branch)


def message_of(item: Drafted) -> draft_pb2.ProposeResponse:
    return draft_pb2.ProposeResponse(
        commit_index=item.commit_index,
        start_position=item.start_position,
        proposals=[
            draft_pb2.Proposal(
                token_id=draft.token_id,
                support_gaps=wire.support_gaps(draft.support_ids),
                support_weights=draft.weights.tolist(),
            )
            for draft in item.drafts
        ],
        stopped=item.stopped,
        cache=common_pb2.CacheState(num_cached_tokens=item.num_cached_tokens, digest=item.cache_digest),
    )


PROMPT = (5, 6)
OPTIONS = DraftOptions(DistributionParams(), SEED, toys.VOCAB_SIZE, 5, 0.0)


def drafted_alone(num_tokens: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """Return what is drafted behind a prompt when nothing is committed."""
    emitted: SimpleQueue = SimpleQueue()
    with running(Drafter, toys.DRAFT_LOGITS) as drafter:
        drafter.open(OPTIONS, prompt, len(prompt) + num_tokens, 0, emitted.put)
        return [emitted.get(timeout=10).drafts[0].token_id for _ in range(num_tokens)]


@pytest.mark.parametrize(
    ("batch_until", "sizes"),
    [(0, [1] * 6), (3, [1, 5]), (6, [4, 2]), (8, [6]), (20, [6])],
)
def test_proposals_that_are_wanted_together_come_together(monkeypatch, batch_until, sizes):
    monkeypatch.setattr(session_module, "LONGEST_HOLD_S", 60.0)
    emitted: SimpleQueue = SimpleQueue()
    with running(Drafter, toys.DRAFT_LOGITS) as drafter:
        drafter.open(OPTIONS, PROMPT, 8, batch_until, emitted.put)
        items = [emitted.get(timeout=10) for _ in sizes]
    assert [len(item.drafts) for item in items] == sizes
    assert [item.start_position for item in items] == [2 + sum(sizes[:index]) for index in range(len(sizes))]
    assert [draft.token_id for item in items for draft in item.drafts] == drafted_alone(6)


def test_a_proposal_waits_for_others_only_so_long(monkeypatch):
    monkeypatch.setattr(session_module, "LONGEST_HOLD_S", 0.0)
    emitted: SimpleQueue = SimpleQueue()
    with running(Drafter, toys.DRAFT_LOGITS) as drafter:
        drafter.open(OPTIONS, PROMPT, 8, 8, emitted.put)
        assert [len(emitted.get(timeout=10).drafts) for _ in range(6)] == [1] * 6


@pytest.mark.parametrize("agrees", [True, False])
def test_a_commit_among_proposals_that_wait_sends_only_what_agrees_with_it(monkeypatch, agrees):
    """The commit decides the first of those that wait; only if it agrees may the others still be sent."""
    monkeypatch.setattr(session_module, "LONGEST_HOLD_S", 60.0)
    [drafted], start = drafted_alone(1), len(PROMPT)
    committed = TokenLog([*PROMPT, drafted if agrees else (drafted + 1) % toys.VOCAB_SIZE])
    emitted: SimpleQueue = SimpleQueue()

    def commit_when_some_wait() -> bool:
        some_wait = len(session.main.held) >= 2
        if some_wait:
            drafter.commit(session, commit_of(1, committed, start, start + 12, start + 12))
        return some_wait

    with running(Drafter, toys.DRAFT_LOGITS) as drafter:
        session = drafter.open(OPTIONS, PROMPT, toys.CONTEXT_LENGTH, toys.CONTEXT_LENGTH, emitted.put)
        while not drafter.thread.ask(commit_when_some_wait).result(timeout=10):
            pass
        item = emitted.get(timeout=10)
    assert emitted.empty()
    assert (item.commit_index, item.start_position) == (1, start + 1)
    drafts = [draft.token_id for draft in item.drafts]
    assert len(drafts) >= 1
    assert drafts == drafted_alone(len(drafts), tuple(committed[:]))


def test_a_row_that_is_none_ends_its_own_session_and_the_drafter_goes_on():
    """The table is healthy but for the prompt's own row; another prompt is drafted for before, with it and after."""
    logits = toys.DRAFT_LOGITS.copy()
    logits[TokenLog(toys.PROMPT_IDS).digest(len(toys.PROMPT_IDS)) % toys.NUM_PREFIX_CLASSES] = np.nan
    options = DraftOptions(DistributionParams(), SEED, toys.VOCAB_SIZE, 5, 0.0)
    with running(Drafter, logits) as drafter:
        for prompts in ([toys.PROMPT_IDS], [(5, 6), toys.PROMPT_IDS], [(5, 6)]):
            emitted: dict[tuple[int, ...], SimpleQueue] = {prompt: SimpleQueue() for prompt in prompts}
            for prompt in prompts:
                drafter.open(options, prompt, 8, 0, emitted[prompt].put)
            for prompt, items in emitted.items():
                if prompt == toys.PROMPT_IDS:
                    assert isinstance(items.get(timeout=10), InternalError)
                else:
                    assert [items.get(timeout=10).start_position for _ in range(6)] == list(range(2, 8))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shares_noise", [False, True])
def test_the_toy_target_is_the_scheduler(seed, shares_noise):
    """Rounds of 0 to 5 proposals, of which any number is then committed."""
    random, tokens = Random(seed), TokenLog(toys.PROMPT_IDS)
    toy = toys.ToyTarget(
        target_pb2.VerifyRequest(
            open=target_pb2.OpenVerification(
                sampling=params_to_proto(DistributionParams(), shares_noise), seed=SEED, committed=span_of(tokens, 0)
            )
        )
    )
    with running(Scheduler, toys.TARGET_LOGITS) as scheduler:
        session = scheduler.open(DistributionParams(), SEED, Span(0, tokens[:], 0), shares_noise)
        num_sent = len(tokens)
        for index in range(NUM_STEPS):
            proposed_ids = random.choices(range(toys.VOCAB_SIZE), k=random.randint(0, 5))
            num_support = 0 if shares_noise else 4
            supports = [sorted(random.sample(range(toys.VOCAB_SIZE), num_support)) for _ in proposed_ids]
            work = Round(
                Span(num_sent, tokens[num_sent:], tokens.digest(num_sent)),
                proposed_ids,
                [np.array(it, dtype=np.int64) for it in supports],
            )
            answers: SimpleQueue = SimpleQueue()
            scheduler.submit(session, work, answers.put)
            verdict = answers.get(timeout=10)
            answer = toy.answer(round_of(index, span_of(tokens, num_sent), proposed_ids, supports))
            assert [wire.prob_units(probs) for probs in verdict.rows.support_probs] == [
                row.support_units for row in answer.rows
            ]
            assert verdict.rows.outside_masses == pytest.approx([row.outside_mass for row in answer.rows], rel=2**-24)
            assert verdict.rows.outside_token_ids == [row.outside_token_id for row in answer.rows]
            expected_probs = [row.outside_token_prob for row in answer.rows]
            assert verdict.rows.outside_token_probs == pytest.approx(expected_probs, rel=2**-22)
            assert (verdict.num_cached_tokens, verdict.cache_digest) == (
                answer.cache.num_cached_tokens,
                answer.cache.digest,
            )
            num_sent = len(tokens)
            tokens.extend([*proposed_ids[: random.randint(0, len(proposed_ids))], random.randrange(toys.VOCAB_SIZE)])


def round_of(index, committed, proposed_ids, supports) -> target_pb2.VerifyRequest:
    proposals = [
        target_pb2.ProposedToken(token_id=token_id, support_gaps=wire.support_gaps(np.array(support, dtype=np.int64)))
        for token_id, support in zip(proposed_ids, supports, strict=True)
    ]
    return target_pb2.VerifyRequest(round=target_pb2.Round(round_index=index, committed=committed, proposals=proposals))
