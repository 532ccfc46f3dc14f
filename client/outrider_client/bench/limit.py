"""The speed of an ideal pair: the same two models, drafting during verification, with messages that take no time.

Pure functions. K is the number of proposals in a round, E the mean number of tokens that a round commits, t_d the
draft's time for one token, T_v(n) the target's time for a forward pass of n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """The models' times, as measured in a run."""

    draft_token_s: float  # t_d
    verify_s: Mapping[int, float]  # T_v, by number of tokens

    def verify(self, num_tokens: int) -> float:
        """Return T_v(num_tokens), interpolated between measured numbers and constant beyond them.

        Raises:
            ValueError: nothing was measured.
        """
        measured = sorted(self.verify_s)
        if not measured:
            raise ValueError("verify_s is empty: measure at least one forward pass")
        return float(np.interp(num_tokens, measured, [self.verify_s[number] for number in measured]))


def expected_tokens(accepted_shares: Sequence[float]) -> float:
    """Return E for rounds of K proposals.

    With A accepted proposals a round commits A + 1 tokens, the last of them the target's own, but only K when all are
    accepted: there is no bonus token. So E = E[A] + 1 - P(A = K) = 1 + P(A >= 1) + ... + P(A >= K - 1).

    Args:
        accepted_shares: `[K]`: P(A >= i) for i = 1 … K, the share of rounds whose first i proposals were accepted.
    """
    return 1.0 + sum(accepted_shares[:-1])


def ideal_round_s(share_all_accepted: float, num_proposals: int, costs: Costs) -> float:
    """Return the mean time of a round of the ideal pair.

    Verification starts when the round's K proposals are ready and takes T_v(K). Meanwhile the draft goes on as if all
    of them were accepted.

    * If one is rejected, what was drafted meanwhile is void, and the next round takes K t_d + T_v(K).
    * If all are accepted, the draft is T_v(K) ahead, and the next round takes
      max(0, K t_d - T_v(K)) + T_v(K) = max(K t_d, T_v(K)).

    So the mean over a long text is (1 - f) (K t_d + T_v(K)) + f max(K t_d, T_v(K)), whether or not rounds are
    independent.

    Args:
        share_all_accepted: f, the share of rounds in which all proposals were accepted.
    """
    drafting_s, verifying_s = num_proposals * costs.draft_token_s, costs.verify(num_proposals)
    after_rejection_s, after_success_s = drafting_s + verifying_s, max(drafting_s, verifying_s)
    return (1 - share_all_accepted) * after_rejection_s + share_all_accepted * after_success_s


def ideal_tokens_per_s(accepted_shares: Sequence[float], costs: Costs) -> float:
    """Return the ideal pair's tokens per second: E over the mean time of a round.

    It leaves out messages, sampling, the client, the prompt, and the first round, for which nothing was drafted.

    Args:
        accepted_shares: `[K]`, K at least 1, as for expected_tokens.
    """
    return expected_tokens(accepted_shares) / ideal_round_s(accepted_shares[-1], len(accepted_shares), costs)
