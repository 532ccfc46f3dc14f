"""Free-running drafting: every session whose sequence is shorter than its window gets one more token a pass.

Knows no gRPC.

Shapes: N sessions in a pass, V vocabulary size.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence

import torch

from draft_service.session import Commit, Drafted, DraftOptions, Path, Session
from outrider.engine.engine import Demand, Engine, joined
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.runner import MOST_DRAWS
from outrider.engine.thread import ModelThread
from outrider.errors import InternalError, InvalidArgumentError, ServiceError, raise_errors_in
from outrider.probs import MOST_SUPPORT, Draft, PlainSampling, draft_tokens
from outrider.warping import Warping

log = logging.getLogger(__name__)

GREEDY = Warping(temperature=0.0)
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

    def warm_up(self, vocab_size: int) -> None:
        """Draft greedily and not, several tokens in one go and one by one; the thread must not run yet.

        Raises:
            ServiceError: a draft failed, as others would.
        """
        answers: list[Drafted | ServiceError] = []
        self._engine.prepare_drafting()
        for temperature, min_draft_prob in ((0.0, 0.0), (1.0, 0.0), (1.0, 1e-9)):
            options = DraftOptions(Warping(temperature), 0, vocab_size, MOST_SUPPORT, min_draft_prob)
            window = min(WARM_UP_WINDOW, self._context_length)
            session = Session(options, answers.append, next(self._arrivals), window)
            session.begin([0])
            self._begin(session)
            while self._step():
                pass
            self._end(session)
        raise_errors_in(answers)

    def open(self, options: DraftOptions, token_ids: Sequence[int], window: int, batch_until: int, emit) -> Session:
        """Return a new session, which drafts at once.

        Raises:
            InvalidArgumentError: there are no tokens, or more than the context holds, or the window is out of range.
        """
        if not 1 <= len(token_ids) <= self._context_length:
            raise InvalidArgumentError(
                f"committed.token_ids holds {len(token_ids)} tokens: give 1 to {self._context_length}"
            )
        self._check_window(window, len(token_ids))
        session = Session(options, emit, next(self._arrivals), window, batch_until)
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

    async def reached(self) -> None:
        """Return when what was called before has been done."""
        await asyncio.wrap_future(self.thread.ask(lambda: None))

    def close(self, session: Session) -> None:
        """Stop drafting and free the session's cache before the next forward pass."""
        self.thread.post(lambda: self._end(session))

    def _check_window(self, window: int, num_committed: int) -> None:
        if not num_committed <= window <= self._context_length:
            raise InvalidArgumentError(
                f"window is {window}: give a position from {num_committed}, the commit's end, to {self._context_length}"
            )

    def _begin(self, session: Session) -> None:
        self._engine.add(session.main.sequence)
        self._sessions.append(session)

    def _commit(self, session: Session, commit: Commit) -> None:
        if session not in self._sessions:
            return
        try:
            session.commit(commit)
        except ServiceError as error:
            self._fail(session, error)
            return
        self._send_if_due(session)

    def _end(self, session: Session) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
        for path in (session.main, *session.forks):
            self._engine.remove(path.sequence)

    def _fail(self, session: Session, error: ServiceError) -> None:
        session.emit(error)
        self._end(session)

    def _step(self) -> bool:
        sessions = [session for session in self._sessions if session.has_work]
        try:
            paths = self._paths_of(sessions)
            if paths and not self._draft_several(paths):
                finished = set(self._engine.run_pass([_demand_of(path) for path in paths]))
                self._draft([path for path in paths if path.demand in finished])
        except Exception:
            log.exception("a forward pass failed; its sessions are told")
            for session in sessions:
                self._fail(session, InternalError("the forward pass failed; the service's log says how"))
        return any(session.has_work for session in self._sessions)

    def _paths_of(self, sessions: list[Session]) -> list[Path]:
        """Return the paths that want a token: forks too, when no client waits for proposals of its round."""
        paths = [session.main for session in sessions if session.wants_token]
        if any(session.is_waited_for for session in sessions):
            return paths
        for session in sessions:
            self._fork(session)
            paths += session.wanting_forks
        return paths

    def _fork(self, session: Session) -> None:
        """Have a session's forks prepare for the likeliest other ends of its round, if it is time and there is room."""
        if not session.may_fork:
            return
        base, main = session.num_committed, session.main.sequence
        most = self._most_forks if self._has_time_for_forks(session) else 0
        for index, alternative in enumerate(session.likely_alternatives(most)):
            if index == len(session.forks):
                session.forks.append(Path(session, EngineSequence(is_spare=True)))
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

    def _draft_several(self, paths: list[Path]) -> bool:
        """Draft what the paths want in one go, if the engine can; return whether it did.

        A commit has to wait meanwhile, so that there are only so many as it can wait for.
        """
        if not self._engine.drafts:
            return False
        num_draws = min(min(path.num_wanted for path in paths), self._most_draws(paths))
        demands = [_demand_of(path) for path in paths]
        options = [path.session.options for path in paths]
        sampling = PlainSampling.of(
            [its.vocab_size for its in options],
            [its.warping for its in options],
            [its.max_support for its in options],
            [[path.number_of(index) for path in paths] for index in range(num_draws)],
            max(its.num_others for its in options),
        )
        if sampling is None or not self._engine.can_draft(demands, sampling):
            return False
        self._take(paths, self._engine.draft(demands, sampling))
        return True

    def _most_draws(self, paths: list[Path]) -> int:
        """Return how many tokens are drafted in LONGEST_DEAFNESS_S, as passes have been so far; one at least.

        A client that is alone and waits for drafts has no commit to send meanwhile.
        """
        if len(self._sessions) == 1 and paths[0].session.is_waited_for:
            return MOST_DRAWS
        return min(MOST_DRAWS, max(1, int(LONGEST_DEAFNESS_S / max(self._pass_s, 1e-9))))

    def _draft(self, paths: list[Path]) -> None:
        """Draw one token for each path whose row is there."""
        rows = [path.demand.rows[-1] for path in paths if path.demand]
        if rows:
            self._take(paths, [[draft] for draft in _draw(joined(rows), paths)])

    def _take(self, paths: list[Path], drafts: Sequence[Sequence[Draft | None]]) -> None:
        """Append the drafts of each path's demand, and send them when it is time.

        A row with NaN or infinity ends its own session alone, and behind an alternative, which may have been absurd,
        its own fork. All drafts are appended before any is sent: the cache that is told of holds them already.
        """
        for path, its_drafts in zip(paths, drafts, strict=True):
            demand, path.demand = path.demand, None
            assert demand is not None
            assert demand.started_at is not None
            queue_ms = max(0.0, demand.started_at - path.session.committed_at) * 1000
            forward_ms = (demand.ended_at - demand.started_at) * 1000 / len(its_drafts)
            laws = [draft for draft in its_drafts if draft]
            if len(laws) == len(its_drafts):
                path.session.append(path, laws, queue_ms, forward_ms, demand.batch_size)
            elif path.alternative:
                path.stop()
            else:
                self._fail(path.session, InternalError("the model returned NaN or infinity for this session"))
        for session in {path.session: None for path in paths}:
            if session in self._sessions:
                self._send_if_due(session)

    def _send_if_due(self, session: Session) -> None:
        if session.must_send:
            session.emit(session.take_held())


def _demand_of(path: Path) -> Demand:
    """Return the path's demand for the row of its last token, which stays the same until it is finished."""
    if path.demand is None:
        path.demand = Demand(path.sequence, path.length, 1, path.session.arrival)
    return path.demand


def _draw(logits: torch.Tensor, paths: Sequence[Path]) -> list[Draft | None]:
    """Return a draft for each path's row of `logits` `[N, V]`; None where the row is no law."""
    options = [path.session.options for path in paths]
    if any(its.vocab_size < logits.shape[1] for its in options):
        logits = logits.clone()
        for row, its in zip(logits, options, strict=True):
            row[its.vocab_size :] = -torch.inf
    return draft_tokens(
        logits,
        [its.warping for its in options],
        [its.max_support for its in options],
        [path.number_of(0) for path in paths],
        max(its.num_others for its in options),
    )
