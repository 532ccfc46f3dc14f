"""One generation: its committed tokens, its links to both services, and its statistics. Knows no sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outrider.v1 import draft_pb2
from outrider_client.conversation.ahead_link import AheadLink
from outrider_client.conversation.committed import Committed, CommittedTokens, Task
from outrider_client.conversation.draft_link import DraftLink
from outrider_client.conversation.rounds_link import RoundsLink
from outrider_client.conversation.target_link import TargetLink
from outrider_client.lookup.lookup import NOTHING, Found, Lookup
from outrider_client.results import GenerationStats, TokenLogprobs
from outrider_client.rules.acceptance import Decision

DRAFT = "draft"  # the source of proposals that is a service; those that are looked up have their own names


class Generation:
    """Commits tokens and counts them. The two links and lookup read what is committed; none knows the generation."""

    def __init__(self, task: Task, new_lookup: Callable[[Committed], Lookup] | None = None):
        """`new_lookup` makes what looks up proposals in a text; None: nothing is looked up."""
        self.task, self.stats = task, GenerationStats()
        self.logprobs: list[TokenLogprobs] = []  # of the output, if asked for
        self.committed = CommittedTokens(task.prompt_ids)
        self.target, self.ahead = RoundsLink(task, self.committed), AheadLink(task, self.committed)
        self.judge: TargetLink = self.ahead if task.runs_ahead else self.target  # the one that is in use
        self.draft = DraftLink(task, self.committed)
        self.lookup = new_lookup(self.committed) if new_lookup else None
        self.source = DRAFT  # of the proposals of the present round
        self._num_seen = 0  # of the draft's proposals: those of the round, and one that the target does not have

    def look_up(self) -> Found:
        """Return what can be proposed for the next round without a draft."""
        if self.lookup is None:
            return NOTHING
        num_left = self.task.max_length - len(self.committed)
        return self.lookup.propose(min(num_left, self.task.target_info.limits.max_proposals or num_left))

    def proposals(self, num_drafted: int, found: Found) -> list[draft_pb2.Proposal]:
        """Return the proposals of a round: the draft's first ones, or what was found where there shall be none."""
        if num_drafted:
            self.source = DRAFT
            proposals = self.draft.first(num_drafted)
            self._num_seen = min(num_drafted, len(proposals) + 1)
            return proposals
        self.source, rule, self._num_seen = found.source, self.task.rule, 0
        return [rule.certain_proposal(token_id) for token_id in found.token_ids]

    def commit_round(self, decision: Decision, num_kept: int) -> None:
        """Commit and count the first `num_kept` tokens of a decision; the rest lies behind the end of the text."""
        num_proposals = self.judge.num_proposals
        is_cut = num_kept < len(decision.token_ids)
        num_drafted = min(num_proposals, num_kept) if is_cut else num_proposals
        self._count_round(num_kept, num_drafted, min(decision.num_accepted, num_kept))
        self._commit(decision.token_ids[:num_kept])
        self.logprobs += self.judge.round_logprobs[:num_kept]
        if self.source == DRAFT and self.task.rule.ends_branch(decision, max(num_proposals, self._num_seen)):
            self.draft.begin_branch()  # what was looked up was not drawn, so nothing of the draft's has decided

    def _count_round(self, num_kept: int, num_drafted: int, num_accepted: int) -> None:
        stats = self.stats
        stats.num_rounds += 1
        stats.num_generated_tokens += num_kept
        stats.num_draft_tokens += num_drafted
        stats.num_accepted_tokens += num_accepted
        stats.num_rounds_without_draft += not self.judge.num_proposals and self.task.speculation.uses_draft
        if num_drafted:
            for by_source, number in (
                (stats.num_draft_tokens_by_source, num_drafted),
                (stats.num_accepted_tokens_by_source, num_accepted),
            ):
                by_source[self.source] = by_source.get(self.source, 0) + number
        for counts, number in (
            (stats.num_draft_tokens_per_position, num_drafted),
            (stats.num_accepted_tokens_per_position, num_accepted),
        ):
            counts.extend([0] * (num_drafted - len(counts)))
            for index in range(number):
                counts[index] += 1

    def commit_drafts(self, num_kept: int) -> None:
        """Commit the first `num_kept` proposals, under the method `draft`."""
        self.stats.num_generated_tokens += num_kept
        self.stats.num_draft_tokens += num_kept
        self._commit([proposal.token_id for proposal in self.draft.proposals[:num_kept]])

    def _commit(self, token_ids: Sequence[int]) -> None:
        start = len(self.committed)
        self.committed.extend(token_ids)
        self.draft.on_committed(start, token_ids)
