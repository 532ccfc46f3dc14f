"""The state of one generation: what is committed, what is proposed, what each service has been told. Knows no sockets.

The client owns the truth. Committed tokens live here alone; a service holds a cache of some prefix of them, and every
message names absolute positions, so that reopening a stream is the same as continuing it. The last committed token is
always pending: it is in neither cache until the round after it.

`t` is the first undecided position, the number of committed tokens. K is the number of proposals of a round.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.protocol.tokens import TokenLog, extend_digest
from outrider.sampling.messages import warping_to_proto
from outrider.sampling.rng import AddressedUniforms, Purpose
from outrider.sampling.warping import Warping
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from outrider_client.acceptance import Decision, Proposal, TargetRow, decide, decide_block, decide_coupled
from outrider_client.draft_link import DraftLink, read_proposals
from outrider_client.errors import CacheMismatchError, ServiceFailedError
from outrider_client.params import SpeculationParams
from outrider_client.results import GenerationStats

MASS_SLACK = 2.0**-10  # of a row: logits become probabilities in float32


class Generation:
    """Committed tokens, proposals and rounds of one sequence."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        warping: Warping,
        seed: int,
        speculation: SpeculationParams,
        max_length: int,
        target_info: common_pb2.ModelInfo,
    ):
        """`max_length` is the most tokens, prompt included, that the sequence may have."""
        self.tokens = TokenLog(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.stats = GenerationStats()
        self.warping, self.seed, self.speculation = warping, seed, speculation
        self.max_length, self.target_info = max_length, target_info
        self.length = 0  # K of the next round, as far as the text's end and the services' limits allow it
        self._accept = AddressedUniforms(seed, Purpose.ACCEPT)
        self._residual = AddressedUniforms(seed, Purpose.RESIDUAL)
        self._round_index = 0
        self._target_told = 0  # committed tokens that the target had when the last round began
        self.branch = 0  # under which the draft draws; OpenProposals.branch in draft.proto
        self._in_round: list[draft_pb2.Proposal] = []
        self._read: list[Proposal] | None = None  # the round's proposals with their distributions
        self.draft = DraftLink(self)

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.max_length - len(self.tokens)

    # The target's side.

    def open_target(self) -> target_pb2.VerifyRequest:
        """Return the message that opens a session with all committed tokens."""
        self._target_told = len(self.tokens)
        return target_pb2.VerifyRequest(
            open=target_pb2.OpenVerification(
                sampling=warping_to_proto(self.warping, self.speculation.is_coupled),
                seed=self.seed,
                committed=self.span_from(0),
                model_identity=self.target_info.identity,
            )
        )

    def begin_round(self, num_proposals: int) -> target_pb2.VerifyRequest:
        """Return the request that has the first `num_proposals` proposals verified."""
        self._in_round, self._read = self.draft.proposals[:num_proposals], None
        self._round_index += 1
        return self.round_request()

    def round_request(self) -> target_pb2.VerifyRequest:
        """Return the present round's request; sending it again is safe, and so is sending it to a new session."""
        return target_pb2.VerifyRequest(
            round=target_pb2.Round(
                round_index=self._round_index,
                committed=self.span_from(self._target_told),
                proposals=[
                    target_pb2.ProposedToken(token_id=proposal.token_id, support_gaps=proposal.support_gaps)
                    for proposal in self._in_round
                ],
            )
        )

    def read_round(self) -> list[Proposal]:
        """Return the proposals of the present round with their distributions, which are read once.

        The request needs none of it, so that this can be done while the target is at work.
        """
        if self._read is None:
            self._read = read_proposals(self._in_round, self.target_info.vocab_size, self.speculation.is_coupled)
        return self._read

    def decide_round(self, response: target_pb2.VerifyResponse) -> Decision:
        """Return what the rows of the present round decide; nothing is committed yet.

        Raises:
            CacheMismatchError: the target's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        proposals = self.read_round()
        if response.round_index != self._round_index:
            raise ServiceFailedError(f"the target answered round {response.round_index} instead of {self._round_index}")
        if len(response.rows) != max(1, len(proposals)):
            raise ServiceFailedError(
                f"the target answered with {len(response.rows)} rows for {len(proposals)} proposals"
            )
        self.check_cache(response.cache, [proposal.token_id for proposal in proposals])
        rows, first = _rows_from_proto(response.rows, proposals), len(self.tokens)
        for index, row in enumerate(rows):
            self._check_row(row, index)
        if self.speculation.is_coupled:
            return decide_coupled(proposals, rows)
        positions = range(first, first + len(proposals))
        residual_uniforms = [self._residual.at(position) for position in positions]
        if self.speculation.acceptance == "block":
            return decide_block(proposals, rows, self._accept.at(first), residual_uniforms)
        return decide(proposals, rows, [self._accept.at(position) for position in positions], residual_uniforms)

    def _check_row(self, row: TargetRow, index: int) -> None:
        """Raise ServiceFailedError for a row that is no distribution over the target's own vocabulary."""
        if not 0 <= row.outside_mass <= 1 + MASS_SLACK:  # neither is NaN
            raise ServiceFailedError(f"the target sent rows[{index}].outside_mass {row.outside_mass}, which is none")
        mass = float(row.probs.sum()) + row.outside_mass
        if mass > 1 + MASS_SLACK or (mass < 1 - MASS_SLACK and not self.speculation.is_coupled):
            raise ServiceFailedError(f"the target sent rows[{index}] with a mass of {mass:g}, where it is 1")
        has_choice = row.outside_mass > 0 or self.speculation.is_coupled
        if has_choice and row.outside_token_id >= self.target_info.vocab_size:
            raise ServiceFailedError(
                f"the target sent token {row.outside_token_id} in rows[{index}]: its vocabulary has "
                f"{self.target_info.vocab_size} ids"
            )

    def commit_round(self, decision: Decision, num_kept: int) -> None:
        """Commit the first `num_kept` tokens of a decision and count them; the rest lies behind the end of the text."""
        kept = decision.token_ids[:num_kept]
        num_drafted = len(self._in_round) if num_kept == len(decision.token_ids) else min(len(self._in_round), num_kept)
        num_accepted = min(decision.num_accepted, num_kept)
        self._count_round(num_kept, num_drafted, num_accepted)
        self._target_told = len(self.tokens)
        is_new_branch = self.speculation.acceptance == "block" and decision.num_accepted + 1 < len(self._in_round)
        self._commit(kept)
        if is_new_branch:  # proposals behind the end took part in deciding on it
            self.branch = len(self.tokens)
            self.draft.void()
        self._in_round = []

    def _count_round(self, num_kept: int, num_drafted: int, num_accepted: int) -> None:
        stats = self.stats
        stats.num_rounds += 1
        stats.num_generated_tokens += num_kept
        stats.num_draft_tokens += num_drafted
        stats.num_accepted_tokens += num_accepted
        stats.num_rounds_without_draft += not self._in_round and self.speculation.uses_draft
        for counts, number in (
            (stats.num_draft_tokens_per_position, num_drafted),
            (stats.num_accepted_tokens_per_position, num_accepted),
        ):
            counts.extend([0] * (num_drafted - len(counts)))
            for index in range(number):
                counts[index] += 1

    def commit_drafts(self, num_kept: int) -> None:
        """Commit the draft's own first `num_kept` tokens: the method `draft`."""
        kept = [proposal.token_id for proposal in self.draft.proposals[:num_kept]]
        self.stats.num_generated_tokens += num_kept
        self.stats.num_draft_tokens += num_kept
        self._commit(kept)

    def _commit(self, token_ids: Sequence[int]) -> None:
        start = len(self.tokens)
        self.tokens.extend(token_ids)
        self.draft.on_committed(start, token_ids)

    def span_from(self, start_position: int) -> common_pb2.TokenSpan:
        """Return the committed tokens from a position on."""
        return common_pb2.TokenSpan(
            start_position=start_position,
            token_ids=wire.pack_ids(self.tokens[start_position:]),
            prefix_digest=self.tokens.digest(start_position),
        )

    def check_cache(self, cache: common_pb2.CacheState, ahead: Sequence[int]) -> None:
        """Raise CacheMismatchError unless `cache` belongs to the committed tokens followed by some of `ahead`."""
        num_ahead = cache.num_cached_tokens - len(self.tokens)
        if num_ahead > len(ahead):
            raise CacheMismatchError
        digest = self.tokens.digest(min(cache.num_cached_tokens, len(self.tokens)))
        for token_id in ahead[: max(0, num_ahead)]:
            digest = extend_digest(digest, token_id)
        if digest != cache.digest:
            raise CacheMismatchError


def _rows_from_proto(rows: Sequence[target_pb2.TargetRow], proposals: Sequence[Proposal]) -> list[TargetRow]:
    sizes = [len(proposal.support_ids) for proposal in proposals] or [0]
    try:
        probs = [wire.probs_of(row.support_units[:], f"rows[{index}].support_units") for index, row in enumerate(rows)]
    except InvalidArgumentError as error:
        raise ServiceFailedError(f"the target sent a row that is none: {error}") from error
    if [len(row_probs) for row_probs in probs] != sizes:
        raise ServiceFailedError("the target sent a row of another length than the support")
    return [
        TargetRow(row_probs, row.outside_mass, row.outside_token_id, _known_prob(row.outside_token_prob))
        for row_probs, row in zip(probs, rows, strict=True)
    ]


def _known_prob(prob: float) -> float | None:
    """Return a probability that the target tells beside what decides; None where it tells none."""
    return min(prob, 1.0) if prob > 0 else None  # neither is NaN
