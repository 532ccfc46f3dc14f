"""The target's side of a generation whose client decides: its rounds. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.v1 import draft_pb2, target_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.target_link import TargetLink, rows_from_proto
from outrider_client.errors import ServiceFailedError
from outrider_client.logprobs import logprobs_of
from outrider_client.rules.acceptance import Decision, Proposal


class RoundsLink(TargetLink):
    """Builds the target's requests and decides rounds from its responses."""

    def __init__(self, task: Task, committed: Committed):
        super().__init__(task, committed)
        self._round_index = 0
        self._round_start = 0  # position of the first token of the round
        self._span_start = 0  # committed tokens that the target has before the round
        self._in_round: Sequence[draft_pb2.Proposal] = ()
        self._read: list[Proposal] | None = None  # those in the round, with their distributions

    def open(self) -> target_pb2.VerifyRequest:
        """Return the message that opens a session with all committed tokens."""
        self._span_start = self._round_start = len(self._committed)
        return target_pb2.VerifyRequest(open=self._opening())

    def begin_round(self, proposals: Sequence[draft_pb2.Proposal]) -> target_pb2.VerifyRequest:
        """Return the request that has proposals for the next positions verified."""
        self._in_round, self._read = proposals, None
        self._round_index += 1
        self._span_start, self._round_start = self._round_start, len(self._committed)
        return self.round_request()

    @property
    def num_proposals(self) -> int:
        """How many proposals the current round has."""
        return len(self._in_round)

    def round_request(self) -> target_pb2.VerifyRequest:
        """Return the current round's request. It may be sent again, to this session or a new one."""
        return target_pb2.VerifyRequest(
            round=target_pb2.Round(
                round_index=self._round_index,
                committed=self._committed.span_from(self._span_start),
                proposals=[
                    target_pb2.ProposedToken(token_id=proposal.token_id, support_gaps=proposal.support_gaps)
                    for proposal in self._in_round
                ],
            )
        )

    def read_round(self) -> list[Proposal]:
        """Return the current round's proposals with their distributions, parsed once.

        The request does not need them, so this can run while the target works.
        """
        if self._read is None:
            rule, vocab_size = self._task.rule, self._task.target_info.vocab_size
            self._read = [rule.read_proposal(message, vocab_size) for message in self._in_round]
        return self._read

    def decide_round(self, response: target_pb2.VerifyResponse) -> Decision:
        """Return the decision of the current round, without committing it.

        Raises:
            CacheMismatchError: the target's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        proposals, rule = self.read_round(), self._task.rule
        if response.round_index != self._round_index:
            raise ServiceFailedError(f"the target answered round {response.round_index} instead of {self._round_index}")
        if not 0 < len(response.rows) <= max(1, len(proposals)):
            raise ServiceFailedError(
                f"the target answered with {len(response.rows)} rows for {len(proposals)} proposals"
            )
        self._committed.check_cache(response.cache, [proposal.token_id for proposal in proposals])
        proposals = proposals[: len(response.rows)]  # what comes behind these is not decided yet
        sizes = [len(proposal.support_ids) for proposal in proposals] or [0]
        rows = rows_from_proto(response.rows, sizes, self._task.target_info.vocab_size)
        decision, number = rule.decide(proposals, rows, len(self._committed)), self._task.num_logprobs
        if number is not None:
            supports = [proposal.support_ids.tolist() for proposal in proposals] or [[]]
            self.round_logprobs = list(logprobs_of(decision.token_ids, response.rows, supports, number))
        return decision
