"""A draft of another tokenizer: what it reads in place of the target's tokens, and its proposals in the target's ids.

The draft works in its own ids throughout: its positions, its cache and its digests are those of the translated text.
Only proposals are translated back, and they end at the first that the target does not have. That is exact: whether
there is a proposal depends on the draft's draw alone, and given that there is one, it was drawn from the draft's
distribution on the shared tokens, renormalised. Without one the token is the target's own.

Source: Timor et al. 2025 (arXiv 2502.05202), token-level intersection; a draw outside it is not repeated here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.protocol import wire
from outrider.v1 import common_pb2, draft_pb2
from outrider_client.conversation.committed import Committed, CommittedTokens
from outrider_client.text.vocabulary import NOT_SHARED, Translation


class TranslatedTokens(CommittedTokens):
    """The committed tokens as the draft reads them."""

    def __init__(self, translation: Translation, committed: Committed, num_prompt_tokens: int):
        self._translation = translation
        opening = translation.opening(committed[:num_prompt_tokens])
        super().__init__(opening or [])
        self.num_prompt_tokens = len(self)
        self.is_whole = bool(opening)  # the draft can read all tokens so far
        self.take(committed[num_prompt_tokens : len(committed)])

    def take(self, target_ids: Sequence[int]) -> list[int]:
        """Add tokens of the target's, and return how the draft reads them."""
        ids = self._translation.continuation(target_ids) if self.is_whole else None
        self.is_whole = ids is not None
        self.extend(ids or [])
        return ids or []


def translated_proposals(translation: Translation, proposals: Sequence[draft_pb2.Proposal]) -> list[draft_pb2.Proposal]:
    """Return proposals in the target's ids, up to the first that the target does not have.

    A support keeps the tokens that are shared, with their weights: they are relative, so their distribution is
    renormalised.
    """
    translated: list[draft_pb2.Proposal] = []
    for proposal in proposals:
        token_id = int(translation.target_ids(proposal.token_id))
        if token_id == NOT_SHARED:
            break
        support = wire.support_of(proposal.support_gaps[:], "support_gaps", translation.draft_size)
        ids, weights = translation.target_ids(support), np.array(proposal.support_weights[:], dtype=np.int64)
        order = np.argsort(ids)[np.count_nonzero(ids == NOT_SHARED) :]  # those come first, being below all ids
        translated.append(
            draft_pb2.Proposal(
                token_id=token_id,
                support_gaps=wire.support_gaps(ids[order]),
                support_weights=weights[order].tolist() if len(weights) else (),
            )
        )
    return translated


def translated_sampling(translation: Translation, sampling: common_pb2.SamplingParams) -> common_pb2.SamplingParams:
    """Return how the draft draws: what names ids names those that it shares with the target."""
    result, shared = common_pb2.SamplingParams(), translation.shared_id
    result.CopyFrom(sampling)
    for field in ("logit_bias", "allowed_token_ids", "bad_words", "stop_token_ids"):
        result.ClearField(field)
    for token_id, value in sampling.logit_bias.items():
        if (its := shared(token_id)) is not None:
            result.logit_bias[its] = value
    for ids, into in (
        (sampling.allowed_token_ids, result.allowed_token_ids),
        (sampling.stop_token_ids, result.stop_token_ids),
    ):
        into.extend(its for token_id in ids if (its := shared(token_id)) is not None)
    for words in sampling.bad_words:
        its_words = [shared(token_id) for token_id in words.token_ids]
        if None not in its_words:
            result.bad_words.add(token_ids=its_words)
    return result
