"""Simulated pairs, against which the choice of K is tested and its constants are swept. Knows no sockets and no models.

Seconds come from a pair's few numbers, random numbers from a seed, so that a simulation gives the same result always.

    python -m benchmarks.simulation

prints what becomes of the speed when each constant of `outrider_client.speculation_length` is halved and doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import product
from math import exp, log
from random import Random
from statistics import fmean

from outrider_client import speculation_length
from outrider_client.speculation_length import FixedLength, LengthController, PairSpeeds, RoundTimes

NUM_SESSIONS = {1: 8, 8: 2}  # of the sweep, and seeds of each
LENGTHS = (0, 2, 3, 4, 6, 8, 12, 16)  # among which the best constant is looked for
NUM_TOKENS = 256
STALL_S = 0.02

Chooser = FixedLength | LengthController


@dataclass(frozen=True)
class Pair:
    """Seconds and acceptance of a simulated pair on which a round is drafted, verified and then decided."""

    acceptance: float  # of each proposal, if those before it were accepted
    draft_token_s: float
    forward_s: float  # of one row
    row_s: float = 0.0  # of each further row
    overhead_s: float = 0.001
    noise: float = 0.1  # standard deviation, share of a round
    catch_up_s: float = 0.0  # the draft needs after rounds without it, and slows the target meanwhile
    hold_up_s: float = 0.0  # for which a session that ends holds up all others
    restart_s: float = 0.0  # the draft needs after a rejection, which voids what it has drafted meanwhile
    stall_share: float = 0.0  # of passes, which take STALL_S longer: the machine is at other work
    knows_overlaps: bool = False  # whether it is known how probable acceptance was

    def mean_s(self, num_proposals: int) -> float:
        forward = self.forward_s + self.row_s * (max(1, num_proposals) - 1)
        return self.overhead_s * (2 if num_proposals else 1) + forward + self.draft_token_s * num_proposals

    def mean_tokens(self, num_proposals: int) -> float:
        return 1 + sum(self.acceptance**index for index in range(1, num_proposals))

    def rate(self, num_proposals: int) -> float:
        """Return tokens per second of one session."""
        return self.mean_tokens(num_proposals) / self.mean_s(num_proposals)

    def run(self, num_proposals: int, random: Random) -> tuple[int, RoundTimes]:
        """Return the committed tokens of one round of one session, and its times."""
        num_accepted = 0
        while num_accepted < num_proposals and random.random() < self.acceptance:
            num_accepted += 1
        seconds = self.mean_s(num_proposals) * max(0.5, random.gauss(1, self.noise))
        num_committed = min(num_accepted + 1, max(1, num_proposals))
        draft_token_s = self.draft_token_s if num_proposals else 0.0
        num_judged = min(num_accepted + 1, num_proposals)
        overlaps = (self.acceptance,) * num_judged if self.knows_overlaps else ()
        return num_committed, RoundTimes(num_proposals, num_accepted, seconds, draft_token_s, overlaps)


GOOD = Pair(acceptance=0.85, draft_token_s=0.0005, forward_s=0.01)
USELESS = Pair(acceptance=0.01, draft_token_s=0.0005, forward_s=0.004)
SLOW = Pair(acceptance=0.9, draft_token_s=0.01, forward_s=0.01)
COSTLY_ROWS = Pair(acceptance=0.6, draft_token_s=0.001, forward_s=0.004, row_s=0.004)
MODEST = Pair(acceptance=0.6, draft_token_s=0.0008, forward_s=0.006)
PAIRS = {"good": GOOD, "useless": USELESS, "slow": SLOW, "costly rows": COSTLY_ROWS, "modest": MODEST}

# Alone, so many sessions gain from a pass that they share; each further proposal makes all of them wait.
CROWDED = Pair(acceptance=0.5, draft_token_s=0.001, forward_s=0.003, row_s=0.0005)
COSTLY_DRAFT = Pair(acceptance=0.01, draft_token_s=0.0012, forward_s=0.001, row_s=0.0003)
SHARED_PAIRS = PAIRS | {"crowded": CROWDED, "costly draft": COSTLY_DRAFT}

# Like the embedded pair at two temperatures, with all that makes a look at the draft costly and misleading.
EMBEDDED = Pair(
    acceptance=0.75,
    draft_token_s=0.0004,
    forward_s=0.0012,
    row_s=0.0002,
    overhead_s=0.0006,
    noise=0.25,
    catch_up_s=0.004,
    hold_up_s=0.01,
    restart_s=0.0012,
    stall_share=0.001,
    knows_overlaps=True,
)
EMBEDDED_HOT = replace(EMBEDDED, acceptance=0.35)
EMBEDDED_RANDOM = replace(EMBEDDED, acceptance=0.01)
REAL_PAIRS = {"embedded": EMBEDDED, "embedded, hot": EMBEDDED_HOT, "embedded, random": EMBEDDED_RANDOM}

# What changes when half of the text is there.
QUICK = Pair(acceptance=0.8, draft_token_s=0.004, forward_s=0.001, row_s=0.0001, overhead_s=0.0005)
CHANGES = {
    "becomes useless": (GOOD, replace(GOOD, acceptance=0.0, draft_token_s=0.01)),
    "becomes good": (replace(GOOD, acceptance=0.0), GOOD),
    "others come": (QUICK, replace(QUICK, forward_s=0.031, noise=0.3)),
    "others go": (replace(QUICK, forward_s=0.031, noise=0.3), QUICK),
    "embedded, hotter": (EMBEDDED, EMBEDDED_HOT),
}


class Draft:
    """A session's draft: whether it has all tokens, and when it will."""

    def __init__(self) -> None:
        self.is_told, self.was_rejected, self.ready_at = False, False, 0.0

    def on_round(self, needs_draft: bool, now: float, catch_up_s: float) -> None:
        """Begin a round: a draft that has fallen behind receives the text's tokens where it is needed."""
        if needs_draft and not self.is_told:
            self.ready_at = now + catch_up_s
        self.is_told = needs_draft


