"""Continuous batching of rounds: the next pass takes whatever has arrived while the present one ran, and may wait for
what is about to (batch_delay.py). Knows no gRPC.

A round becomes a demand on the engine: feed the pending token and all proposals but the last, return one row for
each.

Shapes: K proposals of one round, V vocabulary size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from outrider.common.callers import Caller
from outrider.engine.engine import Demand, Engine
from outrider.engine.engine import Sequence as EngineSequence
from outrider.engine.isolation import failed_alone, in_halves
from outrider.engine.thread import ModelThread
from outrider.protocol.errors import InternalError, InvalidArgumentError, ServiceError, raise_errors_in
from outrider.sampling.distribution import FILTERED, DistributionParams, History, OutputMask, no_token_left
from outrider.sampling.draws import NO_SUPPORT, Reading, TargetRows
from outrider.sampling.logprobs import PromptLogprobs, logprobs_of, prompt_logprobs_of, scores_of
from outrider.sampling.pipeline import begin_reading, joined, leaves_no_token
from outrider.sampling.rng import AddressedUniforms, Noise, Purpose, SharedNoise
from outrider_target.batch_delay import BatchDelay

NOT_FINITE = "the model returned NaN or infinity for this session"
IDS_OF_A_ROW = 256  # of a support, that take as long as reading a row without any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Committed tokens at absolute positions; TokenSpan in common.proto."""

    start_position: int
    token_ids: Sequence[int]
    prefix_digest: int

    @property
    def end(self) -> int:
        return self.start_position + len(self.token_ids)


@dataclass(frozen=True)
class Round:
    """What a client wants verified."""

    committed: Span
    proposed_ids: Sequence[int]  # [K]
    supports: Sequence[np.ndarray]  # K of [num_support] int64, ascending


@dataclass(frozen=True)
class Verdict:
    """The rows of a round, or the log-probabilities of an opening's tokens, and what it took."""

    rows: TargetRows
    num_cached_tokens: int
    cache_digest: int
    queue_ms: float
    forward_ms: float
    batch_size: int
    prompt_logprobs: PromptLogprobs | None = None


Emit = Callable[[Verdict | ServiceError], None]


@dataclass(frozen=True)
class Scoring:
    """That the tokens of an opening are scored, with so many likeliest ones, and whom to tell."""

    num_likeliest: int
    emit: Emit
    arrived_at: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Session:
    """One client stream. Everything but the two settings belongs to whoever drives the engine."""

    params: DistributionParams
    numbers: AddressedUniforms | SharedNoise  # that tokens outside the supports are drawn with
    sequence: EngineSequence = field(default_factory=EngineSequence)
    num_prompt_tokens: int = 0  # behind which the output begins
    num_logprobs: int | None = None  # likeliest tokens whose log-probabilities rows report; None: no row reports any
    scoring: Scoring | None = None  # of the tokens that it opens with, until it is answered
    grammar: OutputMask | None = None  # that the output follows
    is_open: bool = True
    failure: ServiceError | None = None  # what its next round is answered with


@dataclass(eq=False)
class _Job:
    """A demand, and whom to tell."""

    session: Session
    demand: Demand
    arrived_at: float
    round: Round
    emit: Emit


