"""A generation's task, and its committed tokens. Knows no sockets.

Only the client holds the committed tokens. Services cache some prefix of them, and every message names absolute
positions, so reopening a stream is the same as continuing it. The last committed token is always pending: it is in
neither cache until the round after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from outrider.protocol import wire
from outrider.protocol.tokens import TokenLog, extend_digest
from outrider.sampling.distribution import MOST_STOP_IDS, DistributionParams
from outrider.sampling.messages import params_to_proto
from outrider.v1 import common_pb2
from outrider_client.errors import CacheMismatchError
from outrider_client.params import SpeculationParams
from outrider_client.rules.rules import Rule


@dataclass(frozen=True)
class Task:
    """What to generate, and with which target. It does not change during a generation."""

    prompt_ids: Sequence[int]
    distribution: DistributionParams
    rule: Rule
    speculation: SpeculationParams
    max_length: int  # most tokens, prompt included, that the sequence may have
    target_info: common_pb2.ModelInfo
    num_logprobs: int | None = None  # SamplingParams.logprobs
    num_prompt_logprobs: int | None = None  # and its prompt_logprobs
    end_token_ids: Sequence[int] = ()  # behind which there is no text
    has_draft: bool = True  # there is a draft service
    looks_up: bool = False  # proposals are looked up, too

    @property
    def runs_ahead(self) -> bool:
        """Whether the target decides by itself: its own choice at each position is the text, whatever is proposed.

        What is looked up is proposed in rounds: it follows the committed text, and would lie behind the target.
        """
        is_own = self.rule.shares_noise or not self.uses_draft
        return is_own and not self.looks_up and self.speculation.method != "draft"

    @property
    def uses_draft(self) -> bool:
        """Whether the draft service is asked for proposals."""
        return self.has_draft and self.speculation.uses_draft

    @property
    def sampling(self) -> common_pb2.SamplingParams:
        """How both services draw. Under `min_tokens` they also need the ids that end the text."""
        params, ends = self.distribution, list[int]()
        if params.min_tokens:
            ends = [*dict.fromkeys((*params.stop_token_ids, *self.target_info.eos_token_ids))][:MOST_STOP_IDS]
        return params_to_proto(replace(params, stop_token_ids=ends), self.rule.shares_noise)


class Committed:
    """The committed tokens of one sequence, read-only."""

    def __init__(self, prompt_ids: Sequence[int]):
        self._tokens = TokenLog(prompt_ids)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, positions: slice) -> list[int]:
        return self._tokens[positions]

    @property
    def digest(self) -> int:
        """The digest of all tokens."""
        return self._tokens.digest(len(self._tokens))

    def span_from(self, start_position: int) -> common_pb2.TokenSpan:
        """Return the tokens from a position on."""
        return common_pb2.TokenSpan(
            start_position=start_position,
            token_ids=wire.pack_ids(self._tokens[start_position:]),
            prefix_digest=self._tokens.digest(start_position),
        )

    def check_cache(self, cache: common_pb2.CacheState, ahead: Sequence[int]) -> None:
        """Raise CacheMismatchError unless `cache` belongs to the committed tokens followed by some of `ahead`."""
        num_cached, num_committed = cache.num_cached_tokens, len(self._tokens)
        if num_cached > num_committed + len(ahead):
            raise CacheMismatchError
        if num_cached <= num_committed:
            digest = self._tokens.digest(num_cached)
        else:
            digest = self._tokens.digest(num_committed)
            for token_id in ahead[: num_cached - num_committed]:
                digest = extend_digest(digest, token_id)
        if digest != cache.digest:
            raise CacheMismatchError


class CommittedTokens(Committed):
    """The committed tokens as their generation, which alone adds to them, holds them."""

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tokens.extend(token_ids)
