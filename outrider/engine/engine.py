"""Batches of tokens from many sequences, under a token budget and a cap on cached tokens.

A *demand* says: feed this sequence up to here and give me the rows of its last positions. Every pass shares its token
budget fairly among the demands, so a long prompt is fed in chunks and cannot stall the others. When cache memory runs
out, caches that nobody needs now are dropped, least recently used first; their tokens are kept and fed again when
they are needed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from operator import attrgetter

import torch

from outrider.common.callers import Caller
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.runner import DeviceRunner, DraftingRunner, Runner
from outrider.engine.fairness import FairPasses
from outrider.engine.kv_cache import Cache, SequenceCache
from outrider.protocol.tokens import TokenLog
from outrider.sampling.draws import Draft, Draws

MOST_REDUCED_ROWS = 128  # of one demand in a pass; wide rows of more would take much memory
QUICK_S = 0.01  # seconds for which the event loop of a service with one session may leave its messages


@dataclass(eq=False)
class Sequence:
    """The tokens of one session, and the cache, which holds some prefix of them."""

    tokens: TokenLog = field(default_factory=TokenLog)
    cache: Cache = field(default_factory=SequenceCache)  # Engine.add replaces it by one of its runner's kind
    caller: Caller = ()
    last_used: int = 0  # number of the pass
    num_evicted: int = 0  # leading tokens that evictions dropped and that have not been fed since
    is_spare: bool = False  # nobody's text, but a guess at one: the first to go where memory is short

    def rewrite(self, start_position: int, token_ids: SequenceOf[int]) -> None:
        """Make the tokens what they were before `start_position`, then `token_ids`; keep the cache where they agree."""
        unchanged = self.tokens.rewrite(start_position, token_ids)
        self._forget_behind(unchanged)

    def become(self, other: Sequence, length: int) -> None:
        """Make the tokens the first `length` of `other`; keep the cache where they agree."""
        self._forget_behind(self.tokens.become(other.tokens, length))

    def _forget_behind(self, unchanged: int) -> None:
        self.cache.truncate(min(self.cache.length, unchanged))
        self.num_evicted = min(self.num_evicted, unchanged)


@dataclass(eq=False)
class Demand:
    """Feed `sequence` up to position `end` and return the rows of the last `num_rows` positions before it.

    Demands that arrived earlier come first where not all can be served. Of very many rows `reduce` makes what is kept,
    as soon as they are there: it is given `[rows in one chunk, V]` and the token behind each, and returns as many rows.
    """

    sequence: Sequence
    end: int
    num_rows: int
    arrival: int
    reduce: Callable[[torch.Tensor, SequenceOf[int]], torch.Tensor] | None = None
    rows: list[torch.Tensor] = field(default_factory=list)  # of [rows in one chunk, V], or what `reduce` returned
    started_at: float | None = None  # seconds, time.monotonic, when the first pass began
    ended_at: float = 0.0
    batch_size: int = 0

    @property
    def num_left(self) -> int:
        """Tokens still to be fed."""
        return self.end - self.sequence.cache.length

    @property
    def num_wanted(self) -> int:
        """Tokens that are to be fed in the next pass."""
        return min(self.num_left, MOST_REDUCED_ROWS) if self.reduce else self.num_left

    @property
    def _first_unread(self) -> int:
        """Position of the first row that has not been read yet."""
        num_read = sum([len(rows) for rows in self.rows]) if self.rows else 0
        return self.end - self.num_rows + num_read

    def num_rows_in(self, num_tokens: int) -> int:
        """Return how many rows the next `num_tokens` tokens yield that have not been read yet."""
        return max(0, self.sequence.cache.length + num_tokens - self._first_unread)

    def take(self, rows: torch.Tensor) -> None:
        """Keep the next rows, or what they are reduced to."""
        if self.reduce:
            first = self._first_unread + 1
            rows = self.reduce(rows, self.sequence.tokens[first : first + len(rows)])
        self.rows.append(rows)


Then = Callable[[list[Demand]], None]  # what is done with the rows of demands


@dataclass
class EngineStats:
    """Counters since the start."""

    num_forward_passes: int = 0
    num_tokens_fed: int = 0
    num_rows: int = 0
    num_passes_by_batch_size: Counter[int] = field(default_factory=Counter)
    num_evictions: int = 0
    num_tokens_recomputed: int = 0
    forward_seconds: float = 0.0


class Engine:
    """Owns the runner and all caches. Used by one thread at a time, but for `is_quick`."""

    def __init__(self, runner: Runner, max_cached_tokens: int, max_batch_tokens: int, keep_caches: bool = True):
        """The cap is what one sequence of `max_cached_tokens` tokens costs: with blocks, whole blocks.

        With `keep_caches` off every demand is computed from its first token: an ablation, no way to save memory.
        """
        self.runner, self.stats = runner, EngineStats()
        self._max_cost, self._max_batch_tokens = runner.new_cache().cost(max_cached_tokens), max_batch_tokens
        self._keep_caches = keep_caches
        self._fair_passes = FairPasses(max_batch_tokens)
        # Questions that are slow, so that they are asked once.
        self._drafting = runner if keep_caches and isinstance(runner, DraftingRunner) else None
        self._asynchronous = runner if isinstance(runner, DeviceRunner) else None
        self._sequences: set[Sequence] = set()
        self._last_s = float("inf")  # of the last pass, or of several in one go

    @property
    def is_quick(self) -> bool:
        """Whether an event loop had better run the next pass itself than have a thread run it.

        With several sequences it reads what has come for the others meanwhile. Spare ones are nobody's. May be asked
        while another thread uses the engine.
        """
        if self._last_s >= QUICK_S:
            return False
        sequences = tuple(self._sequences)  # in one piece: the other thread may be adding one
        return sum(not sequence.is_spare for sequence in sequences) <= 1

    def charge(self, caller: Caller, num_tokens: int, seconds: float) -> None:
        """Take note of how long it took, beside passes, to do with tokens of a caller what he asks for."""
        self._fair_passes.charge(caller, num_tokens, seconds)

    def forget_passes(self) -> None:
        """Take the time of no pass so far for that of one to come: something was compiled in them."""
        self._fair_passes = FairPasses(self._max_batch_tokens)

    @property
    def num_cached_tokens(self) -> int:
        return sum(sequence.cache.length for sequence in self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Give the sequence a cache."""
        sequence.cache = self.runner.new_cache()
        self._sequences.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Free the sequence's cache."""
        self._sequences.discard(sequence)
        sequence.cache.clear()

    def follow(self, sequence: Sequence, other: Sequence, length: int) -> bool:
        """Make `sequence` the first `length` tokens of `other`, cache included.

        Returns:
            Whether memory sufficed; else the cache lacks some of what that of `other` holds.
        """
        sequence.become(other, length)
        cache, num_cached = sequence.cache, min(length, other.cache.length)
        if _cost_of_growing(cache, max(0, num_cached - cache.length)) > self._free() // 2:
            return False
        if num_cached > cache.length:
            cache.copy_from(other.cache, num_cached)
        return True

    def run_pass(self, demands: SequenceOf[Demand], then: Then = lambda _: None) -> list[Demand]:
        """Run one forward pass for `demands` (at least one) and return those that it finished.

        The others keep what they got; call again with them. When the model or `then` raises, all demands and caches are
        as before, but for caches that were dropped to free memory.

        Args:
            then: is called once with the demands that the pass finishes, and their rows. A device may be at work on
                these still, and does what it is given meanwhile as part of the pass.
        """
        shares = self._shares(sorted(demands, key=_arrival))
        started_at = time.monotonic()
        feeds = [self._feed(demand, num_tokens) for demand, num_tokens in shares]
        finished = [demand for demand, num_tokens in shares if num_tokens == demand.num_left]

        def hand_out(logits: torch.Tensor) -> None:
            parts = [logits] if len(feeds) == 1 else logits.split([feed.num_rows for feed in feeds])
            for (demand, _), rows in zip(shares, parts, strict=True):
                if len(rows):
                    self._hand_over(demand, rows)
            then(finished)

        with _AllOrNothing([demand for demand, _ in shares]):
            if self._asynchronous:
                self._asynchronous.forward_with(feeds, hand_out)
                ended_at = time.monotonic()
            else:
                logits = self.runner.forward(feeds)
                ended_at = time.monotonic()
                hand_out(logits)
        self._count(feeds, ended_at - started_at)
        for demand, _ in shares:
            demand.started_at = demand.started_at or started_at
            demand.ended_at, demand.batch_size = ended_at, len(shares)
            demand.sequence.last_used = self.stats.num_forward_passes
        if not self._keep_caches:
            for demand in finished:
                demand.sequence.cache.clear()
        return finished

    def _hand_over(self, demand: Demand, rows: torch.Tensor) -> None:
        began_at = time.monotonic()
        demand.take(rows)
        if demand.reduce:
            self.charge(demand.sequence.caller, len(rows), time.monotonic() - began_at)

    @property
    def drafts(self) -> bool:
        """Whether there is a way to draw several tokens in one go."""
        return self._drafting is not None

    def prepare_drafting(self) -> None:
        """Have the runner do now what the first drafts would otherwise wait for."""
        if self._drafting:
            self._drafting.prepare_drafting()

    def can_draft(self, demands: SequenceOf[Demand], sampling: Draws) -> bool:
        """Return whether `draft` can be called: the runner can, and all fits into one pass and into the caches."""
        if not self._drafting:
            return False
        sizes = [demand.num_left for demand in demands]
        if sum(sizes) > self._max_batch_tokens or not self._drafting.can_draft(sizes, sampling):
            return False
        num_draws = len(sampling.uniforms)
        caches = [demand.sequence.cache for demand in demands]
        costs = [_cost_of_growing(cache, size + num_draws - 1) for cache, size in zip(caches, sizes, strict=True)]
        return sum(costs) <= self._free()

    def draft(self, demands: SequenceOf[Demand], sampling: Draws) -> list[list[Draft | None]]:
        """Finish `demands` of one row each, and draw from the rows, draw after draw; return the drafts of each demand.

        See DraftingRunner.draft. Whoever asks extends the sequences by what was drawn. When this raises, all is as
        before.
        """
        assert self._drafting
        num_draws, num_sequences = sampling.uniforms.shape
        started_at = time.monotonic()
        feeds = [self._feed(demand, demand.num_left) for demand in demands]
        with _AllOrNothing(demands):
            drafts = self._drafting.draft(feeds, sampling)
        ended_at = time.monotonic()
        self._count(feeds, ended_at - started_at, num_draws - 1)
        for demand in demands:
            demand.started_at, demand.ended_at, demand.batch_size = started_at, ended_at, num_sequences
            demand.sequence.last_used = self.stats.num_forward_passes
        return [drafts[index::num_sequences] for index in range(num_sequences)]

    def _feed(self, demand: Demand, num_tokens: int) -> Feed:
        sequence, start = demand.sequence, demand.sequence.cache.length
        if sequence.num_evicted:
            self.stats.num_tokens_recomputed += max(0, min(sequence.num_evicted, start + num_tokens) - start)
            if start + num_tokens >= sequence.num_evicted:
                sequence.num_evicted = 0
        return Feed(sequence.cache, sequence.tokens[start : start + num_tokens], demand.num_rows_in(num_tokens))

    def _count(self, feeds: list[Feed], seconds: float, num_more: int = 0) -> None:
        """Count a pass, and `num_more` behind it of one token and one row for each of `feeds`."""
        stats, num_passes = self.stats, 1 + num_more
        num_tokens = num_rows = num_more * len(feeds)
        for feed in feeds:
            num_tokens += len(feed.token_ids)
            num_rows += feed.num_rows
        stats.num_forward_passes += num_passes
        stats.num_tokens_fed += num_tokens
        stats.num_rows += num_rows
        stats.num_passes_by_batch_size[len(feeds)] += num_passes
        stats.forward_seconds += seconds
        self._last_s = seconds
        self._fair_passes.add_pass(num_tokens / num_passes, seconds / num_passes)

    def fair_shares(self, demands: SequenceOf[Demand]) -> list[int]:
        """Return how many tokens of each demand the next pass shall feed, fairly among callers and for their sessions.

        Of a caller's sessions those come first that have been in no pass for the longest time.
        """
        order = sorted(demands, key=_waiting_order)
        shares = self._fair_passes.shares([(demand.sequence.caller, demand.num_wanted) for demand in order])
        share_of = dict(zip(order, shares, strict=True))
        return [share_of[demand] for demand in demands]

    def _shares(self, demands: list[Demand]) -> list[tuple[Demand, int]]:
        """Return how many tokens of each demand the next pass feeds; the earliest demand always gets some."""
        wanted = self.fair_shares(demands)
        wanted[0] = max(1, wanted[0])  # for whom caches are dropped if need be
        if sum(wanted) > self._max_batch_tokens:
            wanted[-1 - next(index for index, number in enumerate(reversed(wanted)) if number)] -= 1
        shares: list[tuple[Demand, int]] = []
        free = self._free()
        for index, demand in enumerate(demands):
            cache = demand.sequence.cache
            if not wanted[index]:
                continue
            num_tokens, cost = wanted[index], _cost_of_growing(cache, wanted[index])
            if cost > free:
                free = self._free_memory(cost, free, demands, index)
                num_tokens = max(0, min(num_tokens, cache.num_fitting(free)))
                cost = _cost_of_growing(cache, num_tokens)
            if num_tokens:
                shares.append((demand, num_tokens))
                free -= cost
        return shares

    def _free(self) -> int:
        return self._max_cost - sum([_cost(sequence.cache) for sequence in self._sequences])

    def _free_memory(self, needed: int, free: int, demands: list[Demand], index: int) -> int:
        """Drop caches until `needed` is free for `demands[index]`, or none is left to drop; return what is free then.

        Idle caches go first, spare ones before the others and then the least recently used; then those of demands that
        wait behind this one, the latest first. An earlier demand is never set back by a later one, so each is served
        in the end. Caches of a caller who holds no more than his share go for another one only where the earliest
        demand of all finds no other memory.
        """
        in_use = {demand.sequence for demand in demands}
        idle = sorted(self._sequences - in_use, key=lambda sequence: (not sequence.is_spare, sequence.last_used))
        later = [demand.sequence for demand in demands[index + 1 :]]
        victims = [victim for victim in (*idle, *reversed(later)) if victim.cache.length]
        is_spared = self._spared_for(demands[index].sequence)
        at_first = [victim for victim in victims if not is_spared(victim)]
        at_last = [victim for victim in victims if is_spared(victim)] if index == 0 else []
        for victim in [*at_first, *at_last]:
            if free >= needed:
                break
            free += _cost(victim.cache)
            self._evict(victim)
        return free

    def _spared_for(self, sequence: Sequence) -> Callable[[Sequence], bool]:
        """Return whether a cache is of another caller than that of `sequence`, who holds no more than a fair share."""
        width = 1 if len({its.caller[:1] for its in self._sequences}) > 1 else 2
        held: dict[Caller, int] = {}
        for its in self._sequences:
            held[its.caller[:width]] = held.get(its.caller[:width], 0) + _cost(its.cache)
        share = self._max_cost // len(held)
        spared = {caller for caller, cost in held.items() if cost <= share} - {sequence.caller[:width]}
        return lambda other: other.caller[:width] in spared

    def _evict(self, sequence: Sequence) -> None:
        sequence.num_evicted = max(sequence.num_evicted, sequence.cache.length)
        sequence.cache.clear()
        self.stats.num_evictions += 1


class _AllOrNothing:
    """Has caches and demands be what they were when a pass for them raises, whatever its runner has done by then."""

    def __init__(self, demands: SequenceOf[Demand]):
        self._before = [(demand, demand.sequence.cache.length, len(demand.rows)) for demand in demands]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            return
        for demand, length, num_parts in self._before:
            demand.sequence.cache.truncate(length)  # gives back what was reserved
            del demand.rows[num_parts:]


_arrival = attrgetter("arrival")


def _waiting_order(demand: Demand) -> tuple[bool, int, int]:
    return demand.sequence.is_spare, demand.sequence.last_used, demand.arrival


def _cost(cache: Cache) -> int:
    return cache.cost(cache.length)


def _cost_of_growing(cache: Cache, num_tokens: int) -> int:
    return cache.cost(cache.length + num_tokens) - _cost(cache)
