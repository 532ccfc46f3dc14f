"""Which alternatives the draft prepares for, and what a session's forks do, on the toys' tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from outrider.engine.engine import Engine
from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import Draft
from outrider.sampling.messages import params_to_proto
from outrider.v1 import common_pb2
from outrider_draft import session as session_module
from outrider_draft.alternatives import Alternative, likely_alternatives
from outrider_draft.drafter import Drafter
from outrider_draft.session import Commit, Drafted, DraftOptions, Path, Prepared, Session
from tests import toy_services as toys
from tests.unit.test_toy_services import SEED, TableRunner

OPTIONS = DraftOptions(DistributionParams(), SEED, toys.VOCAB_SIZE, 5, 0.0, max_alternatives=3)
PROMPT = [5, 6, 1]
LENGTH = 4  # of a round


def draft_of(token_id: int, prob: float, **others: float) -> Draft:
    """Return a draft whose others are given as `t7=0.2`."""
    pairs = tuple((int(name[1:]), share) for name, share in others.items())
    return Draft(token_id, np.array([token_id]), np.array([1]), prob, pairs)


class TestLikelyAlternatives:
    def test_without_judgement_the_others_shares_are_chances(self):
        drafts = [draft_of(1, 1.0, t7=0.2, t8=0.1), draft_of(2, 1.0, t9=0.25), draft_of(3, 1.0, t4=0.9)]
        found = likely_alternatives(drafts, None)
        # reached: 1, then 0.7, then 0.7 · 0.75
        assert found == [Alternative(2, 4), Alternative(0, 7), Alternative(1, 9), Alternative(0, 8)]

    def test_a_proposal_that_is_judged_mildly_is_accepted(self):
        drafts = [draft_of(1, 0.5, t7=0.4), draft_of(2, 0.5, t8=0.1)]
        assert likely_alternatives(drafts, [0.05, 0.95])[0] == Alternative(1, 8)
        assert likely_alternatives(drafts, [0.95, 0.95])[0] == Alternative(0, 7)

    def test_where_nothing_else_is_possible_there_are_none(self):
        assert likely_alternatives([draft_of(1, 1.0)], None) == likely_alternatives([draft_of(1, 1.0)], [0.9]) == []
        assert likely_alternatives([], None) == []


class Bench:
    """A drafter that is driven by hand, with what one session has emitted."""

    def __init__(self, options: DraftOptions = OPTIONS, window: int = 2 * LENGTH, num_cached: int = 10_000):
        self.engine = Engine(TableRunner(toys.DRAFT_LOGITS), num_cached, 64)
        self.drafter = Drafter(self.engine, toys.CONTEXT_LENGTH)
        self.emitted: list[Drafted] = []
        end = len(PROMPT)
        self.session = Session(options, self.emitted.append, 0, end + window, end + LENGTH)
        self.session.begin(PROMPT)
        self.drafter._has_time_for_forks = lambda session: True  # whatever the clock of this machine says
        self.drafter._begin(self.session)
        self.committed = TokenLog(PROMPT)
        self.num_commits = 0

    def work(self) -> list[Drafted]:
        """Let the drafter work until nothing is left; return what it has sent."""
        while self.drafter._step():
            pass
        sent, self.emitted[:] = list(self.emitted), []
        return sent

    def commit(self, token_ids: Sequence[int], window: int = 2 * LENGTH) -> None:
        start = len(self.committed)
        self.committed.extend(token_ids)
        self.num_commits += 1
        end = len(self.committed)
        digest = self.committed.digest(start)
        self.drafter._commit(
            self.session, Commit(self.num_commits, start, token_ids, digest, end + window, end + LENGTH, 0)
        )


def expected(prefix: Sequence[int], number: int, options: DraftOptions = OPTIONS) -> list[int]:
    """Return what a session drafts behind a prefix, by the toys' own reckoning."""
    opening = toys.draft_pb2.OpenProposals(
        sampling=params_to_proto(options.params, options.shares_noise),
        seed=SEED,
        committed=common_pb2.TokenSpan(token_ids=wire.pack_ids(prefix)),
        window=len(prefix) + number,
        max_support=options.max_support,
        num_prompt_tokens=options.num_prompt_tokens,
    )
    toy = toys.ToyDraft(toys.draft_pb2.ProposeRequest(open=opening))
    return [toy.draft().proposals[0].token_id for _ in range(number)]


def ids_of(drafts: Sequence[Draft]) -> list[int]:
    return [draft.token_id for draft in drafts]


def proposals_of(sent: Sequence[Drafted]) -> list[int]:
    return [token_id for item in sent for token_id in ids_of(item.drafts)]


def alternatives_of(sent: Sequence[Drafted]) -> list[Prepared]:
    return [alternative for item in sent for alternative in item.alternatives]


