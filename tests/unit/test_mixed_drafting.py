"""What one session needs is not taken from the others: those that can draft in one go do so beside any others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from outrider.engine.backends.batch import Feed
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import Draws
from outrider_draft.drafter import Drafter
from tests import toy_services as toys
from tests.unit.test_isolation import AHEAD, PLAIN, PROMPTS, DraftService, SpoiledDraftingRunner

NUM_DRAWS = 4
LONGEST = 3  # tokens that the runner can feed before it draws


class CountingRunner(SpoiledDraftingRunner):
    def __init__(self, can_filter: bool = True) -> None:
        super().__init__(toys.DRAFT_LOGITS)
        self._can_filter = can_filter
        self.drawn: list[tuple[int, int]] = []  # draws, sequences

    def can_draft(self, sizes: Sequence[int], sampling: Draws) -> bool:
        return max(sizes) <= LONGEST and (self._can_filter or not sampling.have_filters)

    def draft(self, feeds: Sequence[Feed], sampling: Draws):
        self.drawn.append(sampling.uniforms.shape)
        return super().draft(feeds, sampling)


@pytest.fixture(autouse=True)
def as_many_draws(monkeypatch) -> None:
    """Else the machine's speed decides."""
    monkeypatch.setattr(Drafter, "_most_draws", lambda *_: NUM_DRAWS)


def alone(all_params: Sequence[DistributionParams]) -> list[list[int]]:
    """Return what each session drafts one token after the other, with nobody beside it but for the seeds."""
    return DraftService().draft(PROMPTS, all_params)


@pytest.mark.parametrize("odd", [{"top_k": 3}, {"temperature": 0.8, "top_p": 0.7}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize("can_filter", [True, False])
def test_sessions_draft_in_one_go_where_the_runner_can_for_them(odd, can_filter):
    """Those with filters too, where it has them; else they keep nobody from it."""
    filtered, runner = DistributionParams(**odd), CountingRunner(can_filter)
    all_params = [PLAIN, filtered, DistributionParams(0.0), DistributionParams(0.6), filtered]
    outcomes = DraftService(runner).draft([PROMPTS[index] for index in (0, 1, 2, 4, 3)], all_params)
    assert runner.drawn[0] == (NUM_DRAWS, 4 if can_filter else 3)  # the last prompt is longer than LONGEST
    assert can_filter or [num_sequences for _, num_sequences in runner.drawn] == [3] * len(runner.drawn)
    assert outcomes == DraftService().draft([PROMPTS[index] for index in (0, 1, 2, 4, 3)], all_params)


def test_one_with_a_long_prompt_keeps_nobody_from_it():
    runner = CountingRunner()
    assert DraftService(runner).draft(PROMPTS) == alone(
        [DistributionParams()] * 5
    )  # the fourth prompt is longer than LONGEST
    assert runner.drawn[0] == (NUM_DRAWS, 4)


def test_one_that_may_stop_at_any_token_keeps_nobody_from_it():
    runner = CountingRunner()
    service, items = DraftService(runner), []
    service.open([1, 2], lambda _: None, min_draft_prob=1e-9)
    service.open([5, 6], items.append)
    while service.drafter.thread._take_turn():
        pass
    assert runner.drawn[0] == (NUM_DRAWS, 1)
    assert sum(len(item.drafts) for item in items) == AHEAD


def test_where_one_token_is_drafted_at_a_time_one_pass_does_it_for_all(monkeypatch):
    monkeypatch.setattr(Drafter, "_most_draws", lambda *_: 1)
    runner = CountingRunner(can_filter=False)
    service = DraftService(runner)
    service.draft(PROMPTS[:2], [DistributionParams(), DistributionParams(top_k=3)])
    assert runner.drawn == []
    assert service.engine.stats.num_passes_by_batch_size == {2: AHEAD}
