"""One generation: its committed tokens, its links to both services, and its statistics. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from outrider_client.conversation.committed import CommittedTokens, Task
from outrider_client.conversation.draft_link import DraftLink
from outrider_client.conversation.target_link import TargetLink
from outrider_client.results import GenerationStats, TokenLogprobs
from outrider_client.rules.acceptance import Decision


class Generation:
    """Commits tokens and counts them. The two links only read the committed tokens."""

    def __init__(self, task: Task):
        self.task, self.stats = task, GenerationStats()
        self.logprobs: list[TokenLogprobs] = []  # of the output, if asked for
        self.committed = CommittedTokens(task.prompt_ids)
        self.target = TargetLink(task, self.committed)
        self.draft = DraftLink(task, self.committed)

    def commit_round(self, decision: Decision, num_kept: int) -> None:
        """Commit and count the first `num_kept` tokens of a decision; the rest lies behind the end of the text."""
        num_proposals = self.target.num_proposals
        is_cut = num_kept < len(decision.token_ids)
        num_drafted = min(num_proposals, num_kept) if is_cut else num_proposals
        self._count_round(num_kept, num_drafted, min(decision.num_accepted, num_kept))
        self._commit(decision.token_ids[:num_kept])
        self.logprobs += self.target.round_logprobs[:num_kept]
        if self.task.rule.ends_branch(decision, num_proposals):
            self.draft.begin_branch()

    def _count_round(self, num_kept: int, num_drafted: int, num_accepted: int) -> None:
        stats = self.stats
        stats.num_rounds += 1
        stats.num_generated_tokens += num_kept
        stats.num_draft_tokens += num_drafted
        stats.num_accepted_tokens += num_accepted
        stats.num_rounds_without_draft += not self.target.num_proposals and self.task.speculation.uses_draft
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