class Scheduler:
    """Owns the engine's thread and the jobs on it."""

    def __init__(self, engine: Engine, context_length: int):
        self._engine, self._context_length = engine, context_length
        self.thread = ModelThread("target-model", self._step, lambda: engine.is_quick, self._batch_delay_s)
        self._batch_delay = BatchDelay()
        self._prefills: dict[Session, Demand] = {}
        self._jobs: dict[Session, _Job] = {}
        self._arrivals = itertools.count()

    def warm_up(self, vocab_size: int) -> None:
        """Answer rounds with and without proposals, and through filters; the thread must not run yet.

        Raises:
            ServiceError: a round failed, as others would.
        """
        answers: list[Verdict | ServiceError] = []
        most_proposals, plain = 2 if self._context_length > 2 else 0, DistributionParams()
        for params, num_proposals in ((plain, 0), (plain, most_proposals), (FILTERED, most_proposals)):
            session = Session(params, AddressedUniforms(0, Purpose.OUTSIDE))
            session.sequence.tokens.extend([0])
            self._begin(session)
            proposals, supports = [0] * num_proposals, [np.arange(min(2, vocab_size))] * num_proposals
            self._enqueue(session, Round(Span(0, [0], 0), proposals, supports), time.monotonic(), answers.append)
            while self._step():
                pass
            self._end(session)
        self._engine.forget_passes()
        self._batch_delay = BatchDelay()  # passes in which something was compiled say nothing of others
        raise_errors_in(answers)

    def open(
        self,
        params: DistributionParams,
        seed: int,
        committed: Span,
        shares_noise: bool = False,
        caller: Caller = (),
        num_prompt_tokens: int = 0,
        num_logprobs: int | None = None,
        scoring: Scoring | None = None,
        grammar: OutputMask | None = None,
    ) -> Session:
        """Return a new session whose committed tokens are processed at once, all but the pending last one.

        With `shares_noise`, its tokens are drawn with the noise that drafts share; SamplingParams in common.proto.
        Passes are shared fairly among callers. With a `scoring`, rounds may be submitted once it is answered.

        Raises:
            InvalidArgumentError: there are no tokens, or more than the context holds.
        """
        if not 1 <= len(committed.token_ids) <= self._context_length:
            raise InvalidArgumentError(
                f"committed.token_ids holds {len(committed.token_ids)} tokens: give 1 to {self._context_length}"
            )
        needs_noise = shares_noise and not params.is_greedy  # a greedy draw is the same with any number
        numbers = SharedNoise(seed) if needs_noise else AddressedUniforms(seed, Purpose.OUTSIDE)
        told = num_prompt_tokens, num_logprobs, scoring, grammar
        session = Session(params, numbers, EngineSequence(caller=caller), *told)
        session.sequence.tokens.extend(committed.token_ids)
        self.thread.post(lambda: self._begin(session), is_long=True)
        return session

    def submit(self, session: Session, work: Round, emit: Emit) -> None:
        """Queue a round, one at a time for each session; `emit` gets its verdict or what went wrong."""
        arrived_at = time.monotonic()
        self.thread.post(lambda: self._enqueue(session, work, arrived_at, emit))

    def is_busy(self, session: Session) -> bool:
        """Return whether there is work for the session; from any thread."""
        return session in self._jobs or session in self._prefills

    def close(self, session: Session) -> None:
        """Drop the session's work and free its cache before the next forward pass."""
        self.thread.post(lambda: self._end(session))

    def _begin(self, session: Session) -> None:
        try:
            self._engine.add(session.sequence)
        except Exception as error:
            self._fail(session, error)
            return
        num_prefill, scoring = len(session.sequence.tokens) - 1, session.scoring
        demand = self._demand(session, num_prefill, num_rows=num_prefill if scoring else 0)
        if scoring:
            demand.reduce = partial(scores_of, num_likeliest=scoring.num_likeliest)
        if num_prefill:
            self._prefills[session] = demand
        else:
            self._finish_prefill(session, demand)

    def _demand(self, session: Session, end: int, num_rows: int) -> Demand:
        """Return a demand for tokens up to `end`; those whose rows are wanted are fed, again if need be."""
        cache = session.sequence.cache
        cache.truncate(min(cache.length, end - num_rows))
        return Demand(session.sequence, end, num_rows, next(self._arrivals))

    def _enqueue(self, session: Session, work: Round, arrived_at: float, emit: Emit) -> None:
        if not session.is_open:
            return
        if session.failure:
            emit(session.failure)
            return
        try:
            demand = self._apply(session, work)
        except ServiceError as error:
            emit(error)
            return
        except Exception as error:
            self._fail(session, error)
            emit(failed_alone())
            return
        self._prefills.pop(session, None)  # the round includes what is left of it
        self._jobs[session] = _Job(session, demand, arrived_at, work, emit)
        self._batch_delay.on_round(session, demand.num_left, arrived_at)

    def _apply(self, session: Session, work: Round) -> Demand:
        """Bring the sequence to the round's tokens and return the demand for its rows."""
        span, num_rows = work.committed, max(1, len(work.proposed_ids))
        session.sequence.tokens.check_span(span.start_position, span.prefix_digest)
        if span.end < 1:
            raise InvalidArgumentError("committed leaves no token: a round needs a pending token before its proposals")
        if span.end + len(work.proposed_ids) > self._context_length:
            end = span.end + len(work.proposed_ids)
            raise InvalidArgumentError(f"the proposals end at position {end}: the context has {self._context_length}")
        session.sequence.rewrite(span.start_position, [*span.token_ids, *work.proposed_ids[:-1]])
        return self._demand(session, len(session.sequence.tokens), num_rows)

    def _end(self, session: Session) -> None:
        session.is_open = False
        self._prefills.pop(session, None)
        self._jobs.pop(session, None)
        self._engine.remove(session.sequence)
        self._batch_delay.forget(session)

    def _batch_delay_s(self) -> float:
        """Return for how long the next pass waits for rounds that are about to come; prompts wait for nobody."""
        if not self._jobs or self._prefills:
            return 0.0
        return self._batch_delay.seconds(len(self._jobs), time.monotonic())

    def _step(self) -> bool:
        owners = {demand: session for session, demand in self._prefills.items()}
        for session, job in self._jobs.items():
            owners[job.demand] = session
        if not owners:
            return False
        began_at, num_fed = time.monotonic(), self._engine.stats.num_tokens_fed
        passes = in_halves(self._run_pass, list(owners), lambda demand, error: self._fail(owners[demand], error))
        for _, reading in passes:
            if reading:
                self._answer(reading)
        if not self._prefills and len(passes) == 1:
            self._batch_delay.add_pass(self._engine.stats.num_tokens_fed - num_fed, time.monotonic() - began_at)
        if self._prefills:
            finished = {demand for its_finished, _ in passes for demand in its_finished}
            for session, demand in list(self._prefills.items()):
                if demand in finished:
                    del self._prefills[session]
                    self._finish_prefill(session, demand)
        return bool(self._prefills or self._jobs)

    def _finish_prefill(self, session: Session, demand: Demand) -> None:
        """Answer an opening that asks for it."""
        if not session.scoring:
            return
        try:
            found = prompt_logprobs_of(demand.rows)
        except Exception as error:
            self._fail(session, error)
            return
        answer: Verdict | ServiceError = InternalError(NOT_FINITE)
        if found:
            answer = _verdict_of(demand, session.scoring.arrived_at, TargetRows([], [], [], []), found)
        else:
            session.sequence.cache.clear()
        self._answer_opening(session, answer)

    def _answer_opening(self, session: Session, answer: Verdict | ServiceError) -> None:
        if session.scoring:
            emit, session.scoring = session.scoring.emit, None
            self._emit(session, emit, answer)

    def _run_pass(self, demands: Sequence[Demand]) -> tuple[list[Demand], _Reading | None]:
        """Run a pass for some demands; return those that it finished, and the reading of the rounds among them."""
        begun: list[_Reading] = []
        finished = self._engine.run_pass(demands, lambda its: begun.extend(self._begin_reading(its)))
        return finished, begun[0] if begun else None

    def _begin_reading(self, demands: list[Demand]) -> list[_Reading]:
        """Begin to read the rows of all rounds among `demands` together: one reading, or none.

        What raises here is no fault of the pass, and is raised again when the result is asked for.
        """
        finished = set(demands)
        jobs = [job for job in self._jobs.values() if job.demand in finished]
        if not jobs:
            return []
        try:
            return [_Reading(jobs, _begin_reading(jobs))]
        except Exception as error:
            return [_Reading(jobs, _raiser(error))]

    def _answer(self, reading: _Reading) -> None:
        """Answer rounds when their rows are read; what cannot be read fails the rounds that it belongs to."""

        def read(jobs: Sequence[_Job]) -> list[tuple[_Job, TargetRows | None]]:
            its = reading if len(jobs) == len(reading.jobs) else _Reading(jobs, _begin_reading(jobs))
            return list(zip(jobs, its.rows_by_job(), strict=True))

        began_at = time.monotonic()
        for part in in_halves(read, reading.jobs, lambda job, error: self._fail(job.session, error)):
            for job, rows in part:
                self._reply(job, self._verdict(job, rows))
        self._charge(reading.jobs, time.monotonic() - began_at)

    def _charge(self, jobs: Sequence[_Job], seconds: float) -> None:
        """Charge what reading rounds took, to each caller by the numbers that were read for it."""
        sizes = [IDS_OF_A_ROW * job.demand.num_rows + sum(map(len, job.round.supports)) for job in jobs]
        total = sum(sizes)
        for job, size in zip(jobs, sizes, strict=True):
            self._engine.charge(job.session.sequence.caller, job.demand.num_rows, seconds * size / total)

    def _verdict(self, job: _Job, rows: TargetRows | None) -> Verdict | ServiceError:
        """Return what a round is answered with; one whose first row is no distribution fails alone."""
        sequence, demand = job.session.sequence, job.demand
        if rows is None:
            if _leaves_no_token(job):
                grammar = job.session.grammar
                why = grammar.failure if grammar else None
                return InvalidArgumentError(no_token_left(job.session.params, job.round.committed.end, why))
            sequence.cache.clear()
            return InternalError(NOT_FINITE)
        return _verdict_of(demand, job.arrived_at, rows)

    def _fail(self, session: Session, error: Exception) -> None:
        """Fail the session that made something raise; what its cache holds is not to be trusted."""
        log.error("a session failed", exc_info=error)
        session.failure = failed_alone()
        session.sequence.cache.clear()
        self._prefills.pop(session, None)
        if session in self._jobs:
            self._reply(self._jobs[session], session.failure)
        self._answer_opening(session, session.failure)

    def _reply(self, job: _Job, answer: Verdict | ServiceError) -> None:
        del self._jobs[job.session]
        self._batch_delay.on_answer(job.session, time.monotonic())
        self._emit(job.session, job.emit, answer)

    def _emit(self, session: Session, emit: Emit, answer: Verdict | ServiceError) -> None:
        try:
            emit(answer)
        except Exception:
            log.exception("nobody takes an answer; its session ends")
            self._end(session)


