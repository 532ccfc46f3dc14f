"""How the proposals of a round become tokens of the text: one class for each rule.

A rule knows what the draft sends with a proposal, what the target returns, what a seed's text depends on, and how to
decide. Nothing else asks which rule is in force. The mathematics is in `acceptance`, as pure functions.

To add a rule, write a class here, put it into `RULES` and `RuleName`, and test its distribution as
tests/unit/test_law_formulas.py does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np

from outrider.protocol import wire
from outrider.sampling.rng import AddressedUniforms, Purpose
from outrider.v1 import draft_pb2
from outrider_client.errors import ServiceFailedError
from outrider_client.rules.acceptance import Decision, Proposal, TargetRow, decide, decide_block, decide_shared_noise

RuleName = Literal["auto", "rejection", "block", "shared_noise"]


class Rule(ABC):
    """How proposals are judged, for one generation. Every rule leaves the target's distribution as it is.

    Unless a rule says otherwise, the draft sends the support that each token was drawn from, with weights, and the
    target returns its probabilities there and one draw from outside.
    """

    name: ClassVar[RuleName]
    shares_noise: ClassVar[bool] = False  # draft and target draw with the same numbers, and no supports are sent
    depends_on_draft: ClassVar[bool] = True  # a seed's text does, and on whether a round has proposals
    depends_on_rounds: ClassVar[bool] = False  # and on where rounds begin and end
    num_alternatives: ClassVar[int] = 2  # other ends of a round that the draft prepares by default; 0: it cannot

    def __init__(self, seed: int):
        """`seed` is the generation's, of 64 bits."""
        self.seed = seed
        self._accept = AddressedUniforms(seed, Purpose.ACCEPT)
        self._residual = AddressedUniforms(seed, Purpose.RESIDUAL)

    @abstractmethod
    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        """Return the tokens of a round.

        Args:
            proposals: K consecutive ones.
            rows: the target's row for each; a single one when K is 0.
            position: of the first token that the round decides.
        """

    def ends_branch(self, decision: Decision, num_proposals: int) -> bool:
        """Return whether the draft must draw with new random numbers behind a round of so many proposals."""
        return False

    def check_proposal(self, message: draft_pb2.Proposal, vocab_size: int, most_support: int) -> None:
        """Refuse a proposal that the target would refuse, or that cannot have been drawn from what came with it.

        Args:
            vocab_size: the target's.
            most_support: tokens in a support that the target takes.

        Raises:
            ServiceFailedError: the message breaks the protocol.
        """
        gaps, weights = message.support_gaps, message.support_weights
        if message.token_id >= vocab_size:
            raise ServiceFailedError(f"the draft proposed token {message.token_id}, which the target does not have")
        if not 0 < len(gaps) == len(weights):
            raise ServiceFailedError(f"the draft sent a support of {len(gaps)} tokens with {len(weights)} weights")
        if len(gaps) > most_support:
            raise ServiceFailedError(f"the draft sent a support of {len(gaps)} tokens: the target takes {most_support}")
        if sum(gaps) + len(gaps) > vocab_size:
            raise ServiceFailedError("the draft sent a support with a token that the target does not have")
        if not min(weights):
            raise ServiceFailedError("the draft sent a support with a weight of 0")
        if message.token_id + 1 not in accumulate(gap + 1 for gap in gaps):
            raise ServiceFailedError(f"the draft sent token {message.token_id} with a support that does not hold it")

    def read_proposal(self, message: draft_pb2.Proposal, vocab_size: int) -> Proposal:
        """Return a proposal that has been checked, with the distribution that it was drawn from."""
        support = wire.support_of(message.support_gaps[:], "support_gaps", vocab_size)
        return Proposal.from_weights(message.token_id, support, np.array(message.support_weights[:], dtype=np.float64))

    def certain_proposal(self, token_id: int) -> draft_pb2.Proposal:
        """Return the proposal of a token that nobody drew: its distribution has all its weight on it."""
        return draft_pb2.Proposal(token_id=token_id, support_gaps=[token_id], support_weights=[1])


class Rejection(Rule):
    """Judge one proposal after the other by their distributions, and replace the first that is rejected.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    name: ClassVar[RuleName] = "rejection"

    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        positions = range(position, position + len(proposals))
        accept_uniforms = [self._accept.at(each) for each in positions]
        return decide(proposals, rows, accept_uniforms, [self._residual.at(each) for each in positions])


class Block(Rule):
    """Judge the proposals of a round together, which keeps at least as many of them.

    Proposals behind the end of a round take part in deciding on it. So what the draft draws in their places needs new
    random numbers, and nothing can be prepared there.

    Source: Sun et al. 2024 (arXiv 2403.10444).
    """

    name = "block"
    depends_on_rounds = True
    num_alternatives = 0

    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        residual_uniforms = [self._residual.at(each) for each in range(position, position + len(proposals))]
        return decide_block(proposals, rows, self._accept.at(position), residual_uniforms)

    def ends_branch(self, decision: Decision, num_proposals: int) -> bool:
        return decision.num_accepted + 1 < num_proposals


class SharedNoise(Rule):
    """Accept proposals while they are what the target itself chooses with the noise that both draw with.

    Proposals and rows cross the wire without supports, and a seed's text is the target's own.

    Source: Daliri et al. 2024 (arXiv 2408.07978).
    """

    name = "shared_noise"
    shares_noise = True
    depends_on_draft = False
    num_alternatives = 4  # the draft foresees what the target may choose

    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        return decide_shared_noise(proposals, rows)

    def check_proposal(self, message: draft_pb2.Proposal, vocab_size: int, most_support: int) -> None:
        if message.token_id >= vocab_size:
            raise ServiceFailedError(f"the draft proposed token {message.token_id}, which the target does not have")
        if message.support_gaps or message.support_weights:
            raise ServiceFailedError("the draft sent a support although it shares its noise with the target")

    def read_proposal(self, message: draft_pb2.Proposal, vocab_size: int) -> Proposal:
        return Proposal.of_token(message.token_id)

    def certain_proposal(self, token_id: int) -> draft_pb2.Proposal:
        return draft_pb2.Proposal(token_id=token_id)


RULES: dict[RuleName, type[Rule]] = {rule.name: rule for rule in (Rejection, Block, SharedNoise)}


def rule_of(name: RuleName, has_seed: bool) -> type[Rule]:
    """Return the rule of a name; `auto` is shared noise for a text with a seed of its own, and else rejection.

    A seed asks for one text, so it gets the one that no draft can change. Without a seed rejection accepts more.
    """
    if name == "auto":
        return SharedNoise if has_seed else Rejection
    return RULES[name]
