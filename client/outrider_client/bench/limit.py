"""The speed of an ideal pair: the same two models, drafting while they verify, with messages that take no time.

Pure functions. K is the number of proposals in a round, E the tokens that a round commits on average, t_d the draft's
time for one token, T_v(n) the target's time for one forward pass that feeds n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What the models take, as a run has measured it."""

    draft_token_s: float  # t_d
    verify_s: Mapping[int, float]  # T_v, by the number of tokens fed

    def verify(self, num_tokens: int) -> float:
        """Return T_v(num_tokens), interpolated between measured numbers; beyond them the nearest one's.

        Raises:
            ValueError: nothing was measured.
        """
        measured = sorted(self.verify_s)
        if not measured:
            raise ValueError("verify_s is empty: measure at least one forward pass")
        return float(np.interp(num_tokens, measured, [self.verify_s[number] for number in measured]))


def expected_tokens(accepted_shares: Sequence[float]) -> float:
    """Return E, the tokens that a round of K proposals commits on average.

    With A accepted proposals a round commits A + 1 tokens, the last of them the target's own, but K when all are
    accepted: there is no bonus token. So E = E[A] + 1 - P(A = K) = 1 + P(A >= 1) + ... + P(A >= K - 1).

    Args:
        accepted_shares: `[K]`: P(A >= i) for i from 1 on, the share of the rounds in which the first i proposals were
            accepted. Not the chance of the i-th given those before it: that is the ratio of two neighbours here.
    """
    return 1.0 + sum(accepted_shares[:-1])


def ideal_round_s(share_all_accepted: float, num_proposals: int, costs: Costs) -> float:
    """Return the time of a round of the ideal pair on average.

    Verification begins when the round's K proposals are there and takes T_v(K). Meanwhile the draft goes on, as if
    all were to be accepted, and at the decision one of two things holds.

    * A proposal was rejected. What was drafted meanwhile stands on it and is void. The draft starts afresh at this
      moment, and the next round takes K t_d + T_v(K).
    * All were accepted. The draft has been working on the next proposals for T_v(K) already, and the next round
      takes max(0, K t_d - T_v(K)) + T_v(K) = max(K t_d, T_v(K)).

    A round is of the second kind as often as the one before it was accepted in full, so that over a long text the
    average is (1 - f) (K t_d + T_v(K)) + f max(K t_d, T_v(K)), whether or not rounds depend on each other.

    Args:
        share_all_accepted: f, the share of the rounds in which all proposals were accepted.
    """
    drafting_s, verifying_s = num_proposals * costs.draft_token_s, costs.verify(num_proposals)
    after_rejection_s, after_success_s = drafting_s + verifying_s, max(drafting_s, verifying_s)
    return (1 - share_all_accepted) * after_rejection_s + share_all_accepted * after_success_s


def ideal_tokens_per_s(accepted_shares: Sequence[float], costs: Costs) -> float:
    """Return the tokens per second of the ideal pair with K proposals a round, K being the number of shares.

    That is E over the average time of a round. Whatever else a real pair does counts against it: messages, sampling,
    the client, the prompt, and the first round, which nothing was drafted for.

    Args:
        accepted_shares: `[K]`, K at least 1, as for expected_tokens.
    """
    return expected_tokens(accepted_shares) / ideal_round_s(accepted_shares[-1], len(accepted_shares), costs)
