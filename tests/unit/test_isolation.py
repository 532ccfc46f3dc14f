"""Whatever raises in work that sessions share fails its owner alone; the others have what they have without him.

Drafter and scheduler run here step by step, over engines whose runner reads the toys' tables and can be spoiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.engine.backends.batch import Feed
from outrider.engine.engine import Demand, Engine
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.isolation import in_halves
from outrider.engine.kv_cache import SequenceCache
from outrider.protocol.errors import InternalError, ServiceError
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import Draft, Draws
from outrider_draft import drafter as drafter_module
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Drafted, DraftOptions, Path
from outrider_draft.session import Session as DraftSession
from outrider_target import scheduler as scheduler_module
from outrider_target.scheduler import Round, Scheduler, Span, Verdict
from tests import toy_services as toys
from tests.rows import draft_tokens
from tests.unit.test_toy_services import TableRunner

POISON = 8  # a token that spoils every pass it is fed in
PROMPTS = [[5, 6], [1], [2, 2, 3], [7, 0, 1, 4], [3]]
AHEAD = 6
PLAIN = DistributionParams()


class SpoiledRunner(TableRunner):
    """Raises where the poison is fed, after caches have grown, as a runner should not."""

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        rows = super().forward(feeds)
        if any(POISON in feed.token_ids for feed in feeds):
            raise IndexError("spoiled")
        return rows


class SpoiledDraftingRunner(SpoiledRunner):
    """Draws several tokens in one go; raises for the temperature of a culprit, too."""

    culprit = -1.0

    def can_draft(self, sizes: Sequence[int], sampling: Draws) -> bool:
        return True

    def prepare_drafting(self) -> None:
        pass

    def draft(self, feeds: Sequence[Feed], sampling: Draws) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        columns = (sampling.temperatures, sampling.top_ks, sampling.top_ps, sampling.min_ps)
        all_params = [DistributionParams(*(it.item() for it in its)) for its in zip(*columns, strict=True)]
        for index, uniforms in enumerate(sampling.uniforms):
            if index:
                new = [draft.token_id for draft in drafts[-len(feeds) :] if draft]
                feeds = [Feed(feed.cache, [its], 1) for feed, its in zip(feeds, new, strict=True)]
            rows = TableRunner.forward(self, feeds).clone()
            rows[:, POISON] = -torch.inf
            drafts += draft_tokens(rows, all_params, sampling.max_supports.tolist(), uniforms.tolist())
        if self.culprit in sampling.temperatures.tolist() or any(POISON in feed.token_ids for feed in feeds):
            raise IndexError("spoiled")
        return drafts


def settle(worker: Drafter | Scheduler) -> None:
    """Run what was posted, and steps until there is nothing left to do."""
    for _ in range(1000):
        if not worker.thread._take_turn():
            return
    raise AssertionError("it never ends")


class Target:
    """Sessions of a scheduler, and what each was answered."""

    def __init__(self, runner: TableRunner | None = None):
        self.engine = Engine(runner or SpoiledRunner(toys.TARGET_LOGITS), 10_000, 16)
        self.scheduler = Scheduler(self.engine, toys.CONTEXT_LENGTH)
        self.answers: list[list[Verdict | ServiceError]] = []

    def ask(
        self, prompts: Sequence[list[int]], all_params: Sequence[DistributionParams] = ()
    ) -> list[Verdict | ServiceError]:
        """Open a session for each prompt, have one round of each verified together, and close all."""
        sessions = []
        for index, prompt in enumerate(prompts):
            params = all_params[index] if all_params else PLAIN
            sessions.append(self.scheduler.open(params, index, Span(0, prompt, 0)))
            self.submit(sessions[-1], prompt)
        settle(self.scheduler)
        for session in sessions:
            self.scheduler.close(session)
        settle(self.scheduler)
        assert not self.engine._sequences
        return [answers.pop() for answers in self.answers[-len(prompts) :]]

    def submit(self, session, prompt: list[int], emit: Callable | None = None) -> None:
        self.answers.append([])
        work = Round(Span(0, prompt, 0), [1, 2], [torch.arange(2).numpy()] * 2)
        self.scheduler.submit(session, work, emit or self.answers[-1].append)


class DraftService:
    """Sessions of a drafter, and what each was sent."""

    def __init__(self, runner: TableRunner | None = None):
        self.engine = Engine(runner or SpoiledRunner(toys.DRAFT_LOGITS), 10_000, 16)
        self.drafter = Drafter(self.engine, toys.CONTEXT_LENGTH)

    def open(
        self, prompt: list[int], emit, params: DistributionParams = PLAIN, seed: int = 0, **options
    ) -> DraftSession:
        # The poison is never proposed.
        draft_options = DraftOptions(params, seed, POISON, 5, options.pop("min_draft_prob", 0.0))
        return self.drafter.open(draft_options, prompt, len(prompt) + AHEAD, options.get("batch_until", 0), emit)

    def draft(self, prompts: Sequence[list[int]], all_params: Sequence[DistributionParams] = (), **options) -> list:
        """Return for each prompt the tokens that are drafted behind it, or what went wrong."""
        items: list[list[Drafted | ServiceError]] = [[] for _ in prompts]
        sessions = [
            self.open(prompt, items[index].append, all_params[index] if all_params else PLAIN, index, **options)
            for index, prompt in enumerate(prompts)
        ]
        settle(self.drafter)
        for session in sessions:
            self.drafter.close(session)
        settle(self.drafter)
        assert not self.engine._sequences
        return [outcome_of(its) for its in items]


def outcome_of(items: list[Drafted | ServiceError]) -> list[int] | ServiceError:
    errors = [item for item in items if isinstance(item, ServiceError)]
    return errors[0] if errors else [draft.token_id for it in items for draft in it.drafts]  # type: ignore[union-attr]


def described(verdict: Verdict | ServiceError) -> tuple:
    assert isinstance(verdict, Verdict), verdict
    rows = verdict.rows
    return ([probs.tolist() for probs in rows.support_probs], rows.outside_masses, rows.outside_token_ids)


@given(culprits=st.sets(st.integers(0, 12)), number=st.integers(0, 13))
def test_the_culprits_are_blamed_and_the_others_done_in_order(culprits, number):
    num_tries, blamed = 0, []

    def do(items: Sequence[int]) -> list[int]:
        nonlocal num_tries
        num_tries += 1
        if culprits & set(items):
            raise ValueError("spoiled")
        return list(items)

    parts = in_halves(do, range(number), lambda item, error: blamed.append(item))
    assert [item for part in parts for item in part] == [item for item in range(number) if item not in culprits]
    assert blamed == sorted(culprits & set(range(number)))
    assert num_tries <= max(0, 2 * number - 1)
    assert num_tries == (1 if number else 0) or culprits & set(range(number))


def test_who_fails_only_together_with_others_is_not_blamed():
    def do(items: Sequence[int]) -> list[int]:
        if len(items) > 2:
            raise MemoryError
        return list(items)

    assert in_halves(do, range(5), lambda item, error: pytest.fail("nobody is to blame")) == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize("where", ["runner", "then"])
def test_a_pass_that_raises_leaves_caches_and_demands_as_they_were(where):
    engine = Engine(SpoiledRunner(toys.TARGET_LOGITS), 10_000, 4)
    sequences = [EngineSequence(TokenLog(ids)) for ids in ([1, 2, 3, POISON], [5, 6, 7])]
    demands = []
    for sequence in sequences:
        engine.add(sequence)
        demands.append(Demand(sequence, len(sequence.tokens), len(sequence.tokens), 0))
    engine.run_pass(demands)
    before = [sequence.cache.length for sequence in sequences]
    num_parts = [len(demand.rows) for demand in demands]

    def then(finished: list[Demand]) -> None:
        raise IndexError("spoiled")

    with pytest.raises(IndexError):
        engine.run_pass(demands if where == "runner" else demands[1:], *([then] if where == "then" else []))
    assert [sequence.cache.length for sequence in sequences] == before
    assert [len(demand.rows) for demand in demands] == num_parts
    assert engine.run_pass(demands[1:]) == [demands[1]]
    assert torch.cat(demands[1].rows).shape == (3, toys.VOCAB_SIZE)


class TestTarget:
    def test_a_token_that_spoils_passes_fails_its_own_session_alone(self):
        expected = Target().ask(PROMPTS)
        answers = Target().ask([*PROMPTS, [1, POISON], [4, POISON, 2]])
        assert list(map(described, answers[:5])) == list(map(described, expected))
        assert [type(answer) for answer in answers[5:]] == [InternalError] * 2

    def test_rows_that_cannot_be_read_fail_their_own_session_alone(self, monkeypatch):
        culprit, begin_reading = DistributionParams(0.5), scheduler_module.begin_reading
        expected = Target().ask(PROMPTS)
        for is_late in (False, True):

            def begin(logits, all_params, *arguments, is_late=is_late):
                def result():
                    assert culprit not in all_params
                    return begin_reading(logits, all_params, *arguments)()

                return result if is_late else (lambda rows: lambda: rows)(result())

            monkeypatch.setattr(scheduler_module, "begin_reading", begin)
            answers = Target().ask([*PROMPTS, [2]], [*[DistributionParams()] * 5, culprit])
            assert list(map(described, answers[:5])) == list(map(described, expected))
            assert isinstance(answers[5], InternalError)

    def test_where_every_pass_fails_everyone_is_told_and_the_next_is_served(self):
        target = Target()
        works = target.engine.runner.forward
        target.engine.runner.forward = fails  # type: ignore[method-assign]
        assert [type(answer) for answer in target.ask(PROMPTS)] == [InternalError] * 5
        target.engine.runner.forward = works  # type: ignore[method-assign]
        assert described(target.ask(PROMPTS)[0])

    @pytest.mark.parametrize("place", ["new_cache", "_apply"])
    def test_what_fails_outside_passes_is_told_too(self, monkeypatch, place):
        """A session of which the thread only logs that it failed would wait for ever."""
        target = Target()
        owner = target.engine.runner if place == "new_cache" else target.scheduler
        works = getattr(owner, place)
        monkeypatch.setattr(owner, place, fails)
        [answer] = target.ask(PROMPTS[:1])
        assert isinstance(answer, InternalError)
        monkeypatch.setattr(owner, place, works)
        assert described(target.ask(PROMPTS[:1])[0])

    def test_whoever_cannot_be_answered_hinders_no_other_answer(self):
        target = Target()
        deaf, other = (target.scheduler.open(DistributionParams(), 0, Span(0, [5, 6], 0)) for _ in range(2))
        target.submit(deaf, [5, 6], fails)
        target.submit(other, [5, 6])
        settle(target.scheduler)
        assert described(target.answers[1][0])
        assert target.engine._sequences == {other.sequence}


def fails(*arguments, **named):
    raise RuntimeError("out of luck")


class TestDraft:
    def test_a_token_that_spoils_passes_fails_its_own_session_alone(self):
        expected = DraftService().draft(PROMPTS)
        assert all(len(tokens) == AHEAD for tokens in expected)
        outcomes = DraftService().draft([*PROMPTS, [1, POISON], [4, POISON, 2]])
        assert outcomes[:5] == expected
        assert [type(outcome) for outcome in outcomes[5:]] == [InternalError] * 2

    def test_a_row_that_cannot_be_drawn_from_fails_its_own_session_alone(self, monkeypatch):
        expected, culprit, draw = DraftService().draft(PROMPTS), DistributionParams(0.5), drafter_module.draft_tokens

        def draw_but_for(logits, all_params, *arguments):
            assert culprit not in all_params
            return draw(logits, all_params, *arguments)

        monkeypatch.setattr(drafter_module, "draft_tokens", draw_but_for)
        outcomes = DraftService().draft([*PROMPTS, [2]], [*[DistributionParams()] * 5, culprit])
        assert outcomes[:5] == expected
        assert isinstance(outcomes[5], InternalError)

    def test_drafting_in_one_go_fails_its_culprit_alone(self):
        runner = SpoiledDraftingRunner(toys.DRAFT_LOGITS)
        expected = DraftService(runner).draft(PROMPTS)
        assert expected == DraftService().draft(PROMPTS)
        runner.culprit = 0.5
        outcomes = DraftService(runner).draft([*PROMPTS, [2]], [*[DistributionParams()] * 5, DistributionParams(0.5)])
        assert outcomes[:5] == expected
        assert isinstance(outcomes[5], InternalError)

    def test_where_every_pass_fails_everyone_is_told(self, monkeypatch):
        service = DraftService()
        monkeypatch.setattr(service.engine.runner, "forward", fails)
        assert [type(outcome) for outcome in service.draft(PROMPTS)] == [InternalError] * 5

    @pytest.mark.parametrize("place", ["new_cache", "commit", "take_held", "append"])
    def test_what_fails_outside_passes_is_told_too(self, monkeypatch, place):
        service, items, others = DraftService(), [], []
        if place == "new_cache":
            monkeypatch.setattr(service.engine.runner, place, fails)
        session = service.open([5, 6], items.append)
        if place != "new_cache":
            monkeypatch.setattr(session, place, fails)
        settle(service.drafter)
        if place == "commit":
            service.drafter.commit(session, Commit(1, 2, [], TokenLog([5, 6]).digest(2), 4, 0, 0))
            settle(service.drafter)
        assert isinstance(items[-1], InternalError)
        assert not service.engine._sequences
        monkeypatch.undo()
        service.open([5, 6], others.append)
        settle(service.drafter)
        assert len(outcome_of(others)) == AHEAD

    def test_whoever_cannot_be_sent_to_hinders_nobody(self):
        service, items = DraftService(), []
        service.open([5, 6], fails)
        other = service.open([5, 6], items.append)
        settle(service.drafter)
        assert len(outcome_of(items)) == AHEAD
        assert service.engine._sequences == {other.main.sequence}

    def test_a_fork_that_spoils_a_pass_ends_alone(self, monkeypatch):
        service, items = DraftService(), []
        monkeypatch.setattr(Drafter, "_has_time_for_forks", lambda *_: True)
        session = DraftSession(
            DraftOptions(DistributionParams(), 1, POISON, 5, 0.0, max_alternatives=3), items.append, 0, 2 + AHEAD, 5
        )
        session.begin([5, 6])
        service.drafter._begin(session)
        begin = session.begin_fork

        def begin_spoiled(fork: Path, alternative) -> None:
            begin(fork, alternative)
            if fork is session.forks[0]:
                fork.sequence.rewrite(fork.length - 1, [POISON])

        monkeypatch.setattr(session, "begin_fork", begin_spoiled)
        settle(service.drafter)
        assert len(outcome_of(items)) == AHEAD
        assert len([it for item in items for it in item.alternatives]) == 2
        assert session.forks[0].alternative is None
        assert session.forks[0].sequence.cache.length == 0


def test_the_spoiled_cache_of_a_plain_runner_grows_as_it_should_not():
    """Else the tests above show less than they say."""
    cache = SequenceCache()
    with pytest.raises(IndexError):
        SpoiledRunner(toys.TARGET_LOGITS).forward([Feed(cache, [POISON], 1)])
    assert cache.length == 1
