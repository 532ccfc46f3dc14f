"""Batches under a token budget and a cap on cached tokens: whatever is dropped or chunked, every demand gets its rows.

The model is replaced by a runner whose cache entries are the tokens themselves and whose row at a position is the
digest of all tokens up to it. So a row tells whether the cache held exactly the right tokens, and no arithmetic can
blur it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence as SequenceOf
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.engine import engine as engine_module
from outrider.engine.backends.batch import Feed
from outrider.engine.engine import Demand, Engine, Sequence
from outrider.engine.fairness import fair_shares
from outrider.engine.kv_cache import SequenceCache
from outrider.protocol.tokens import TokenLog

MAX_LENGTH = 40  # of a sequence


class DigestRunner:
    """Stands for ModelRunner. A row is `[position, low half, high half of the digest]`, float64, exact below 2^53."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.passes: list[list[tuple[int, int, int]]] = []  # for each feed: start, tokens, rows
        self.starts: dict[SequenceCache, int] = {}  # of the last pass

    def new_cache(self) -> SequenceCache:
        return SequenceCache()

    @torch.inference_mode()
    def forward(self, feeds: SequenceOf[Feed]) -> torch.Tensor:
        rows = []
        self.passes.append([(feed.cache.length, len(feed.token_ids), feed.num_rows) for feed in feeds])
        self.starts = {feed.cache: feed.cache.length for feed in feeds}
        for feed in feeds:
            assert feed.token_ids, "a feed without tokens"
            new = torch.tensor(feed.token_ids, dtype=torch.float64).reshape(1, -1, 1)
            cached, _ = feed.cache.write(0, new, new)
            feed.cache.advance(len(feed.token_ids))
            log = TokenLog([int(token_id) for token_id in cached.flatten()])
            rows += [digest_row(log, end) for end in range(len(log) - feed.num_rows + 1, len(log) + 1)]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def digest_row(log: TokenLog, end: int) -> list[float]:
    """Return the row at the last of the first `end` tokens."""
    return [end - 1, log.digest(end) & 0xFFFFFFFF, log.digest(end) >> 32]


def right_rows(demand: Demand) -> list[list[float]]:
    return [digest_row(demand.sequence.tokens, end) for end in range(demand.end - demand.num_rows + 1, demand.end + 1)]


def engine_of(max_cached_tokens: int = 1000, max_batch_tokens: int = 1000, **options) -> tuple[Engine, DigestRunner]:
    runner = DigestRunner()
    return Engine(runner, max_cached_tokens, max_batch_tokens, **options), runner  # type: ignore[arg-type]


def sequence_of(engine: Engine, num_tokens: int, first: int = 0) -> Sequence:
    sequence = Sequence(TokenLog(range(first, first + num_tokens)))
    engine.add(sequence)
    return sequence


def run_all(engine: Engine, demands: list[Demand]) -> int:
    """Run passes until all demands are served, check their rows, and return how many passes it took."""
    waiting, num_passes = list(demands), 0
    while waiting:
        finished = engine.run_pass(waiting)
        waiting = [demand for demand in waiting if demand not in finished]
        num_passes += 1
        assert num_passes <= sum(demand.end for demand in demands), "no progress"
    for demand in demands:
        assert torch.cat(demand.rows).tolist() == right_rows(demand)
    return num_passes


