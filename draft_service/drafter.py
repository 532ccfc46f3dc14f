"""Free-running drafting: every session whose sequence is shorter than its window gets one more token a pass.

Knows no gRPC.

Shapes: N sessions in a pass, V vocabulary size.
"""

from __future__ import annotations

import itertools
import logging
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch

from outrider.engine.engine import Demand, Engine
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.thread import ModelThread
from outrider.errors import FailedPreconditionError, InternalError, InvalidArgumentError, ServiceError
from outrider.probs import Draft, are_rows_finite, draw_drafts, probability_rows
from outrider.rng import AddressedUniforms, Purpose, SharedNoise
from outrider.warping import Warping

log = logging.getLogger(__name__)

GREEDY = Warping(temperature=0.0)


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
    """One drafted token, as it goes to the client."""

    commit_index: int
    position: int
    draft: Draft
    stopped: bool
    num_cached_tokens: int
    cache_digest: int
    queue_ms: float
    forward_ms: float
    batch_size: int


@dataclass(eq=False)
class Session:
    """One client stream. `emit` is called on the model thread; everything below it belongs to that thread."""

    options: DraftOptions
    emit: Callable[[Drafted | ServiceError], None]
    arrival: int
    window: int
    sequence: EngineSequence = field(default_factory=EngineSequence)
    commit_index: int = 0
    is_stopped: bool = False
    committed_at: float = field(default_factory=time.monotonic)
    demand: Demand | None = None
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


class Drafter:
    """Owns the engine's thread and the sessions on it."""

    def __init__(self, engine: Engine, context_length: int):
        self._engine, self._context_length = engine, context_length
        self.thread = ModelThread("draft-model", self._step)
        self._sessions: list[Session] = []
        self._arrivals = itertools.count()

    def open(self, options: DraftOptions, token_ids: Sequence[int], window: int, emit) -> Session:
        """Return a new session, which drafts at once.

        Raises:
            InvalidArgumentError: there are no tokens, or more than the context holds, or the window is out of range.
        """
        if not 1 <= len(token_ids) <= self._context_length:
            raise InvalidArgumentError(
                f"committed.token_ids holds {len(token_ids)} tokens: give 1 to {self._context_length}"
            )
        self._check_window(window, len(token_ids))
        session = Session(options, emit, next(self._arrivals), window)
        session.sequence.tokens.extend(token_ids)
        self.thread.post(lambda: self._begin(session))
        return session

    def commit(
        self,
        session: Session,
        commit_index: int,
        start_position: int,
        token_ids,
        prefix_digest: int,
        window: int,
        branch: int = 0,
    ) -> None:
        """Apply a commit before the next pass; an error that only the session's state shows is emitted."""
        self._check_window(window, start_position + len(token_ids))
        self.thread.post(
            lambda: self._commit(session, commit_index, start_position, token_ids, prefix_digest, window, branch)
        )

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

    def _commit(self, session, commit_index, start_position, token_ids, prefix_digest, window, branch) -> None:
        if session not in self._sessions:
            return
        tokens = session.sequence.tokens
        try:
            if commit_index != session.commit_index + 1:
                raise FailedPreconditionError(
                    f"commit_index is {commit_index} after {session.commit_index}: open a new session"
                )
            tokens.check_span(start_position, prefix_digest)
        except ServiceError as error:
            self._fail(session, error)
            return
        if tokens.num_agreeing(start_position, token_ids) < len(token_ids):
            session.sequence.rewrite(start_position, token_ids)
            session.demand = None
        if branch != session.branch:
            session.draw_under(branch)
        session.commit_index, session.window, session.is_stopped = commit_index, window, False
        session.committed_at = time.monotonic()

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
                finished = set(self._engine.run_pass([session.demand for session in wanting if session.demand]))
                self._draft([session for session in wanting if session.demand in finished])
            except Exception:
                log.exception("a forward pass failed; its sessions are told")
                for session in wanting:
                    self._fail(session, InternalError("the forward pass failed; the service's log says how"))
                return False
        return any(session.wants_token for session in self._sessions)

    def _draft(self, sessions: list[Session]) -> None:
        """Draw one token for each session whose row is there; a row with NaN or infinity ends its own session alone."""
        if not sessions:
            return
        logits = torch.cat([session.demand.rows[-1] for session in sessions if session.demand])
        finite = are_rows_finite(logits)
        for session in compress(sessions, map(operator.not_, finite)):
            self._fail(session, InternalError("the model returned NaN or infinity for this session"))
        healthy = list(compress(sessions, finite))
        if not healthy:
            return
        logits = logits[torch.tensor(finite, device=logits.device)]
        for row, session in zip(logits, healthy, strict=True):
            row[session.options.vocab_size :] = -torch.inf
        drafts = draw_drafts(
            probability_rows(logits, [session.options.warping for session in healthy]),
            [session.options.max_support for session in healthy],
            [session.numbers.at(len(session.sequence.tokens)) for session in healthy],
        )
        for session, draft in zip(healthy, drafts, strict=True):
            self._append(session, draft)

    def _append(self, session: Session, draft: Draft) -> None:
        """Take the drafted token into the sequence and send it."""
        demand, sequence = session.demand, session.sequence
        assert demand is not None
        assert demand.started_at is not None
        session.demand = None
        position = len(sequence.tokens)
        sequence.tokens.extend([draft.token_id])
        session.is_stopped = draft.token_prob < session.options.min_draft_prob
        session.emit(
            Drafted(
                commit_index=session.commit_index,
                position=position,
                draft=draft,
                stopped=session.is_stopped,
                num_cached_tokens=sequence.cache.length,
                cache_digest=sequence.tokens.digest(sequence.cache.length),
                queue_ms=max(0.0, demand.started_at - session.committed_at) * 1000,
                forward_ms=(demand.ended_at - demand.started_at) * 1000,
                batch_size=demand.batch_size,
            )
        )
