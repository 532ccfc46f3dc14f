"""Free-running drafting: every session whose sequence is shorter than its window gets one more token a pass.

Knows no gRPC.

Shapes: N sessions in a pass, V vocabulary size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from outrider.common.callers import Caller
from outrider.engine.backends.runner import MOST_DRAWS
from outrider.engine.engine import Demand, Engine
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.isolation import failed_alone, in_halves
from outrider.engine.thread import ModelThread
from outrider.protocol.errors import InternalError, InvalidArgumentError, ServiceError, raise_errors_in
from outrider.sampling.distribution import FILTERED, DistributionParams
from outrider.sampling.draws import MOST_SUPPORT, Draft, Draws
from outrider.sampling.pipeline import draft_tokens, leaves_no_token
from outrider_draft.session import Commit, Drafted, DraftOptions, Path, Session

T = TypeVar("T")
Drawn = tuple[Path, Sequence[Draft | None]]  # a path, and what was drawn for it one token after the other

log = logging.getLogger(__name__)

WARM_UP_WINDOW = 8
TIME_TO_SPARE = 2.0  # times what drafting a round takes, before there are forks
MOST_PATHS = 64  # that an accelerator drafts for little more time than it needs for one
LONGEST_DEAFNESS_S = 0.002  # commits wait no longer for drafts that are made in one go


class Drafter:
    """Owns the engine's thread and the sessions on it."""

    def __init__(self, engine: Engine, context_length: int):
        self._engine, self._context_length = engine, context_length
        self.thread = ModelThread("draft-model", self._step, lambda: engine.is_quick)
        self._sessions: list[Session] = []
        self._arrivals = itertools.count()
        self._last_options: list[DraftOptions] = []
        self._last_draws = Draws.of([], [], [], [])

    def warm_up(self, vocab_size: int) -> None:
        """Draft greedily, plainly and through filters, at once and one by one; the thread must not run yet.

        Raises:
            ServiceError: a draft failed, as others would.
        """
        answers: list[Drafted | ServiceError] = []
        self._engine.prepare_drafting()
        plain = DistributionParams()
        for params, min_draft_prob in ((DistributionParams(0.0), 0.0), (plain, 0.0), (plain, 1e-9), (FILTERED, 0.0)):
            options = DraftOptions(params, 0, vocab_size, MOST_SUPPORT, min_draft_prob)
            window = min(WARM_UP_WINDOW, self._context_length)
            session = Session(options, answers.append, next(self._arrivals), window)
            session.begin([0])
            self._begin(session)
            while self._step():
                pass
            self._end(session)
        self._engine.forget_passes()
        raise_errors_in(answers)

    def open(
        self,
        options: DraftOptions,
        token_ids: Sequence[int],
        window: int,
        batch_until: int,
        emit: Callable[[Drafted | ServiceError], None],
        caller: Caller = (),
    ) -> Session:
        """Return a new session, which drafts at once. Passes are shared fairly among callers.

        Raises:
            InvalidArgumentError: there are no tokens, or more than the context holds, or the window is out of range.
        """
        if not 1 <= len(token_ids) <= self._context_length:
            raise InvalidArgumentError(
                f"committed.token_ids holds {len(token_ids)} tokens: give 1 to {self._context_length}"
            )
        self._check_window(window, len(token_ids))
        session = Session(options, emit, next(self._arrivals), window, batch_until, caller)
        session.begin(token_ids)
        self.thread.post(lambda: self._begin(session), is_long=True)
        return session

    def commit(self, session: Session, commit: Commit) -> None:
        """Apply a commit before the next pass; an error that only the session's state shows is emitted."""
        end = commit.start_position + len(commit.token_ids)
        if end == 0:
            raise InvalidArgumentError("commit.span leaves no token: give at least the first")
        self._check_window(commit.window, end)
        self.thread.post(lambda: self._commit(session, commit))

    def go_on(self) -> None:
        """Look again for sessions that have work."""
        self.thread.post(lambda: None)

    def close(self, session: Session) -> None:
        """Stop drafting and free the session's cache before the next forward pass."""
        self.thread.post(lambda: self._end(session))

    def _check_window(self, window: int, num_committed: int) -> None:
        if not num_committed <= window <= self._context_length:
            raise InvalidArgumentError(
                f"window is {window}: give a position from {num_committed}, the commit's end, to {self._context_length}"
            )

    def _begin(self, session: Session) -> None:
        try:
            self._engine.add(session.main.sequence)
        except Exception as error:
            self._blame(session.main, error)
            return
        self._sessions.append(session)

    def _commit(self, session: Session, commit: Commit) -> None:
        if not session.is_open:
            return
        try:
            session.commit(commit)
        except ServiceError as error:
            self._fail(session, error)
        except Exception as error:
            self._blame(session.main, error)
        else:
            self._send_if_due(session)

    def _end(self, session: Session) -> None:
        session.is_open = False
        if session in self._sessions:
            self._sessions.remove(session)
        for path in (session.main, *session.forks):
            self._engine.remove(path.sequence)

    def _fail(self, session: Session, error: ServiceError) -> None:
        self._end(session)
        self._emit(session, error)

    def _blame(self, path: Path, error: Exception) -> None:
        """End what made something raise: the session whose main path it is, or a fork alone."""
        log.error("a session failed" if path is path.session.main else "a fork failed", exc_info=error)
        if path is path.session.main:
            self._fail(path.session, failed_alone())
        else:
            path.stop()
            path.sequence.cache.clear()

    def _emit(self, session: Session, item: Drafted | ServiceError) -> None:
        try:
            session.emit(item)
        except Exception:
            log.exception("nobody takes what is sent; its session ends")
            self._end(session)

    def _step(self) -> bool:
        self._draft(self._paths_of([session for session in self._sessions if session.has_work]))
        return any(session.has_work for session in self._sessions)

    def _paths_of(self, sessions: list[Session]) -> list[Path]:
        """Return the paths that want a token: forks too, when no client waits for proposals of its round."""
        paths = [session.main for session in sessions if session.wants_token]
        if any(session.is_waited_for for session in sessions):
            return paths
        for session in sessions:
            try:
                self._fork(session)
            except Exception as error:
                self._blame(session.main, error)
            paths += session.wanting_forks
        return paths

    def _fork(self, session: Session) -> None:
        """Have a session's forks prepare for the likeliest other ends of its round, if time and memory suffice."""
        if not session.may_fork:
            return
        base, main = session.num_committed, session.main.sequence
        most = self._most_forks if self._has_time_for_forks(session) else 0
        for index, alternative in enumerate(session.likely_alternatives(most)):
            if index == len(session.forks):
                session.forks.append(Path(session, EngineSequence(caller=main.caller, is_spare=True)))
                self._engine.add(session.forks[index].sequence)
            if self._engine.follow(session.forks[index].sequence, main, base + alternative.index):
                session.begin_fork(session.forks[index], alternative)

    def _has_time_for_forks(self, session: Session) -> bool:
        """Return whether the draft has so much time to spare before the next commit, as things have gone so far.

        With a slow draft, forks hold up the main path in the same passes, and then the commit; what is not finished by
        then has been of no use.
        """
        num_draws = session.batch_until - session.num_committed
        return session.gap_s is not None and TIME_TO_SPARE * num_draws * self._pass_s <= session.gap_s

    @property
    def _pass_s(self) -> float:
        """Seconds of a pass, as they have been so far."""
        stats = self._engine.stats
        return stats.forward_seconds / max(1, stats.num_forward_passes)

    @property
    def _most_forks(self) -> int:
        """How many forks each session may have.

        On a CPU none with several sessions: they take time that main paths need, and what else runs there.
        """
        num_sessions = len(self._sessions)
        if self._engine.runner.device.type == "cpu" and num_sessions > 1:
            return 0
        return max(0, MOST_PATHS // num_sessions - 1)

    def _draft(self, paths: list[Path]) -> None:
        """Draft for paths: several tokens in one go where that can be, and meanwhile one by one for the others."""
        num_rounds, demands = 1, [_demand_of(path) for path in paths]
        shares = dict(zip(paths, self._engine.fair_shares(demands), strict=True))
        paths = [path for path in paths if shares[path]]
        whole = [path for path in paths if path.demand and shares[path] == path.demand.num_left]
        if drawn := self._draft_several(self._together(paths, whole)):
            self._take(drawn)
            done = {path for path, _ in drawn}
            paths = [path for path in paths if path not in done]
            num_rounds = len(drawn[0][1])
        until = time.monotonic() + LONGEST_DEAFNESS_S
        for index in range(num_rounds):
            if not paths or (index and time.monotonic() > until):
                break
            self._draft_one_each(paths)

    def _together(self, paths: list[Path], whole: list[Path]) -> list[Path]:
        """Return the paths for which several tokens may be drafted in one go: of those that a pass feeds as a whole."""
        able = [path for path in whole if path.can_run_ahead] if self._engine.drafts else []
        is_worth_it = len(able) == len(paths) or (able and self._num_draws(able) > 1)
        return able if is_worth_it else []  # else one pass does it for all

    def _draft_several(self, paths: Sequence[Path]) -> list[Drawn]:
        """Draft several tokens in one go; return the drafts of those paths for which the engine can.

        One for which it cannot, as with a long prompt to feed, does not keep it from the others.
        """

        def draft(paths: Sequence[Path]) -> list[Drawn]:
            paths = [path for path in paths if path.wants_token]
            plan = self._plan(paths)
            if plan is None:
                paths = [path for path in paths if self._plan([path])]
                plan = self._plan(paths) if paths and self._num_draws(paths) > 1 else None
            return list(zip(paths, self._engine.draft(*plan), strict=True)) if plan else []

        return self._isolated(draft, paths)

    def _plan(self, paths: Sequence[Path]) -> tuple[list[Demand], Draws] | None:
        """Return what the engine is asked for to draft in one go; None where it cannot."""
        if not paths:
            return None
        demands = [_demand_of(path) for path in paths]
        draws = self._draws_of([path.session.options for path in paths])
        num_draws = self._num_draws(paths)
        draws = draws.with_numbers(list(zip(*(path.numbers(num_draws) for path in paths), strict=True)))
        return (demands, draws) if self._engine.can_draft(demands, draws) else None

    def _draws_of(self, options: list[DraftOptions]) -> Draws:
        """Return how tokens are drawn for paths of these options, still without numbers: mostly as the last time."""
        if options != self._last_options:
            self._last_options = options
            self._last_draws = Draws.of(
                [its.vocab_size for its in options],
                [its.params for its in options],
                [its.max_support for its in options],
                [],
                max(its.num_others for its in options),
            )
        return self._last_draws

    def _num_draws(self, paths: Sequence[Path]) -> int:
        """Return how many tokens to draft in one go: a commit has to wait meanwhile."""
        return min(min(path.num_wanted for path in paths), self._most_draws(paths))

    def _draft_one_each(self, paths: Sequence[Path]) -> None:
        """Run a pass, and draw one token for each path whose row is there then."""
        fed = self._isolated(self._run_pass, paths)
        self._take(self._isolated(_draw, fed))

    def _run_pass(self, paths: Sequence[Path]) -> list[Path]:
        paths = [path for path in paths if path.wants_token]
        finished = set(self._engine.run_pass([_demand_of(path) for path in paths]) if paths else [])
        return [path for path in paths if path.demand in finished]

    def _isolated(self, do: Callable[[Sequence[Path]], list[T]], paths: Sequence[Path]) -> list[T]:
        return list(chain.from_iterable(in_halves(do, paths, self._blame)))

    def _most_draws(self, paths: Sequence[Path]) -> int:
        """Return how many tokens are drafted in LONGEST_DEAFNESS_S, as passes have been so far; one at least.

        A client that is alone and waits for drafts has no commit to send meanwhile.
        """
        if len(self._sessions) == 1 and paths[0].session.is_waited_for:
            return MOST_DRAWS
        return min(MOST_DRAWS, max(1, int(LONGEST_DEAFNESS_S / max(self._pass_s, 1e-9))))

    def _take(self, drawn: Sequence[Drawn]) -> None:
        """Append the drafts of each path's demand, and send them when it is time.

        A row with NaN or infinity ends its own session alone, and behind an alternative, which may have been absurd,
        its own fork; one that processors mask as a whole stops its session until the next commit. All drafts are
        appended before any is sent: the cache that is reported holds them already.
        """
        for path, drafts in drawn:
            try:
                self._append(path, drafts)
            except Exception as error:
                self._blame(path.session.main, error)
        for session in {path.session: None for path, _ in drawn}:
            if session.is_open:
                self._send_if_due(session)

    def _append(self, path: Path, drafts: Sequence[Draft | None]) -> None:
        demand, path.demand = path.demand, None
        if not path.session.is_open:
            return
        assert demand is not None
        assert demand.started_at is not None
        queue_ms = max(0.0, demand.started_at - path.session.committed_at) * 1000
        forward_ms = (demand.ended_at - demand.started_at) * 1000 / len(drafts)
        found = [draft for draft in drafts if draft]
        if len(found) == len(drafts):
            path.session.append(path, found, queue_ms, forward_ms, demand.batch_size)
        elif path.alternative:
            path.stop()
        elif _leaves_no_token(path, demand):
            path.session.stop()
        else:
            self._fail(path.session, InternalError("the model returned NaN or infinity for this session"))

    def _send_if_due(self, session: Session) -> None:
        try:
            item = session.take_held() if session.must_send else None
        except Exception as error:
            self._blame(session.main, error)
            return
        if item:
            self._emit(session, item)


def _demand_of(path: Path) -> Demand:
    """Return the path's demand for the row of its last token, which stays the same until it is finished."""
    if path.demand is None:
        path.demand = Demand(path.sequence, path.length, 1, path.session.arrival)
    return path.demand


def _leaves_no_token(path: Path, demand: Demand) -> bool:
    """Return whether it is the logits processors that make the row of `demand` no distribution."""
    options = path.session.options
    return leaves_no_token(demand.rows[-1][0], options.params, path.history, options.vocab_size)


def _draw(paths: Sequence[Path]) -> list[Drawn]:
    """Draw a token for each path whose demand is finished; None where its row is not finite."""
    if not (paths := [path for path in paths if path.wants_token and path.demand]):
        return []
    options = [path.session.options for path in paths]
    drafts = draft_tokens(
        [path.demand.rows[-1] for path in paths if path.demand],
        [its.params for its in options],
        [its.max_support for its in options],
        [path.numbers(1)[0] for path in paths],
        max(its.num_others for its in options),
        [its.vocab_size for its in options],
        [path.history for path in paths],
    )
    return [(path, [draft]) for path, draft in zip(paths, drafts, strict=True)]