class TestFairShares:
    @pytest.mark.parametrize(
        ("wanted", "budget", "shares"),
        [
            ([3, 4], 10, [3, 4]),
            ([100, 100], 10, [5, 5]),
            ([100, 1, 100], 11, [5, 1, 5]),
            ([100, 2, 4], 12, [6, 2, 4]),
            ([7], 3, [3]),
            ([9, 9, 9], 4, [1, 1, 2]),
            ([1, 1, 1], 3, [1, 1, 1]),
            ([], 5, []),
        ],
        ids=["enough", "halves", "small_first", "rest_to_large", "alone", "remainder", "one_each", "nobody"],
    )
    def test_a_small_wish_is_granted_and_the_rest_divided(self, wanted, budget, shares):
        assert fair_shares(wanted, budget) == shares

    @given(wanted=st.lists(st.integers(1, 50), min_size=1, max_size=8), budget=st.integers(1, 120))
    def test_shares_are_max_min_fair(self, wanted, budget):
        """Whoever got less than it wanted got no less than anyone, to one token; and nothing wanted is left."""
        shares = fair_shares(wanted, budget)
        assert sum(shares) == min(budget, sum(wanted))
        for wish, share in zip(wanted, shares, strict=True):
            assert share <= wish
            assert share == wish or share >= max(shares) - 1
            assert share >= 1 or len(wanted) > budget


def test_one_pass_serves_many_sequences():
    engine, runner = engine_of()
    demands = [Demand(sequence_of(engine, length), length, length, 0) for length in (1, 5, 9)]
    assert run_all(engine, demands) == 1
    assert runner.passes == [[(0, 1, 1), (0, 5, 5), (0, 9, 9)]]
    assert engine.stats.num_passes_by_batch_size == {3: 1}
    assert [demand.batch_size for demand in demands] == [3, 3, 3]
    assert (engine.stats.num_forward_passes, engine.stats.num_tokens_fed, engine.stats.num_rows) == (1, 15, 15)
    assert engine.num_cached_tokens == 15