@dataclass(frozen=True)
class _Reading:
    """Rounds whose rows are read, one batch of logits for all."""

    jobs: Sequence[_Job]
    result: Reading

    def rows_by_job(self) -> list[TargetRows | None]:
        """Wait for the rows and return each job's up to the first that is no distribution; None where there are none.

        Whether the text comes to such a row is decided by the ones before it: no proposal may end a session.
        """
        rows, finite = self.result()
        if len(self.jobs) == 1 and all(finite):
            return [_with_logprobs(self.jobs[0], rows)]
        borders = pairwise([0, *accumulate(job.demand.num_rows for job in self.jobs)])
        ends = [(start, next((at for at in range(start, end) if not finite[at]), end)) for start, end in borders]
        return [
            _with_logprobs(job, rows.part(start, end)) if end > start else None
            for job, (start, end) in zip(self.jobs, ends, strict=True)
        ]


def _verdict_of(
    demand: Demand, arrived_at: float, rows: TargetRows, prompt_logprobs: PromptLogprobs | None = None
) -> Verdict:
    sequence, started_at = demand.sequence, demand.started_at
    return Verdict(
        rows=rows,
        num_cached_tokens=sequence.cache.length,
        cache_digest=sequence.tokens.digest(sequence.cache.length),
        queue_ms=(started_at - arrived_at) * 1000 if started_at else 0.0,
        forward_ms=(demand.ended_at - started_at) * 1000 if started_at else 0.0,
        batch_size=demand.batch_size,
        prompt_logprobs=prompt_logprobs,
    )


