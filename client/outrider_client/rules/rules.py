"""How the proposals of a round become tokens of the text: one class for each rule.

A rule knows what the draft sends with a proposal, what the target returns, what a seed's text depends on, and how to
decide. No other code asks which rule applies. The mathematics is in `acceptance`, as pure functions.

To add a rule, write a class here, add it to `RULES` and `RuleName`, and test its distribution as
tests/unit/test_distribution_formulas.py does.
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
    """How one generation's proposals are judged. Every rule leaves the target's distribution unchanged.

    By default the draft sends the support that each token was drawn from, with weights, and the target returns its
    probabilities there and one draw from outside.
    """

    name: ClassVar[RuleName]
    shares_noise: ClassVar[bool] = False  # draft and target draw with the same numbers; no supports are sent
    depends_on_draft: ClassVar[bool] = True  # a seed's text depends on the draft, and on which rounds have proposals
    depends_on_rounds: ClassVar[bool] = False  # a seed's text also depends on where rounds begin and end
    num_alternatives: ClassVar[int] = 2  # other ends of a round that the draft prepares by default; 0: not possible

    def __init__(self, seed: int):
        self.seed = seed
        self._accept = AddressedUniforms(seed, Purpose.ACCEPT)
        self._residual = AddressedUniforms(seed, Purpose.RESIDUAL)

    @abstractmethod
    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        """Return the tokens of a round.

        Args:
            proposals: K consecutive ones.
            rows: the target's row for each; one row if K is 0.
            position: of the first token of the round.
        """

    def ends_branch(self, decision: Decision, num_proposals: int) -> bool:
        """Return whether the draft must use new random numbers after a round of `num_proposals`."""
        return False

    def check_proposals(self, messages: Sequence[draft_pb2.Proposal], vocab_size: int, most_support: int) -> None:
        """Refuse proposals that the target would refuse, or that cannot have been drawn from what came with them.

        Args:
            vocab_size: the target's.
            most_support: most tokens in a support that the target takes.

        Raises:
            ServiceFailedError: a message breaks the protocol.
        """
        for message in messages:
            token_id, gaps, weights = message.token_id, message.support_gaps[:], message.support_weights[:]
            size = len(gaps)
            if token_id >= vocab_size:
                raise ServiceFailedError(f"the draft proposed token {token_id}, which the target does not have")
            if not 0 < size == len(weights):
                raise ServiceFailedError(f"the draft sent a support of {size} tokens with {len(weights)} weights")
            if size > most_support:
                raise ServiceFailedError(f"the draft sent a support of {size} tokens: the target takes {most_support}")
            if sum(gaps) + size > vocab_size:
                raise ServiceFailedError("the draft sent a support with a token that the target does not have")
            if 0 in weights:
                raise ServiceFailedError("the draft sent a support with a weight of 0")
            if gaps != [token_id] and token_id + 1 not in accumulate([gap + 1 for gap in gaps]):
                raise ServiceFailedError(f"the draft sent token {token_id} with a support that does not hold it")

    def read_proposal(self, message: draft_pb2.Proposal, vocab_size: int) -> Proposal:
        """Return a checked proposal, with the distribution that it was drawn from."""
        support = wire.support_of(message.support_gaps[:], "support_gaps", vocab_size)
        return Proposal.from_weights(message.token_id, support, np.array(message.support_weights[:], dtype=np.float64))

    def certain_proposal(self, token_id: int) -> draft_pb2.Proposal:
        """Return the proposal of a token that nobody drew: its distribution has all its weight on it."""
        return draft_pb2.Proposal(token_id=token_id, support_gaps=[token_id], support_weights=[1])


class Rejection(Rule):
    """Judge proposals one by one, and replace the first that is rejected.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    name: ClassVar[RuleName] = "rejection"

    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        positions = range(position, position + len(proposals))
        accept_uniforms = [self._accept.at(each) for each in positions]
        return decide(proposals, rows, accept_uniforms, [self._residual.at(each) for each in positions])


class Block(Rule):
    """Judge the proposals of a round together, which accepts at least as many.

    The outcome also depends on the proposals that are dropped. So their positions need new random numbers, and the
    draft can prepare nothing there.

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
    """Accept proposals while they equal what the target chooses with the same noise.

    Proposals and rows travel without supports, and a seed's text is the target's own.

    Source: Daliri et al. 2024 (arXiv 2408.07978).
    """

    name = "shared_noise"
    shares_noise = True
    depends_on_draft = False
    num_alternatives = 4  # the draft foresees what the target may choose

    def decide(self, proposals: Sequence[Proposal], rows: Sequence[TargetRow], position: int) -> Decision:
        return decide_shared_noise(proposals, rows)

    def check_proposals(self, messages: Sequence[draft_pb2.Proposal], vocab_size: int, most_support: int) -> None:
        for message in messages:
            if message.token_id >= vocab_size:
                raise ServiceFailedError(f"the draft proposed token {message.token_id}, which the target does not have")
            if message.support_gaps or message.support_weights:
                raise ServiceFailedError("the draft sent a support although it shares its noise with the target")

    def read_proposal(self, message: draft_pb2.Proposal, vocab_size: int) -> Proposal:
        return Proposal.of_token(message.token_id)

    def certain_proposal(self, token_id: int) -> draft_pb2.Proposal:
        return draft_pb2.Proposal(token_id=token_id)


RULES: dict[RuleName, type[Rule]] = {rule.name: rule for rule in (Rejection, Block, SharedNoise)}


def rule_of(name: RuleName, has_seed: bool, is_greedy: bool = False) -> type[Rule]:
    """Return the rule of a name; `auto` is shared noise for texts with a seed, else rejection.

    A seed asks for one text, so it gets the one that no draft can change. Without a seed, rejection accepts more. For a
    greedy text all rules decide alike, and shared noise needs no supports.
    """
    if is_greedy:
        return SharedNoise
    if name == "auto":
        return SharedNoise if has_seed else Rejection
    return RULES[name]
