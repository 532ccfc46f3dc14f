"""The target's side of one generation: its rounds. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.v1 import draft_pb2, target_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.errors import ServiceFailedError
from outrider_client.logprobs import logprobs_of, prompt_logprobs_of
from outrider_client.results import TokenLogprobs
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow

MASS_SLACK = 2.0**-10  # a row's probabilities are computed in float32


class TargetLink:
    """Builds the target's requests and decides rounds from its responses."""

    def __init__(self, task: Task, committed: Committed):
        self._task, self._committed = task, committed
        self._round_index = 0
        self._round_start = 0  # position of the first token of the round
        self._span_start = 0  # committed tokens that the target has before the round
        self._in_round: Sequence[draft_pb2.Proposal] = ()
        self._read: list[Proposal] | None = None  # those in the round, with their distributions
        self.round_logprobs: list[TokenLogprobs] = []  # of the last round's tokens, if asked for
        self.prompt_logprobs: list[TokenLogprobs | None] = []  # once they have come, if asked for

    def open(self) -> target_pb2.VerifyRequest:
        """Return the message that opens a session with all committed tokens."""
        self._span_start = self._round_start = len(self._committed)
        number = None if self.prompt_logprobs else self._task.num_prompt_logprobs
        return target_pb2.VerifyRequest(
            open=target_pb2.OpenVerification(
                sampling=self._task.sampling,
                seed=self._task.rule.seed,
                committed=self._committed.span_from(0),
                model_identity=self._task.target_info.identity,
                num_prompt_tokens=len(self._task.prompt_ids),
                num_logprobs=self._task.num_logprobs,
                num_prompt_logprobs=number,
            )
        )

    def take_prompt_logprobs(self, response: target_pb2.VerifyResponse) -> None:
        """Keep what answers an opening; raises as `decide_round` does."""
        assert self._task.num_prompt_logprobs is not None
        if response.round_index or not response.HasField("prompt_logprobs"):
            raise ServiceFailedError("the target did not answer the opening, which asks for log-probabilities")
        self._committed.check_cache(response.cache, [])
        asked = self._task.num_prompt_logprobs, self._task.target_info.vocab_size
        self.prompt_logprobs = prompt_logprobs_of(self._task.prompt_ids, response.prompt_logprobs, *asked)

    def begin_round(self, proposals: Sequence[draft_pb2.Proposal]) -> None:
        """Begin the round that has proposals for the next positions verified."""
        self._in_round, self._read = proposals, None
        self._round_index += 1
        self._span_start, self._round_start = self._round_start, len(self._committed)

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
        rows = _rows_from_proto(response.rows, proposals)
        for index, row in enumerate(rows):
            _check_row(row, index, self._task.target_info.vocab_size)
        decision, number = rule.decide(proposals, rows, len(self._committed)), self._task.num_logprobs
        if number is not None:
            supports = [proposal.support_ids.tolist() for proposal in proposals] or [[]]
            self.round_logprobs = list(logprobs_of(decision.token_ids, response.rows, supports, number))
        return decision


def _rows_from_proto(rows: Sequence[target_pb2.TargetRow], proposals: Sequence[Proposal]) -> list[TargetRow]:
    sizes = [len(proposal.support_ids) for proposal in proposals] or [0]
    try:
        probs = [wire.probs_of(row.support_units[:], f"rows[{index}].support_units") for index, row in enumerate(rows)]
    except InvalidArgumentError as error:
        raise ServiceFailedError(f"the target sent a row that breaks the protocol: {error}") from error
    if [len(row_probs) for row_probs in probs] != sizes:
        raise ServiceFailedError("the target sent a row of another length than the support")
    return [
        TargetRow(row_probs, row.outside_mass, row.outside_token_id, _known_prob(row.outside_token_prob))
        for row_probs, row in zip(probs, rows, strict=True)
    ]


def _check_row(row: TargetRow, index: int, vocab_size: int) -> None:
    """Raise ServiceFailedError unless a row is a distribution over the target's vocabulary."""
    if not 0 <= row.outside_mass <= 1 + MASS_SLACK:  # false for NaN
        raise ServiceFailedError(
            f"the target sent rows[{index}].outside_mass {row.outside_mass}, which is no probability"
        )
    mass = float(np.add.reduce(row.probs)) + row.outside_mass
    if abs(mass - 1) > MASS_SLACK:
        raise ServiceFailedError(f"the target sent rows[{index}] with a mass of {mass:g}, where it is 1")
    if row.outside_mass > 0 and row.outside_token_id >= vocab_size:
        raise ServiceFailedError(
            f"the target sent token {row.outside_token_id} in rows[{index}]: its vocabulary has {vocab_size} ids"
        )


def _known_prob(prob: float) -> float | None:
    """Return a reported probability; None if it was not reported."""
    return min(prob, 1.0) if prob > 0 else None  # None for NaN too