def _raiser(error: Exception) -> Reading:
    def result() -> tuple[TargetRows, list[bool]]:
        raise error

    return result


def _begin_reading(jobs: Sequence[_Job]) -> Reading:
    """Begin to read the rows of `jobs`, all of which the engine has computed or is computing."""
    logits = [joined(job.demand.rows) for job in jobs]
    params: list[DistributionParams] = []
    supports: list[np.ndarray] = []
    numbers: list[float | Noise] = []
    histories: list[History | None] = []
    for job in jobs:
        first, size = job.round.committed.end, job.demand.num_rows
        params += [job.session.params] * size
        supports += job.round.supports or [NO_SUPPORT]
        numbers += [job.session.numbers.at(first + offset) for offset in range(size)]
        histories += _histories_of(job, size)
    return begin_reading(logits, params, supports, numbers, histories)


def _histories_of(job: _Job, num_rows: int) -> list[History | None]:
    """Return what logits processors see behind each row: committed tokens, and the proposals in front of it."""
    session = job.session
    if not session.params.processors:
        return [None] * num_rows
    token_ids, first = np.array(session.sequence.tokens[:], dtype=np.int64), job.round.committed.end
    seen = session.num_prompt_tokens, session.grammar
    return [History(token_ids[: first + offset], *seen) for offset in range(num_rows)]


def _leaves_no_token(job: _Job) -> bool:
    """Return whether it is the logits processors that make the first row of `job` no distribution."""
    row, [history] = job.demand.rows[0][0], _histories_of(job, 1)
    return leaves_no_token(row, job.session.params, history, len(row))


def _with_logprobs(job: _Job, rows: TargetRows) -> TargetRows:
    """Return a round's rows with log-probabilities by the model's own logits, where its session asks for them."""
    if job.session.num_logprobs is None:
        return rows
    num_rows, number = len(rows.outside_token_ids), job.session.num_logprobs
    supports = job.round.supports[:num_rows] or [NO_SUPPORT]
    logits = joined(job.demand.rows)[:num_rows]
    return replace(rows, logprobs=logprobs_of(logits, supports, rows.outside_token_ids, number))
