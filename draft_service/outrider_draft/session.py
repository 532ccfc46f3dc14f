"""One session of the draft service: what it has drafted on which path, and what it wants next.

A *path* is what follows the committed tokens. The main path is what the session proposes. While its round is being
verified there may be *forks*, which prepare for other ends of the round: each leaves the main path with a token that
the target may put in the place of a proposal, and goes on on a cache of its own. A commit makes one path the main one
and ends the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from outrider.common.callers import Caller
from outrider.engine.engine import Demand
from outrider.engine.engine import Sequence as EngineSequence
from outrider.protocol.errors import FailedPreconditionError, ServiceError
from outrider.sampling.distribution import DistributionParams, History
from outrider.sampling.draws import NO_SUPPORT, Draft
from outrider.sampling.rng import AddressedUniforms, Noise, Purpose, SharedNoise
from outrider_draft.alternatives import Alternative, likely_alternatives

LONGEST_HOLD_S = 0.01  # a drafted token waits for no others longer; slower drafts send each token as it comes
NUM_OTHERS = 2  # tokens a position that alternatives are chosen from


@dataclass(frozen=True)
class DraftOptions:
    """How one session drafts."""

    params: DistributionParams
    seed: int
    vocab_size: int  # ids at or above are never proposed
    max_support: int
    min_draft_prob: float
    branch: int = 0  # that drafting begins with; OpenProposals.branch in draft.proto
    shares_noise: bool = False  # draws with the target's; SamplingParams in common.proto
    max_alternatives: int = 0
    num_prompt_tokens: int = 0  # behind which the output begins

    @property
    def num_others(self) -> int:
        """How many other tokens each draft has to tell."""
        return NUM_OTHERS if self.max_alternatives else 0


@dataclass(frozen=True)
class Prepared:
    """What is proposed if the token at a position becomes another than was proposed; Alternative in draft.proto."""

    position: int
    token_id: int
    drafts: list[Draft]


@dataclass(frozen=True)
class Drafted:
    """Drafted tokens at consecutive positions, and alternatives to some, as they go to the client together."""

    commit_index: int
    start_position: int
    drafts: list[Draft]
    stopped: bool
    num_cached_tokens: int
    cache_digest: int
    queue_ms: float = 0.0
    forward_ms: float = 0.0  # of all passes that `drafts` took
    batch_size: int = 0
    alternatives: list[Prepared] = field(default_factory=list)


class _Held(NamedTuple):
    """One drafted token that has not been sent yet."""

    draft: Draft
    drawn_at: float
    queue_ms: float
    forward_ms: float
    batch_size: int


@dataclass(eq=False)
class Path:
    """Tokens drafted behind the committed ones, on a sequence that holds both."""

    session: Session
    sequence: EngineSequence = field(default_factory=EngineSequence)
    end: int = 0  # it is drafted while it is shorter
    alternative: Alternative | None = None  # that a fork prepares for; None for the main path
    drafts: list[Draft] = field(default_factory=list)  # what the sequence ends with
    held: list[_Held] = field(default_factory=list)  # for the last positions of the sequence
    demand: Demand | None = None

    @property
    def length(self) -> int:
        """Tokens of the sequence, committed and drafted."""
        return len(self.sequence.tokens)

    @property
    def wants_token(self) -> bool:
        """Whether the path is to be drafted further."""
        session = self.session
        if self is session.main:
            return session.is_open and session.wants_token
        return session.is_open and self.alternative is not None and self.length < self.end

    @property
    def can_run_ahead(self) -> bool:
        """Whether several tokens may be drafted in one go: no stop is likely, and no processor has to see each."""
        return not (self.session.options.min_draft_prob or self.session.options.params.processors)

    @property
    def num_wanted(self) -> int:
        """How many tokens may be drafted before they are sent: up to what is sent together."""
        until = self.session.batch_until
        is_in_round = self.alternative is None and self.length < until
        return (min(until, self.end) if is_in_round else self.end) - self.length

    @property
    def history(self) -> History | None:
        """What logits processors see behind the sequence; None where there are none."""
        options, tokens = self.session.options, self.sequence.tokens
        return (
            History(np.array(tokens[:], dtype=np.int64), options.num_prompt_tokens)
            if options.params.processors
            else None
        )

    def numbers(self, number: int) -> list[float | Noise]:
        """Return the random numbers of so many tokens from the sequence's end on."""
        first, numbers = self.length, self.session.numbers
        return [numbers.at(position) for position in range(first, first + number)]

    def append(self, drafts: Sequence[Draft], queue_ms: float, forward_ms: float, batch_size: int) -> None:
        """Add drafted tokens."""
        self.sequence.tokens.extend([draft.token_id for draft in drafts])
        self.drafts += drafts
        drawn_at = time.monotonic()
        self.held += [_Held(draft, drawn_at, queue_ms, forward_ms, batch_size) for draft in drafts]

    def rewrite(self, start_position: int, token_ids: Sequence[int]) -> None:
        """Make the sequence what it was before a position, then these tokens; what is held does not agree with them."""
        self.sequence.rewrite(start_position, token_ids)
        self.feed_last_again()
        self.demand, self.held = None, []

    def feed_last_again(self) -> None:
        """Have the last token fed for its row, even if the cache has it."""
        cache = self.sequence.cache
        cache.truncate(min(cache.length, self.length - 1))

    def stop(self) -> None:
        """Prepare for nothing."""
        self.alternative, self.demand, self.held = None, None, []

    def keep(self, num_undecided: int) -> None:
        """Forget the drafts and what is held for all but the last positions."""
        self.drafts = self.drafts[-num_undecided:] if num_undecided else []
        self.held = self.held[-num_undecided:] if num_undecided else []


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


