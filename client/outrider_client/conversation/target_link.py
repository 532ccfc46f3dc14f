"""The rounds that one generation has its target verify. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.scales import PROB_UNIT
from outrider.v1 import draft_pb2, target_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.errors import ServiceFailedError
from outrider_client.logprobs import logprobs_of
from outrider_client.results import TokenLogprobs
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow

MASS_SLACK = 2.0**-10  # of a row: logits become probabilities in float32


class TargetLink:
    """What the target service is sent, and what its answers decide."""

    def __init__(self, task: Task, committed: Committed):
        self._task, self._committed = task, committed
        self._round_index = 0
        self._round_start = 0  # position of the first token that the round decides
        self._span_start = 0  # committed tokens that the target has when the round comes
        self._in_round: Sequence[draft_pb2.Proposal] = ()
        self._read: list[Proposal] | None = None  # those in the round, with their distributions
        self.round_logprobs: list[TokenLogprobs] = []  # of what the last round decided, where they are asked for

    def open(self) -> target_pb2.VerifyRequest:
        """Return the message that opens a session with all committed tokens."""
        self._span_start = self._round_start = len(self._committed)
        return target_pb2.VerifyRequest(
            open=target_pb2.OpenVerification(
                sampling=self._task.sampling,
                seed=self._task.rule.seed,
                committed=self._committed.span_from(0),
                model_identity=self._task.target_info.identity,
                num_prompt_tokens=len(self._task.prompt_ids),
                num_logprobs=self._task.num_logprobs,
            )
        )

    def begin_round(self, proposals: Sequence[draft_pb2.Proposal]) -> target_pb2.VerifyRequest:
        """Return the request that has proposals for the next positions verified."""
        self._in_round, self._read = proposals, None
        self._round_index += 1
        self._span_start, self._round_start = self._round_start, len(self._committed)
        return self.round_request()

    @property
    def num_proposals(self) -> int:
        """How many proposals the present round has."""
        return len(self._in_round)

    def round_request(self) -> target_pb2.VerifyRequest:
        """Return the present round's request; sending it again is safe, and so is sending it to a new session."""
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
        """Return the proposals of the present round with their distributions, which are read once.

        The request does not need them, so they can be read while the target is at work.
        """
        if self._read is None:
            rule, vocab_size = self._task.rule, self._task.target_info.vocab_size
            self._read = [rule.read_proposal(message, vocab_size) for message in self._in_round]
        return self._read

    def decide_round(self, response: target_pb2.VerifyResponse) -> Decision:
        """Return what the rows of the present round decide; nothing is committed yet.

        Raises:
            CacheMismatchError: the target's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        proposals, rule = self.read_round(), self._task.rule
        if response.round_index != self._round_index:
            raise ServiceFailedError(f"the target answered round {response.round_index} instead of {self._round_index}")
        if len(response.rows) != max(1, len(proposals)):
            raise ServiceFailedError(
                f"the target answered with {len(response.rows)} rows for {len(proposals)} proposals"
            )
        self._committed.check_cache(response.cache, [proposal.token_id for proposal in proposals])
        vocab_size, sizes = self._task.target_info.vocab_size, [len(its.support_ids) for its in proposals] or [0]
        rows = [
            _row_from_proto(row, index, size, vocab_size)
            for index, (row, size) in enumerate(zip(response.rows, sizes, strict=True))
        ]
        decision, number = rule.decide(proposals, rows, len(self._committed)), self._task.num_logprobs
        if number is not None:
            supports = [proposal.support_ids.tolist() for proposal in proposals] or [[]]
            self.round_logprobs = list(logprobs_of(decision.token_ids, response.rows, supports, number))
        return decision


def _row_from_proto(message: target_pb2.TargetRow, index: int, size: int, vocab_size: int) -> TargetRow:
    """Return a row on a support of `size` tokens.

    Raises:
        ServiceFailedError: it is no distribution there over the target's own vocabulary.
    """
    units, outside_mass, token_id = message.support_units[:], message.outside_mass, message.outside_token_id
    prob = message.outside_token_prob
    if len(units) != size:
        raise ServiceFailedError("the target sent a row of another length than the support")
    try:
        probs = wire.probs_of(units, "support_units")
    except InvalidArgumentError as error:
        raise ServiceFailedError(f"the target sent a row that breaks the protocol: rows[{index}].{error}") from error
    if not 0 <= outside_mass <= 1 + MASS_SLACK:  # false for NaN
        raise ServiceFailedError(f"the target sent rows[{index}].outside_mass {outside_mass}, which is no probability")
    mass = sum(units) * PROB_UNIT + outside_mass
    if not -MASS_SLACK <= mass - 1 <= MASS_SLACK:
        raise ServiceFailedError(f"the target sent rows[{index}] with a mass of {mass:g}, where it is 1")
    if outside_mass > 0 and token_id >= vocab_size:
        raise ServiceFailedError(
            f"the target sent token {token_id} in rows[{index}]: its vocabulary has {vocab_size} ids"
        )
    # None where the target does not report it; NaN is not positive.
    return TargetRow(probs, outside_mass, token_id, (prob if prob < 1 else 1.0) if prob > 0 else None)
