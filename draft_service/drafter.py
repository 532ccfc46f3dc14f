"""Free-running drafting: every session whose sequence is shorter than its window gets one more token a pass.

Knows no gRPC.

Shapes: N sessions in a pass, V vocabulary size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from outrider.engine.engine import Demand, Engine, joined
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.thread import ModelThread
from outrider.errors import FailedPreconditionError, InternalError, InvalidArgumentError, ServiceError
from outrider.probs import Draft, PlainSampling, draft_tokens
from outrider.rng import AddressedUniforms, Noise, Purpose, SharedNoise
from outrider.warping import Warping

log = logging.getLogger(__name__)

GREEDY = Warping(temperature=0.0)
WARM_UP_WINDOW = 8
LONGEST_DEAFNESS_S = 0.002  # commits wait no longer for drafts that are made in one go
LONGEST_HOLD_S = 0.01  # a drafted token waits for no others longer; slower drafts send each token as it comes


@dataclass(frozen=True)
class DraftOptions:
    """How one session drafts."""

    warping: Warping
    seed: int
    vocab_size: int  # ids at or above are never proposed
    max_support: int
    min_draft_prob: float
    branch: int = 0  # that drafting begins with; OpenProposals.branch in draft.proto
    is_coupled: bool = False  # draws with the target's noise; COUPLING_GUMBEL in common.proto


@dataclass(frozen=True)
class Drafted:
    """Drafted tokens at consecutive positions, as they go to the client together."""

    commit_index: int
    start_position: int
    drafts: list[Draft]
    stopped: bool
    num_cached_tokens: int
    cache_digest: int
    queue_ms: float
    forward_ms: float  # of all their passes
    batch_size: int


@dataclass(frozen=True)
class _Held:
    """One drafted token that has not been sent yet."""

    draft: Draft
    drawn_at: float
    queue_ms: float
    forward_ms: float
    batch_size: int


@dataclass(frozen=True)
class Commit:
    """Committed tokens and the limits of what is drafted next; Commit in draft.proto."""

    index: int
    start_position: int
    token_ids: Sequence[int]
    prefix_digest: int
    window: int
    batch_until: int
    branch: int


@dataclass(eq=False)
class Session:
    """One client stream. `emit` is called by whoever drives the engine, whose everything below it is."""

    options: DraftOptions
    emit: Callable[[Drafted | ServiceError], None]
    arrival: int
    window: int
    batch_until: int = 0
    sequence: EngineSequence = field(default_factory=EngineSequence)
    commit_index: int = 0
    is_stopped: bool = False
    committed_at: float = field(default_factory=time.monotonic)
    demand: Demand | None = None
    held: list[_Held] = field(default_factory=list)  # for the last positions of the sequence
    branch: int = field(init=False)
    numbers: AddressedUniforms | SharedNoise = field(init=False)

    def __post_init__(self) -> None:
        self.draw_under(self.options.branch)

    def draw_under(self, branch: int) -> None:
        """Draw all further tokens with the random numbers of a branch; noise that is shared has none."""
        seed, self.branch = self.options.seed, branch
        self.numbers = SharedNoise(seed) if self.options.is_coupled else AddressedUniforms(seed, Purpose.DRAFT, branch)

    @property
    def wants_token(self) -> bool:
        return not self.is_stopped and len(self.sequence.tokens) < self.window

    @property
    def num_wanted(self) -> int:
        """How many tokens may be drafted before somebody looks: up to what is sent together, and to a likely stop."""
        if self.options.min_draft_prob:
            return 1
        end = len(self.sequence.tokens)
        return (self.batch_until if end < self.batch_until else self.window) - end

    def number_of(self, index: int) -> float | Noise:
        """Return the random number of the token `index` positions behind the sequence's end."""
        return self.numbers.at(len(self.sequence.tokens) + index)

    @property
    def must_send(self) -> bool:
        """Whether what is held has waited for all that it should, or for long enough."""
        if not self.held:
            return False
        if not self.batch_until:
            return True
        end = len(self.sequence.tokens)
        has_all = end >= self.batch_until > end - len(self.held)
        return has_all or not self.wants_token or time.monotonic() - self.held[0].drawn_at > LONGEST_HOLD_S

    def take_held(self) -> Drafted:
        """Return what is held; nothing is held afterwards."""
        held, self.held = self.held, []
        sequence = self.sequence
        return Drafted(
            commit_index=self.commit_index,
            start_position=len(sequence.tokens) - len(held),
            drafts=[item.draft for item in held],
            stopped=self.is_stopped,
            num_cached_tokens=sequence.cache.length,
            cache_digest=sequence.tokens.digest(sequence.cache.length),
            queue_ms=held[0].queue_ms,
            forward_ms=sum(item.forward_ms for item in held),
            batch_size=held[-1].batch_size,
        )