@pytest.mark.parametrize("max_cached_tokens", [1000, 60])
def test_many_rows_are_reduced_as_they_come_each_with_the_token_behind_it(monkeypatch, max_cached_tokens):
    """Three prompts of 30 tokens find place for two where the cap is 60, so caches are dropped in the middle."""
    monkeypatch.setattr(engine_module, "MOST_REDUCED_ROWS", 7)
    engine, runner = engine_of(max_cached_tokens=max_cached_tokens, max_batch_tokens=50)

    def keep(rows: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
        assert len(rows) == len(token_ids) <= 7
        return torch.cat([rows, torch.tensor(token_ids)[:, None].double()], -1)

    demands = [Demand(sequence_of(engine, 31, 100 * number), 30, 30, number, keep) for number in range(3)]
    waiting = list(demands)
    while waiting:
        finished = engine.run_pass(waiting)
        waiting = [demand for demand in waiting if demand not in finished]
    for number, demand in enumerate(demands):
        behind = [100 * number + index for index in range(1, 31)]
        assert torch.cat(demand.rows).tolist() == [
            [*row, it] for row, it in zip(right_rows(demand), behind, strict=True)
        ]
    assert bool(engine.stats.num_evictions) == (max_cached_tokens == 60)
    assert all(num_tokens <= 7 for feeds in runner.passes for _, num_tokens, _ in feeds)


def test_a_long_prompt_is_fed_in_chunks_and_stalls_nobody():
    """Budget 10: the prompt of 23 leaves capacity for the short demand in the first pass."""
    engine, runner = engine_of(max_batch_tokens=10)
    prompt, short = sequence_of(engine, 23), sequence_of(engine, 3)
    demands = [Demand(prompt, 23, 2, 0), Demand(short, 3, 1, 1)]
    assert run_all(engine, demands) == 3
    assert runner.passes == [[(0, 7, 0), (0, 3, 1)], [(7, 10, 0)], [(17, 6, 2)]]


def test_rows_that_span_chunks_come_once_and_in_order():
    engine, runner = engine_of(max_batch_tokens=3)
    run_all(engine, [Demand(sequence_of(engine, 8), 8, 6, 0)])
    assert runner.passes == [[(0, 3, 1)], [(3, 3, 3)], [(6, 2, 2)]]


def test_a_prefill_wants_no_rows():
    engine, runner = engine_of()
    sequence = sequence_of(engine, 9)
    assert engine.run_pass([Demand(sequence, 8, 0, 0)])
    assert runner.passes == [[(0, 8, 0)]]
    run_all(engine, [Demand(sequence, 9, 1, 1)])
    assert runner.passes[1:] == [[(8, 1, 1)]]


def test_what_follows_a_pass_gets_the_demands_that_it_finishes_with_all_their_rows():
    """Budget 10 of 14 tokens: the long demand is finished by the second pass, with rows of both."""
    engine, _ = engine_of(max_batch_tokens=10)
    demands = [Demand(sequence_of(engine, 11), 11, 7, 0), Demand(sequence_of(engine, 3), 3, 1, 1)]
    reported: list[list[Demand]] = []

    def follow(finished: list[Demand]) -> None:
        reported.append(list(finished))
        for demand in finished:
            assert torch.cat(demand.rows).tolist() == right_rows(demand)

    assert engine.run_pass(demands, follow) == [demands[1]]
    assert engine.run_pass(demands[:1], follow) == [demands[0]]
    assert reported == [[demands[1]], [demands[0]]]


def test_more_demands_than_the_budget_take_turns_by_arrival():
    engine, _ = engine_of(max_batch_tokens=2)
    sequences = [sequence_of(engine, 1) for _ in range(5)]
    demands = [Demand(sequence, 1, 1, arrival) for sequence, arrival in zip(sequences, (4, 2, 0, 3, 1), strict=True)]
    assert engine.run_pass(demands) == [demands[2], demands[4]]
    assert run_all(engine, [demands[0], demands[1], demands[3]]) == 2


def test_the_least_recently_used_idle_cache_is_dropped_first():
    engine, _ = engine_of(max_cached_tokens=20)
    first, second, third = (sequence_of(engine, 6) for _ in range(3))
    for sequence in (second, first, third):
        run_all(engine, [Demand(sequence, 6, 1, 0)])
    fourth = sequence_of(engine, 8)
    run_all(engine, [Demand(fourth, 8, 1, 0)])
    assert [sequence.cache.length for sequence in (first, second, third, fourth)] == [6, 0, 6, 8]
    assert engine.stats.num_evictions == 1


def test_a_dropped_cache_is_recomputed_and_counted():
    engine, runner = engine_of(max_cached_tokens=10)
    first, second = sequence_of(engine, 6), sequence_of(engine, 6)
    run_all(engine, [Demand(first, 6, 1, 0)])
    run_all(engine, [Demand(second, 6, 1, 0)])
    first.tokens.extend([77])
    run_all(engine, [Demand(first, 7, 1, 0)])
    assert runner.passes == [[(0, 6, 1)], [(0, 6, 1)], [(0, 7, 1)]]
    assert (engine.stats.num_evictions, engine.stats.num_tokens_recomputed) == (2, 6)


def test_tokens_that_a_rewrite_replaced_are_not_recomputed():
    """6 were dropped, the last 4 of them overruled since: 2 are fed for a second time."""
    engine, _ = engine_of(max_cached_tokens=10)
    first, second = sequence_of(engine, 6), sequence_of(engine, 6)
    run_all(engine, [Demand(first, 6, 1, 0)])
    run_all(engine, [Demand(second, 6, 1, 0)])
    first.rewrite(2, [70, 71, 72, 73])
    run_all(engine, [Demand(first, 6, 4, 0)])
    assert engine.stats.num_tokens_recomputed == 2


def test_tokens_fed_again_after_a_rollback_are_not_recomputed():
    """Only what an eviction dropped counts: once it has been fed again, rolling back is the session's own doing."""
    engine, _ = engine_of(max_cached_tokens=10)
    first, second = sequence_of(engine, 6), sequence_of(engine, 6)
    for sequence in (first, second, first):
        sequence.cache.truncate(0)
        run_all(engine, [Demand(sequence, 6, 1, 0)])
    assert engine.stats.num_tokens_recomputed == 6
    first.cache.truncate(3)
    run_all(engine, [Demand(first, 6, 1, 0)])
    assert engine.stats.num_tokens_recomputed == 6


def test_a_later_demand_gives_its_cache_up_for_an_earlier_one():
    engine, _ = engine_of(max_cached_tokens=12)
    early, late = sequence_of(engine, 12), sequence_of(engine, 9)
    engine.run_pass([Demand(late, 8, 0, 0)])
    demands = [Demand(early, 12, 1, 1), Demand(late, 9, 1, 2)]
    assert engine.run_pass(demands) == [demands[0]]
    assert late.cache.length == 0
    assert engine.run_pass(demands[1:]) == [demands[1]]


def test_of_the_later_demands_the_latest_gives_up_first():
    engine, _ = engine_of(max_cached_tokens=12)
    early, later, latest = (sequence_of(engine, 5) for _ in range(3))
    engine.run_pass([Demand(later, 4, 0, 0), Demand(latest, 4, 0, 1)])
    engine.run_pass([Demand(sequence, 5, 1, index) for index, sequence in enumerate((early, later, latest))])
    assert [sequence.cache.length for sequence in (early, later, latest)] == [5, 5, 1]
    assert engine.stats.num_evictions == 1


def test_an_earlier_demand_is_never_set_back_by_a_later_one():
    """Beside the first, the cap holds the cache that the second has; the third must not take its place."""
    engine, _ = engine_of(max_cached_tokens=20)
    sequences = [sequence_of(engine, length) for length in (14, 7, 6)]
    engine.run_pass([Demand(sequences[1], 6, 0, 0)])
    demands = [Demand(sequence, len(sequence.tokens), 1, index) for index, sequence in enumerate(sequences)]
    engine.run_pass(demands)
    assert sequences[2].cache.length == 0


def follow(engine: Engine, sequence: Sequence, other: Sequence, length: int) -> None:
    """Have a sequence follow another, and check that it then is what it would be had it been fed."""
    assert engine.follow(sequence, other, length)
    assert sequence.tokens[:] == other.tokens[:length]
    assert sequence.cache.length == min(length, other.cache.length)
    sequence.tokens.extend([77])
    run_all(engine, [Demand(sequence, length + 1, 1, 0)])


def test_a_sequence_that_follows_another_has_its_cache_without_feeding_it():
    engine, runner = engine_of()
    leader = sequence_of(engine, 9)
    spare = Sequence(is_spare=True)
    engine.add(spare)
    run_all(engine, [Demand(leader, 9, 1, 0)])
    for length in (4, 9, 2, 7):
        follow(engine, spare, leader, length)
        assert runner.passes[-1] == [(length, 1, 1)]
    leader.rewrite(3, [50, 51])
    run_all(engine, [Demand(leader, 5, 1, 0)])
    follow(engine, spare, leader, 5)
    assert runner.passes[-1] == [(5, 1, 1)]


def test_what_the_leaders_cache_lacks_is_fed():
    engine, runner = engine_of()
    leader, spare = sequence_of(engine, 9), Sequence(is_spare=True)
    engine.add(spare)
    run_all(engine, [Demand(leader, 6, 1, 0)])
    follow(engine, spare, leader, 8)
    assert runner.passes[-1] == [(6, 3, 1)]


def test_nobody_follows_where_that_would_take_more_than_half_of_what_is_free():
    engine, _ = engine_of(max_cached_tokens=20)
    leader, spare = sequence_of(engine, 8), Sequence(is_spare=True)
    engine.add(spare)
    run_all(engine, [Demand(leader, 8, 1, 0)])
    assert not engine.follow(spare, leader, 7)
    assert engine.follow(spare, leader, 6)


def test_spare_caches_are_dropped_first_though_used_last():
    engine, _ = engine_of(max_cached_tokens=20)
    leader, spare = sequence_of(engine, 6), Sequence(is_spare=True)
    engine.add(spare)
    run_all(engine, [Demand(leader, 6, 1, 0)])
    follow(engine, spare, leader, 5)
    run_all(engine, [Demand(sequence_of(engine, 12), 12, 1, 0)])
    assert (spare.cache.length, leader.cache.length, engine.stats.num_evictions) == (0, 6, 1)


def test_a_removed_sequence_frees_its_cache():
    engine, _ = engine_of()
    sequence = sequence_of(engine, 9)
    run_all(engine, [Demand(sequence, 9, 1, 0)])
    engine.remove(sequence)
    assert (engine.num_cached_tokens, sequence.cache.length, sequence.cache.num_layers) == (0, 0, 0)


def test_without_caches_every_demand_begins_at_its_first_token():
    engine, runner = engine_of(keep_caches=False)
    sequence = sequence_of(engine, 5)
    for length in (5, 6, 7):
        run_all(engine, [Demand(sequence, length, 2, 0)])
        assert engine.num_cached_tokens == 0
        sequence.tokens.extend([90 + length])
    assert runner.passes == [[(0, 5, 2)], [(0, 6, 2)], [(0, 7, 2)]]
    assert engine.stats.num_evictions == 0


def test_without_caches_chunks_still_follow_each_other():
    engine, runner = engine_of(max_batch_tokens=4, keep_caches=False)
    run_all(engine, [Demand(sequence_of(engine, 10), 10, 3, 0)])
    assert runner.passes == [[(0, 4, 0)], [(4, 4, 1)], [(8, 2, 2)]]


class Rival:
    """One sequence of the random test, with what is known of it apart from the engine."""

    def __init__(self, engine: Engine, token_ids: list[int]):
        self.sequence = Sequence(TokenLog(token_ids))
        engine.add(self.sequence)
        self.demand: Demand | None = None
        self.lost: set[int] = set()  # positions that an eviction dropped and that were not fed since

    def rewrite(self, start: int, token_ids: list[int]) -> None:
        held = self.sequence.tokens[:]
        self.sequence.rewrite(start, token_ids)
        kept = start + TokenLog(held).num_agreeing(start, token_ids)
        self.lost = {position for position in self.lost if position < kept}
        self.demand = None

    def account(self, before: int, start: int | None) -> tuple[int, int]:
        """Return (evictions, tokens recomputed) of a pass: `before` were cached, and it fed from `start` if at all."""
        end = self.sequence.cache.length
        first_fed = end if start is None else start
        was_evicted = first_fed < before
        if was_evicted:
            self.lost |= set(range(before))
        recomputed = self.lost & set(range(first_fed, end))
        self.lost -= recomputed
        return int(was_evicted), len(recomputed)


@pytest.mark.parametrize("keep_caches", [True, False], ids=["caches", "no_caches"])
@pytest.mark.parametrize("seed", range(25))
def test_any_history_gives_the_rows_of_a_fresh_cache(seed, keep_caches):
    """Rewrites, demands and passes in any order: rows are right, cap and budget hold, counters add up.

    The cap holds one sequence and a little more, so that most passes drop something.
    """
    random = Random(seed)
    max_cached_tokens, max_batch_tokens = random.randint(MAX_LENGTH, 60), random.randint(1, 20)
    engine, runner = engine_of(max_cached_tokens, max_batch_tokens, keep_caches=keep_caches)
    rivals = [Rival(engine, random.choices(range(3), k=random.randint(1, MAX_LENGTH))) for _ in range(4)]
    num_recomputed = num_evicted = arrival = 0

    def run_pass() -> None:
        nonlocal num_recomputed, num_evicted
        waiting = [rival for rival in rivals if rival.demand]
        before = [rival.sequence.cache.length for rival in rivals]
        finished = engine.run_pass([rival.demand for rival in waiting if rival.demand])
        assert engine.num_cached_tokens <= max_cached_tokens
        assert sum(num_tokens for _, num_tokens, _ in runner.passes[-1]) <= max_batch_tokens
        for rival, num_cached in zip(rivals, before, strict=True):
            evicted, recomputed = rival.account(num_cached, runner.starts.get(rival.sequence.cache))
            num_evicted, num_recomputed = num_evicted + evicted, num_recomputed + recomputed
        for rival in waiting:
            if rival.demand in finished:
                assert torch.cat(rival.demand.rows or [torch.empty(0, 3)]).tolist() == right_rows(rival.demand)
                rival.demand = None

    for _ in range(200):
        rival, action = random.choice(rivals), random.choice(["rewrite", "demand", "demand", "pass", "pass", "pass"])
        tokens, num_cached = rival.sequence.tokens, rival.sequence.cache.length
        if action == "rewrite":
            start = random.randint(max(0, len(tokens) - 8), len(tokens))
            rival.rewrite(start, random.choices(range(3), k=random.randint(0 if start else 1, MAX_LENGTH - start)))
        elif action == "demand" and not rival.demand and num_cached < len(tokens):
            num_rows = random.randint(0, len(tokens) - num_cached)
            rival.demand = Demand(rival.sequence, len(tokens), num_rows, arrival)
            arrival += 1
        elif any(rival.demand for rival in rivals):
            run_pass()
    for _ in range(sum(rival.demand.end for rival in rivals if rival.demand)):
        if any(rival.demand for rival in rivals):
            run_pass()
    assert not any(rival.demand for rival in rivals)
    if keep_caches:  # else the engine clears them itself, which is no eviction
        assert engine.stats.num_evictions > 0
        assert engine.stats.num_tokens_recomputed == num_recomputed
        assert engine.stats.num_evictions == num_evicted
    assert engine.stats.num_forward_passes == len(runner.passes) == engine.stats.num_passes_by_batch_size.total()
    assert engine.stats.num_tokens_fed == sum(tokens for feeds in runner.passes for _, tokens, _ in feeds)
    assert engine.stats.num_rows == sum(rows for feeds in runner.passes for _, _, rows in feeds)


class TestIsQuick:
    """Whether an event loop had better run the next pass itself."""

    def engine_after(self, monkeypatch, pass_s: float, num_sequences: int = 1, num_spare: int = 0) -> Engine:
        """Return an engine whose last pass took so long."""
        engine, _ = engine_of()
        sequences = [sequence_of(engine, 3) for _ in range(num_sequences)]
        for _ in range(num_spare):
            engine.add(Sequence(is_spare=True))
        clock = iter([0.0, pass_s, pass_s])
        monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        engine.run_pass([Demand(sequences[0], 3, 1, 0)])
        return engine

    def test_before_any_pass_nothing_is_known(self):
        assert not engine_of()[0].is_quick

    def test_after_a_quick_pass_with_one_sequence(self, monkeypatch):
        assert self.engine_after(monkeypatch, 0.9 * engine_module.QUICK_S).is_quick

    def test_spare_sequences_do_not_count(self, monkeypatch):
        assert self.engine_after(monkeypatch, 0.001, num_spare=3).is_quick

    @pytest.mark.parametrize(
        "settings",
        [
            {"pass_s": 1.1 * engine_module.QUICK_S},
            {"pass_s": 0.001, "num_sequences": 2},
        ],
        ids=["slow", "several"],
    )
    def test_not_otherwise(self, monkeypatch, settings):
        assert not self.engine_after(monkeypatch, **settings).is_quick

    def test_it_may_be_asked_while_another_thread_adds_and_removes_sequences(self, monkeypatch):
        engine = self.engine_after(monkeypatch, 0.001)
        is_over = threading.Event()

        def use() -> None:
            while not is_over.is_set():
                sequences = [Sequence(is_spare=True) for _ in range(30)]
                for change in (engine.add, engine.remove):
                    for sequence in sequences:
                        change(sequence)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        user = threading.Thread(target=use)
        user.start()
        try:
            assert all(engine.is_quick for _ in range(5000))
        finally:
            is_over.set()
            user.join()
            sys.setswitchinterval(interval)