WAYS = {
    "drawn": OPTIONS,
    "greedy": replace(OPTIONS, params=DistributionParams(0.0)),
    "shared noise": replace(OPTIONS, shares_noise=True),
    "filtered": replace(OPTIONS, params=DistributionParams(1.0, top_k=4)),
    "processed": replace(
        OPTIONS,
        params=DistributionParams(repetition_penalty=2.0, frequency_penalty=1.0, bad_words=[[1, 2]]),
        num_prompt_tokens=len(PROMPT),
    ),
}


@pytest.mark.parametrize("way", ["drawn", "shared noise", "processed"])
def test_alternatives_are_what_would_be_drafted_behind_such_a_commit(way):
    options = WAYS[way]
    bench = Bench(options)
    sent = bench.work()
    main = proposals_of(sent)
    assert main == expected(PROMPT, 2 * LENGTH, options)
    alternatives = alternatives_of(sent)
    assert len(alternatives) == options.max_alternatives
    for it in alternatives:
        index = it.position - len(PROMPT)
        assert 0 <= index < LENGTH
        assert it.token_id != main[index]
        assert ids_of(it.drafts) == expected([*PROMPT, *main[:index], it.token_id], LENGTH, options)


@pytest.mark.parametrize("way", WAYS)
def test_an_alternative_that_comes_true_counts_as_sent_and_is_gone_on_from(way):
    options = WAYS[way]
    for which in range(options.max_alternatives):
        bench = Bench(options)
        sent = bench.work()
        main, chosen = proposals_of(sent), alternatives_of(sent)[which]
        index = chosen.position - len(PROMPT)
        num_fed = bench.engine.stats.num_tokens_fed
        bench.commit([*main[:index], chosen.token_id])
        further = bench.work()
        assert further[0].start_position == len(bench.committed) + LENGTH
        reference = Bench(options)
        reference.work()
        reference.session.forks.clear()  # it has to draft all of it anew
        reference.commit([*main[:index], chosen.token_id])
        assert ids_of(chosen.drafts) + proposals_of(further) == proposals_of(reference.work())
        assert bench.engine.stats.num_tokens_fed > num_fed