class Drafter:
    """Owns the engine's thread and the sessions on it."""

    def __init__(self, engine: Engine, context_length: int):
        self._engine, self._context_length = engine, context_length
        self.thread = ModelThread("draft-model", self._step, lambda: engine.is_quick)
        self._sessions: list[Session] = []
        self._arrivals = itertools.count()

    def warm_up(self, vocab_size: int) -> None:
        """Draft greedily and not, several tokens in one go and one by one; the thread must not run yet."""
        for temperature, min_draft_prob in ((0.0, 0.0), (1.0, 0.0), (1.0, 1e-9)):
            options = DraftOptions(Warping(temperature), 0, vocab_size, vocab_size, min_draft_prob)
            window = min(WARM_UP_WINDOW, self._context_length)
            session = Session(options, lambda _: None, next(self._arrivals), window)
            session.sequence.tokens.extend([0])
            self._begin(session)
            while self._step():
                pass
            self._end(session)

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
        session.sequence.tokens.extend(token_ids)
        self.thread.post(lambda: self._begin(session), is_long=True)
        return session

    def commit(self, session: Session, commit: Commit) -> None:
        """Apply a commit before the next pass; an error that only the session's state shows is emitted."""
        end = commit.start_position + len(commit.token_ids)
        if end == 0:
            raise InvalidArgumentError("commit.span leaves no token: give at least the first")
        self._check_window(commit.window, end)
        self.thread.post(lambda: self._commit(session, commit))

    def close(self, session: Session) -> None:
        """Stop drafting and free the session's cache before the next forward pass."""
        self.thread.post(lambda: self._end(session))

    def _check_window(self, window: int, num_committed: int) -> None:
        if not num_committed <= window <= self._context_length:
            raise InvalidArgumentError(
                f"window is {window}: give a position from {num_committed}, the commit's end, to {self._context_length}"
            )

    def _begin(self, session: Session) -> None:
        self._engine.add(session.sequence)
        self._sessions.append(session)

    def _commit(self, session: Session, commit: Commit) -> None:
        if session not in self._sessions:
            return
        tokens = session.sequence.tokens
        try:
            if commit.index != session.commit_index + 1:
                raise FailedPreconditionError(
                    f"commit_index is {commit.index} after {session.commit_index}: open a new session"
                )
            tokens.check_span(commit.start_position, commit.prefix_digest)
        except ServiceError as error:
            self._fail(session, error)
            return
        is_new_branch = commit.branch != session.branch
        if is_new_branch or tokens.num_agreeing(commit.start_position, commit.token_ids) < len(commit.token_ids):
            session.sequence.rewrite(commit.start_position, commit.token_ids)
            cache = session.sequence.cache
            cache.truncate(min(cache.length, len(tokens) - 1))  # the last token is fed, again if need be, for its row
            session.demand, session.held = None, []
        if is_new_branch:
            session.draw_under(commit.branch)
        num_undecided = max(0, len(tokens) - commit.start_position - len(commit.token_ids))
        session.held = session.held[-num_undecided:] if num_undecided else []
        session.commit_index, session.is_stopped = commit.index, False
        session.window, session.batch_until = commit.window, commit.batch_until
        session.committed_at = time.monotonic()
        self._send_if_due(session)

    def _end(self, session: Session) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
        self._engine.remove(session.sequence)

    def _fail(self, session: Session, error: ServiceError) -> None:
        session.emit(error)
        self._end(session)

    def _step(self) -> bool:
        wanting = [session for session in self._sessions if session.wants_token]
        if wanting:
            for session in wanting:
                session.demand = session.demand or Demand(
                    session.sequence, len(session.sequence.tokens), 1, session.arrival
                )
            try:
                if not self._draft_several(wanting):
                    finished = set(self._engine.run_pass([session.demand for session in wanting if session.demand]))
                    self._draft([session for session in wanting if session.demand in finished])
            except Exception:
                log.exception("a forward pass failed; its sessions are told")
                for session in wanting:
                    self._fail(session, InternalError("the forward pass failed; the service's log says how"))
                return False
        return any(session.wants_token for session in self._sessions)

    def _draft_several(self, sessions: list[Session]) -> bool:
        """Draft what the sessions want in one go, if the engine can; return whether it did.

        A commit has to wait meanwhile, so that there are only so many as it can wait for.
        """
        num_draws = min(min(session.num_wanted for session in sessions), self._num_quick_draws)
        demands = [session.demand for session in sessions if session.demand]
        if num_draws < 2 or not self._engine.can_draft(demands, num_draws):
            return False
        sampling = PlainSampling.of(
            [session.options.vocab_size for session in sessions],
            [session.options.warping for session in sessions],
            [session.options.max_support for session in sessions],
            [[session.number_of(index) for session in sessions] for index in range(num_draws)],
        )
        if sampling is None:
            return False
        for session, drafts in zip(sessions, self._engine.draft(demands, sampling), strict=True):
            self._take(session, drafts)
        return True

    @property
    def _num_quick_draws(self) -> int:
        """How many tokens are drafted in LONGEST_DEAFNESS_S, as passes have been so far."""
        stats = self._engine.stats
        return int(LONGEST_DEAFNESS_S * stats.num_forward_passes / max(stats.forward_seconds, 1e-9))

    def _draft(self, sessions: list[Session]) -> None:
        """Draw one token for each session whose row is there; a row with NaN or infinity ends its own session alone."""
        rows = [session.demand.rows[-1] for session in sessions if session.demand]
        if not rows:
            return
        for session, draft in zip(sessions, _draw(joined(rows), sessions), strict=True):
            self._take(session, [draft])

    def _take(self, session: Session, drafts: Sequence[Draft | None]) -> None:
        """Append the drafts of a session's demand, and send them when it is time; fail the session where one is None.

        All are appended before any is sent: the cache that is told of holds them already.
        """
        demand, session.demand = session.demand, None
        assert demand is not None
        assert demand.started_at is not None
        queue_ms = max(0.0, demand.started_at - session.committed_at) * 1000
        forward_ms = (demand.ended_at - demand.started_at) * 1000 / len(drafts)
        for draft in drafts:
            if draft is None:
                self._fail(session, InternalError("the model returned NaN or infinity for this session"))
                return
            session.sequence.tokens.extend([draft.token_id])
            session.is_stopped = draft.token_prob < session.options.min_draft_prob
            session.held.append(_Held(draft, time.monotonic(), queue_ms, forward_ms, demand.batch_size))
        self._send_if_due(session)

    def _send_if_due(self, session: Session) -> None:
        if session.must_send:
            session.emit(session.take_held())


def _draw(logits: torch.Tensor, sessions: Sequence[Session]) -> list[Draft | None]:
    """Return a draft for each session's row of `logits` `[N, V]`; None where the row is no law."""
    if any(session.options.vocab_size < logits.shape[1] for session in sessions):
        logits = logits.clone()
        for row, session in zip(logits, sessions, strict=True):
            row[session.options.vocab_size :] = -torch.inf
    return draft_tokens(
        logits,
        [session.options.warping for session in sessions],
        [session.options.max_support for session in sessions],
        [session.number_of(0) for session in sessions],
    )
