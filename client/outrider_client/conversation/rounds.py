"""The conversation of a generation whose client decides: round after round, by the rule's acceptance sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from outrider.v1 import draft_pb2
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Link, Open, Send, Steps, counted
from outrider_client.conversation.generation import DRAFT
from outrider_client.errors import CacheMismatchError
from outrider_client.rules.acceptance import Decision
from outrider_client.speculation_length import RoundTimes

_T = TypeVar("_T")


class Rounds(Conversation):
    """Runs one generation whose tokens the client decides."""

    def __init__(self, *given: Any):
        """Takes what a Conversation takes."""
        super().__init__(*given)
        self._target = self._generation.target
        self._is_asking = False  # the target has a round
        self._response: Any = None

    def _write(self) -> Steps:
        yield from counted(Open(Link.TARGET, self._target.open()), self._stats)
        if self._target.owes_prompt_logprobs:
            yield from self._answer_of_target(self._target.take_prompt_logprobs)
        length = self._lengths.next_length()
        learned_at = self._worked_s
        while self._text.finish_reason is None:
            before, num_failures = self._stats.waits_s(), self._num_failures
            proposals = yield from self._propose(length)
            decision = yield from self._verify(proposals, length)
            chunk = self._commit(decision, len(proposals), before)
            began_at, learned_at = learned_at, self._worked_s
            if num_failures == self._num_failures:
                self._learn(decision, learned_at - began_at, length)
            length = self._lengths.next_length()
            if self._text.finish_reason is None and length:
                yield from self._draft.commit(length)
            yield from self._hand_over(chunk)

    def _learn(self, decision: Decision, round_s: float, length: int) -> None:
        """Report a round to what chose its proposals, but not the first, which has the prompt to process.

        A round lasts from the end of the one before it, so rounds cover all time.
        """
        if len(self._stats.rounds) == 1:
            return
        last, is_drafts = self._stats.rounds[-1], self._generation.source == DRAFT
        if self._generation.lookup:
            counts = last.num_draft_tokens, last.num_committed_tokens
            self._generation.lookup.learn_round(*counts, round_s, is_drafts)
        if (not is_drafts and last.num_draft_tokens) or bool(last.num_draft_tokens) != bool(length):
            return
        draft_token_s = self._stats.draft_forward_s[-1] if self._stats.draft_forward_s else 0.0
        times = (round_s, draft_token_s)
        self._lengths.learn(RoundTimes(last.num_draft_tokens, decision.num_accepted, *times, decision.overlaps))

    def _verify(self, proposals: Sequence[draft_pb2.Proposal], length: int) -> Steps:
        """Have a round verified; return its decision."""
        self._target.begin_round(proposals)
        return (yield from self._answer_of_target(self._target.decide_round, length))

    def _answer_of_target(self, read: Callable[[Any], _T], length: int | None = None) -> Steps:
        """Return what `read` makes of the target's answer, opening new sessions as often as patience allows.

        The answer is that to the round, of which the draft's next one has `length` proposals, or else to the opening.
        """
        num_failures, failed_at = 0, 0.0
        while True:
            failure = yield from self._ask_target(length)
            if failure is None:
                try:
                    return read(self._response)
                except CacheMismatchError:
                    failure = self._other_cache()
            num_failures += 1
            failed_at = failed_at if num_failures > 1 else self._clock()
            yield from self._give_up_target(failure, num_failures, failed_at)
            yield from counted(Open(Link.TARGET, self._target.open()), self._stats)

    def _ask_target(self, length: int | None) -> Steps:
        """Send a round, if there is one, and wait for the response.

        Returns:
            The failure, or None if `_response` holds the response.
        """
        started_at = self._clock()
        self._response, self._is_asking = None, self._failure is None
        if self._is_asking and length is not None:
            yield from counted(Send(Link.TARGET, self._target.round_request()), self._stats)
            self._target.read_round()
            yield from self._prepare_draft(length)
        while self._response is None and self._failure is None:
            yield from self._wait_for_target(since=started_at)
        failure, self._failure = self._failure, None
        self._is_asking = False
        self._stats.target_wait_s += self._clock() - started_at
        if self._response is not None:
            self._count_timing(self._response)
            return None
        return failure

    def _take_response(self, response: Any) -> None:
        if not self._is_asking or self._response is not None:
            super()._take_response(response)
        self._response = response

    # Proposals.

    def _propose(self, length: int) -> Steps:
        """Return the proposals of a round, from whichever source promises more tokens.

        The draft is not waited for where it is the other, and what was found stands in for one that has none.
        """
        generation = self._generation
        found, lookup, num_drafted = generation.look_up(), generation.lookup, 0
        if lookup is not None and found.token_ids and lookup.is_better_than_draft(found):
            if self._task.uses_draft and length:
                yield from self._draft.reopen(length)
        else:
            num_drafted = yield from self._gather_proposals(length)
        return generation.proposals(num_drafted, found)

    def _gather_proposals(self, length: int) -> Steps:
        """Wait for the proposals of a round, at most `length`, and return how many it shall have."""
        if not self._task.uses_draft or not length:
            return 0
        link, waited_from = self._generation.draft, self._clock()
        while (yield from self._poll()):
            pass
        if not link.proposals:  # else they are still of use, and reopening would void them
            yield from self._draft.reopen(length)
        wanted = link.num_wanted(length)
        if len(link.proposals) >= wanted * self._lengths.least_share:
            wanted = min(wanted, len(link.proposals))
        waited_since = self._clock()  # without the time that the draft's description took
        while self._is_worth_waiting(wanted):
            left = waited_since + self._patience.draft_wait_s - self._clock()
            if left <= 0:
                yield from self._draft.on_silence(self._clock() - waited_since)
                break
            yield from self._wait(left)
            if not self._draft.is_open:  # it broke, and may be back already
                yield from self._draft.reopen(length)
                wanted = link.num_wanted(length)
        if self._draft.is_open and 0 < wanted <= len(link.proposals):
            self._draft.on_delivered()
        self._stats.draft_wait_s += self._clock() - waited_from
        return min(wanted, len(link.proposals))

    def _is_worth_waiting(self, wanted: int) -> bool:
        """Return whether to wait for more proposals.

        Also while the target's stream is broken, if it will be retried: a round without proposals would draw other
        tokens than the seed's.
        """
        is_over = self._failure is not None and self._failure.is_final
        return not is_over and self._draft.is_worth_waiting_for(wanted)