@pytest.mark.parametrize("ending", ["all", "other", "fewer"])
def test_any_other_commit_makes_alternatives_void(ending):
    bench = Bench()
    sent = bench.work()
    main, alternatives = proposals_of(sent), alternatives_of(sent)
    taken = {(it.position, it.token_id) for it in alternatives}
    other = next(it for it in range(toys.VOCAB_SIZE) if it != main[0] and (len(PROMPT), it) not in taken)
    bench.commit({"all": main[:LENGTH], "other": [other], "fewer": main[:1]}[ending])
    sent = bench.work()
    agreed = {"all": main[LENGTH:], "other": [], "fewer": main[1:]}[ending]
    assert agreed + proposals_of(sent) == expected(bench.committed[:], 2 * LENGTH)
    assert {it.position for it in alternatives_of(sent)} <= set(
        range(len(bench.committed), len(bench.committed) + LENGTH)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("way", ["drawn", "shared noise", "processed"])
def test_whatever_is_committed_and_whenever_what_is_sent_is_what_would_be_drafted(seed, way):
    """Commits of every kind come after any number of steps, so that forks are cut off in the middle, too."""
    random, bench = Random(seed), Bench(WAYS[way])
    known = TokenLog(PROMPT)  # what the client holds: committed tokens and proposals
    prepared: dict[tuple[int, int], list[int]] = {}
    num_used = 0

    def take(sent: Sequence[Drafted]) -> None:
        for item in sent:
            if item.drafts:
                assert item.start_position == len(known)
                known.extend(ids_of(item.drafts))
            prepared.update({(it.position, it.token_id): ids_of(it.drafts) for it in item.alternatives})

    for _ in range(60):
        for _ in range(random.choice([0, 1, 3, 7, 40])):
            bench.drafter._step()
        take(bench.emitted)
        bench.emitted.clear()
        base = len(bench.committed)
        assert known[base:] == expected(bench.committed[:], len(known) - base, WAYS[way])
        for (position, token_id), drafts in prepared.items():
            assert drafts == expected([*known[:position], token_id], len(drafts), WAYS[way])
        in_round = known[base : base + LENGTH]
        if prepared and random.random() < 0.6:
            position, token_id = random.choice(list(prepared))
            tokens = [*known[base:position], token_id]
        else:
            tokens = [*in_round[: random.randint(0, len(in_round))], random.randrange(toys.VOCAB_SIZE)]
        end = base + len(tokens)
        if known[base:end] != tokens:
            behind = prepared.get((end - 1, tokens[-1]), [])
            num_used += bool(behind)
            known.rewrite(base, [*tokens, *behind])
        prepared.clear()
        bench.commit(tokens)
        if len(bench.committed) > toys.CONTEXT_LENGTH - 4 * LENGTH:
            break
    assert num_used > 2


@pytest.mark.parametrize(
    ("device", "num_sessions", "most"),
    [("cpu", 1, 63), ("cpu", 2, 0), ("cuda", 2, 31), ("cuda", 40, 0), ("cuda", 99, 0)],
)
def test_sessions_share_what_a_pass_has_room_for(device, num_sessions, most):
    bench = Bench()
    bench.engine.runner.device = torch.device(device)
    bench.drafter._sessions *= num_sessions
    assert bench.drafter._most_forks == most


@pytest.mark.parametrize(("gap_s", "number"), [(None, 0), (0.0, 0), (60.0, OPTIONS.max_alternatives)])
def test_they_are_drafted_only_where_that_is_done_before_the_next_commit(gap_s, number):
    bench = Bench()
    del bench.drafter._has_time_for_forks
    bench.session.gap_s = gap_s
    assert len(alternatives_of(bench.work())) == number


def test_the_gap_is_the_lesser_of_the_last_two_between_a_rounds_proposals_and_the_next_commit(monkeypatch):
    now = 100.0
    monkeypatch.setattr(session_module.time, "monotonic", lambda: now)
    bench, seen = Bench(replace(OPTIONS, max_alternatives=0)), []  # else a commit may find its proposals prepared
    for drafting_s, gap_s in [(3.0, 12.0), (0.5, 0.25), (9.0, 0.5), (0.0, 70.0), (1.0, 0.125)]:
        now += drafting_s
        main = proposals_of(bench.work())
        now += gap_s
        bench.commit([(main[0] + 1) % toys.VOCAB_SIZE])
        seen.append(bench.session.gap_s)
    assert seen == [None, 0.25, 0.25, 0.5, 0.125]


def test_none_are_drafted_while_a_client_waits_for_proposals(monkeypatch):
    """A second session joins when the first is about to fork: its round comes first."""
    monkeypatch.setattr(Drafter, "_most_forks", OPTIONS.max_alternatives)
    bench = Bench(window=LENGTH)
    while bench.session.wants_token:
        bench.drafter._step()
    assert bench.session.may_fork
    emitted: list[Drafted] = []
    other = Session(OPTIONS, emitted.append, 1, len(PROMPT) + LENGTH, len(PROMPT) + LENGTH)
    other.begin(PROMPT)
    bench.drafter._begin(other)
    while other.wants_token:
        assert not bench.session.forks
        bench.drafter._step()
    bench.work()
    assert len(bench.session.forks) == len(other.forks) == OPTIONS.max_alternatives


@pytest.mark.parametrize(
    ("options", "window"),
    [
        (replace(OPTIONS, max_alternatives=0), 2 * LENGTH),
        (OPTIONS, 1),
    ],
    ids=["not asked for", "no space in the window"],
)
def test_none_are_sent_where_there_can_be_none(options, window):
    assert alternatives_of(Bench(options, window).work()) == []


def test_the_window_cuts_them():
    sent = Bench(window=LENGTH).work()
    assert alternatives_of(sent)
    for it in alternatives_of(sent):
        assert it.position + 1 + len(it.drafts) == len(PROMPT) + LENGTH


def test_without_room_for_their_caches_there_are_none_and_the_session_goes_on():
    bench = Bench(num_cached=len(PROMPT) + 2 * LENGTH)
    assert alternatives_of(bench.work()) == []
    bench.commit([7])
    assert proposals_of(bench.work()) == expected(bench.committed[:], 2 * LENGTH)


def test_a_row_that_is_none_behind_an_alternative_ends_only_that_fork():
    bench = Bench()
    [chosen, *others] = alternatives_of(Bench().work())
    main = proposals_of(Bench().work())
    prefix = TokenLog([*PROMPT, *main[: chosen.position - len(PROMPT)], chosen.token_id])
    logits = bench.engine.runner._logits.clone()
    logits[prefix.digest(len(prefix)) % toys.NUM_PREFIX_CLASSES] = np.nan
    bench.engine.runner._logits = logits
    sent = bench.work()
    assert [it.token_id for it in alternatives_of(sent)] == [it.token_id for it in others]
    assert all(isinstance(item, Drafted) for item in sent)
    bench.commit(main[:LENGTH])
    assert proposals_of(bench.work())


def test_a_session_that_ends_frees_its_forks():
    bench = Bench()
    bench.work()
    assert bench.engine.num_cached_tokens > len(PROMPT) + 2 * LENGTH
    bench.drafter._end(bench.session)
    assert bench.engine.num_cached_tokens == 0


def draw_forks_with_other_numbers(monkeypatch) -> None:
    """Broken: forks draw every token with the number of the position behind it."""
    numbers = Path.numbers

    def shifted(path: Path, number: int):
        return numbers(path, number + 1)[1:] if path.alternative else numbers(path, number)

    monkeypatch.setattr(Path, "numbers", shifted)


def test_forks_that_draw_with_other_numbers_are_noticed(monkeypatch):
    draw_forks_with_other_numbers(monkeypatch)
    with pytest.raises(AssertionError):
        test_alternatives_are_what_would_be_drafted_behind_such_a_commit("drawn")
    with pytest.raises(AssertionError):
        test_whatever_is_committed_and_whenever_what_is_sent_is_what_would_be_drafted(0, "drawn")