def rate_together(
    pairs: Pair | Sequence[Pair],
    num_sessions: int,
    seed: int,
    make_chooser: Callable[[], Chooser],
    num_tokens: int = NUM_TOKENS,
) -> float:
    """Return tokens per second of sessions that begin together; a pass verifies every round that waits for it.

    Of several pairs each has an equal part of the tokens, one after the other.
    """
    pairs = pairs if isinstance(pairs, Sequence) else [pairs]
    random, choosers = Random(seed), [make_chooser() for _ in range(num_sessions)]
    for chooser in choosers:
        chooser.begin()
    drafts = [Draft() for _ in choosers]
    lengths, began = [chooser.next_length() for chooser in choosers], [0.0] * num_sessions
    left, now, total = [num_tokens] * num_sessions, 0.0, num_sessions * num_tokens
    waiting: list[tuple[float, int]] = []

    def begin_round(session: int, at: float, pair: Pair) -> None:
        length, chooser, draft = lengths[session], choosers[session], drafts[session]
        draft.on_round(length > 0 or bool(chooser.needs_draft), at, pair.catch_up_s)
        if length:
            restart_s = pair.restart_s * draft.was_rejected
            at = max(at, draft.ready_at) + restart_s + pair.draft_token_s * length + pair.overhead_s
        heappush(waiting, (at, session))

    for session in range(num_sessions):
        begin_round(session, 0.0, pairs[0])
    heapify(waiting)
    while waiting:
        pair = pairs[min(len(pairs) - 1, len(pairs) * (total - sum(left)) // total)]
        start, batch = max(now, waiting[0][0]), []
        while waiting and waiting[0][0] <= start:
            batch.append(heappop(waiting)[1])
        num_rows = sum(max(1, lengths[session]) for session in batch)
        forward_s = (pair.forward_s + pair.row_s * (num_rows - 1)) * max(0.5, random.gauss(1, pair.noise))
        if pair.stall_share and random.random() < pair.stall_share:
            forward_s += STALL_S
        num_busy = sum(draft.ready_at > start for draft in drafts)
        now = start + forward_s * (1 + num_busy / num_sessions)
        for index, session in enumerate(batch):
            end = now + pair.overhead_s * (0.2 * index + random.uniform(0.5, 2.5))
            committed, times = pair.run(lengths[session], random)
            times = times._replace(round_s=end - began[session])
            drafts[session].was_rejected = times.num_accepted < times.num_proposals
            choosers[session].learn(times)
            left[session] = max(0, left[session] - committed)
            if left[session]:
                lengths[session], began[session] = choosers[session].next_length(), end
                begin_round(session, end, pair)
            else:
                choosers[session].end()
                drafts[session].ready_at = 0.0
                now += pair.hold_up_s
    return total / now


def ratios(pairs: Pair | Sequence[Pair], num_sessions: int, seed: int) -> list[float]:
    """Return tokens per second over those of the target only: of a client's first text, and of a later one."""
    speed, found = PairSpeeds().at(1.0, "rejection"), []
    for each in (seed, seed + 100):
        rate = rate_together(pairs, num_sessions, each, lambda: LengthController(speed, may_be_zero=True))
        found.append(rate / rate_together(pairs, num_sessions, each, lambda: FixedLength(0)))
    return found


def scores(first_seed: int = 0) -> dict[str, float]:
    """Return means over all pairs, and the worst pair's ratio with the target only."""
    found: dict[str, float] = {}
    worst = []
    for num_sessions, num_seeds in NUM_SESSIONS.items():
        by_pair = []
        for pairs in (SHARED_PAIRS | REAL_PAIRS | CHANGES).values():
            of_seeds = [ratios(pairs, num_sessions, first_seed + index) for index in range(num_seeds)]
            by_pair.append([fmean(each) for each in zip(*of_seeds, strict=True)])
        worst.append(min(min(each) for each in by_pair))
        for index, name in enumerate(("first", "later")):
            found[f"{num_sessions} {name}"] = exp(fmean(log(each[index]) for each in by_pair))
    return found | {"worst": min(worst)}


def with_constant(name: str, factor: float) -> dict[str, float]:
    """Return the scores with one constant times `factor`."""
    before = getattr(speculation_length, name)
    setattr(speculation_length, name, type(before)(before * factor))
    try:
        return scores()
    finally:
        setattr(speculation_length, name, before)


def main() -> None:
    """Print the table: geometric means over pairs, of tokens per second over those of the target only."""
    now = scores()
    print(f"{'':24}" + "".join(f"{name:>10}" for name in now))
    print(f"{'as they are':24}" + "".join(f"{value:10.3f}" for value in now.values()), flush=True)
    _print_row("other seeds", scores(1000), now)  # what is less than this is luck
    constants = [name for name in vars(speculation_length) if name.isupper()]
    for name, factor in product(constants, (0.5, 2.0)):
        _print_row(f"{name} × {factor:g}", with_constant(name, factor), now)


def _print_row(label: str, found: dict[str, float], now: dict[str, float]) -> None:
    changes = (f"{found[name] / now[name] - 1:+10.1%}" for name in now if name != "worst")
    print(f"{label:24}" + "".join(changes) + f"{found['worst']:10.3f}", flush=True)


if __name__ == "__main__":
    main()