class Session:
    """One client stream. Used by whoever drives the engine, who calls `emit` too."""

    def __init__(
        self,
        options: DraftOptions,
        emit: Callable[[Drafted | ServiceError], None],
        arrival: int,
        window: int,
        batch_until: int = 0,
        caller: Caller = (),
    ):
        self.is_open = True
        self.options, self.emit, self.arrival = options, emit, arrival
        self.batch_until, self.branch = batch_until, options.branch
        self.numbers = self._numbers()
        self.is_unread: Callable[[], bool] = lambda: False  # whether too much of what it emitted waits to be sent
        self.commit_index, self.is_stopped = 0, False
        self.committed_at = time.monotonic()
        self.main = Path(self, EngineSequence(caller=caller), end=window)
        self.forks: list[Path] = []  # those that prepare for nothing are kept for their caches
        self._accept = AddressedUniforms(options.seed, Purpose.ACCEPT)
        self._has_forked = False  # since the last commit
        self._owes_stop = False  # the client does not know yet that drafting has stopped
        self.gap_s: float | None = None  # the lesser of the last two, from a round's proposals to the next commit
        self._last_gap_s: float | None = None
        self._drafted_at: float | None = None  # when those of the present round were

    def begin(self, token_ids: Sequence[int]) -> None:
        """Commit the first tokens."""
        self.main.sequence.tokens.extend(token_ids)

    def _numbers(self) -> AddressedUniforms | SharedNoise:
        """Return the random numbers of the branch; noise that is shared has none."""
        seed = self.options.seed
        return SharedNoise(seed) if self.options.shares_noise else AddressedUniforms(seed, Purpose.DRAFT, self.branch)

    @property
    def num_committed(self) -> int:
        return self.main.length - len(self.main.drafts)

    # What it wants.

    @property
    def wants_token(self) -> bool:
        """Whether the main path is to be drafted further."""
        return not self.is_stopped and self.main.length < self.main.end

    @property
    def is_waited_for(self) -> bool:
        """Whether the client waits for proposals of its round, or for the next one where it takes them one by one."""
        return self.wants_token and (not self.batch_until or self.main.length < self.batch_until)

    @property
    def may_fork(self) -> bool:
        """Whether the proposals of a round are there, and nothing is prepared for its other ends yet."""
        if self._has_forked or self.is_stopped or not self.options.max_alternatives:
            return False
        return self.num_committed < self.batch_until <= self.main.length

    @property
    def has_work(self) -> bool:
        return not self.is_unread() and (self.wants_token or self.may_fork or bool(self.wanting_forks))

    @property
    def wanting_forks(self) -> list[Path]:
        return [fork for fork in self.forks if fork.alternative is not None and fork.wants_token]

    def append(self, path: Path, drafts: Sequence[Draft], queue_ms: float, forward_ms: float, batch_size: int) -> None:
        """Add drafted tokens to a path; `forward_ms` is that of one of them."""
        options = self.options
        if options.num_others < NUM_OTHERS:
            drafts = [draft.with_others(options.num_others) for draft in drafts]
        path.append(drafts, queue_ms, forward_ms, batch_size)
        self.is_stopped = drafts[-1].token_prob < options.min_draft_prob
        self._note_time()

    def stop(self) -> None:
        """Draft nothing more until the next commit, since no token may follow."""
        self.is_stopped = self._owes_stop = True
        self.main.feed_last_again()

    def _note_time(self) -> None:
        if self._drafted_at is None and self.num_committed < self.batch_until <= self.main.length:
            self._drafted_at = time.monotonic()

    # What it sends.

    @property
    def must_send(self) -> bool:
        """Whether what is held has waited for all that it should, or for long enough."""
        held, end = self.main.held, self.main.length
        if not held:
            return self._owes_stop or any(self._finished_forks())
        if not self.batch_until:
            return True
        has_all = end >= self.batch_until > end - len(held)
        return has_all or not self.wants_token or time.monotonic() - held[0].drawn_at > LONGEST_HOLD_S

    def _finished_forks(self) -> list[Path]:
        """Return the forks that have not been sent yet, once all of them are drafted."""
        return [] if self.wanting_forks else [fork for fork in self.forks if fork.alternative and fork.held]

    def take_held(self) -> Drafted:
        """Return what is held; nothing is held afterwards."""
        main, held, forks = self.main, self.main.held, self._finished_forks()
        main.held, self._owes_stop = [], False
        cache, tokens = main.sequence.cache, main.sequence.tokens
        drafted = Drafted(
            commit_index=self.commit_index,
            start_position=main.length - len(held),
            drafts=[item.draft for item in held],
            stopped=self.is_stopped,
            num_cached_tokens=cache.length,
            cache_digest=tokens.digest(cache.length),
            queue_ms=held[0].queue_ms if held else 0.0,
            forward_ms=sum(item.forward_ms for item in held),
            batch_size=held[-1].batch_size if held else 0,
            alternatives=[self._prepared(fork) for fork in forks],
        )
        for fork in forks:
            fork.held = []
        return drafted

    def _prepared(self, fork: Path) -> Prepared:
        assert fork.alternative
        position = self.num_committed + fork.alternative.index
        return Prepared(position, fork.alternative.token_id, [item.draft for item in fork.held])

    # Commits.

    def commit(self, commit: Commit) -> None:
        """Go on behind a commit, on the path that agrees with it if there is one.

        Raises:
            FailedPreconditionError: it does not follow the one before, or stands on other tokens.
        """
        if commit.index != self.commit_index + 1:
            raise FailedPreconditionError(
                f"commit_index is {commit.index} after {self.commit_index}: open a new session"
            )
        self._go_to(self._path_agreeing_with(commit))
        tokens = self.main.sequence.tokens
        tokens.check_span(commit.start_position, commit.prefix_digest)
        is_new_branch = commit.branch != self.branch
        agrees = tokens.num_agreeing(commit.start_position, commit.token_ids) == len(commit.token_ids)
        is_taken_back = commit.start_position + len(commit.token_ids) < self.num_committed
        if is_new_branch or is_taken_back or not agrees:
            self.main.rewrite(commit.start_position, commit.token_ids)
        if is_new_branch:
            self.branch = commit.branch
            self.numbers = self._numbers()
        self._see_gap()
        self.main.keep(max(0, len(tokens) - commit.start_position - len(commit.token_ids)))
        self.main.end, self.batch_until = commit.window, commit.batch_until
        self.commit_index, self.is_stopped, self._has_forked, self._owes_stop = commit.index, False, False, False
        self.committed_at = time.monotonic()
        self._note_time()

    def _see_gap(self) -> None:
        """Note the time since the round's proposals were there; one gap alone may span rounds that had none of them."""
        if self._drafted_at is not None:
            gap_s, before_s = time.monotonic() - self._drafted_at, self._last_gap_s
            self.gap_s = None if before_s is None else min(gap_s, before_s)
            self._last_gap_s = gap_s
        self._drafted_at = None

    def _path_agreeing_with(self, commit: Commit) -> Path:
        """Return the path that agrees longest with a commit, the main one where some agree alike."""
        base = self.num_committed
        if commit.start_position != base:
            return self.main
        paths = [self.main, *(fork for fork in self.forks if fork.alternative)]
        return max(paths, key=lambda path: path.sequence.tokens.num_agreeing(base, commit.token_ids))

    def _go_to(self, path: Path) -> None:
        """Make a path the main one, and have no forks."""
        for fork in self.forks:
            if fork is not path:
                fork.stop()
        if path is not self.main:
            self.forks[self.forks.index(path)] = self.main
            self.main.sequence.is_spare, path.sequence.is_spare = True, False
            self.main.stop()
            self.main, path.alternative = path, None

    # Forks.

    def likely_alternatives(self, most: int) -> list[Alternative]:
        """Return at most so many ends of the round to prepare for; once for every commit."""
        self._has_forked = True
        base = self.num_committed
        in_round = self.main.drafts[: self.batch_until - base]
        is_judged = not (self.options.params.is_greedy or self.options.shares_noise)
        uniforms = [self._accept.at(base + index) for index in range(len(in_round))] if is_judged else None
        has_room = [it for it in likely_alternatives(in_round, uniforms) if base + it.index + 1 < self.main.end]
        return has_room[: min(most, self.options.max_alternatives)]

    def begin_fork(self, fork: Path, alternative: Alternative) -> None:
        """Have a fork, whose sequence is the main one's up to the alternative, prepare for it."""
        fork.alternative = alternative
        fork.drafts = [*self.main.drafts[: alternative.index], Draft(alternative.token_id, NO_SUPPORT, NO_SUPPORT, 1.0)]
        fork.sequence.tokens.extend([alternative.token_id])
        fork.end = min(self.batch_until + alternative.index + 1, self.main.end)
