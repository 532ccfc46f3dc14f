"""What the draft service has proposed to one generation, and what it has been told. Knows no sockets.

`t` is the first undecided position, the number of committed tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from outrider.protocol import wire
from outrider.sampling.messages import warping_to_proto
from outrider.v1 import common_pb2, draft_pb2
from outrider_client.acceptance import Proposal
from outrider_client.errors import ServiceFailedError

if TYPE_CHECKING:
    from outrider_client.generation import Generation


class DraftLink:
    """What the draft service has proposed and been told.

    Responses come in order, and each names the last commit that was applied. So the client can tell what the draft
    did: it truncates at a commit exactly if the commit contradicts what it had drafted by then, and everything it
    drafted before has arrived here before anything that it drafts afterwards.
    """

    def __init__(self, generation: Generation):
        self._generation = generation
        self.proposals: list[draft_pb2.Proposal] = []  # at t, t + 1, …
        self.has_stopped = False  # nothing more comes until the next commit
        self.info: common_pb2.ModelInfo | None = None  # None until the service has described itself
        self.is_on_trial = False  # after a failure, or far behind: nobody waits for it until it has spoken
        self._valid_from = 0  # proposals drafted under earlier commits are void
        self._told = 0  # committed tokens that the draft knows
        self._alternatives: dict[tuple[int, int], draft_pb2.Alternative] = {}  # by position and token
        self._overruled_at = -1  # position at which a token contradicted a proposal, while alternatives to it may come
        self._commit_starts: list[int] = []  # first positions of the commits sent, from the first on, ascending
        self._last_applied = 0  # the commit that the last response named
        self._end: float = math.inf  # no window of the session reached further
        self._credit = math.inf  # what may still come: each message, proposal and alternative counts

    def open(self) -> draft_pb2.ProposeRequest:
        """Return the message that opens a session with all committed tokens; what was proposed before is void."""
        generation, speculation = self._generation, self._generation.speculation
        assert self.info is not None
        self.proposals, self.has_stopped = [], False
        self._alternatives, self._overruled_at = {}, -1
        self._valid_from = 0
        self._commit_starts.clear()
        self._last_applied, self._credit = 0, 0.0
        self._told = len(generation.tokens)
        self._end = self._window()
        self._grant(self._told)
        target = generation.target_info
        return draft_pb2.ProposeRequest(
            open=draft_pb2.OpenProposals(
                sampling=warping_to_proto(generation.warping, speculation.is_coupled),
                seed=generation.seed,
                committed=generation.span_from(0),
                window=self._end,
                vocab_size=min(self.info.vocab_size, target.vocab_size),
                greedy=speculation.greedy_draft,
                max_support=self._most_support(),
                min_draft_prob=self._min_draft_prob,
                tokenizer=target.tokenizer if target.HasField("tokenizer") else None,
                batch_until=self._batch_until(),
                branch=generation.branch,
                max_alternatives=self._max_alternatives,
                model_identity=self.info.identity,
            )
        )

    @property
    def _commit_index(self) -> int:
        return len(self._commit_starts)

    @property
    def can_follow(self) -> bool:
        """Whether the draft can go on from the committed tokens: they fit its context and its vocabulary."""
        if self.info is None:
            return False
        tokens = self._generation.tokens
        return len(tokens) < self.info.context_length and max(tokens[self._told :], default=0) < self.info.vocab_size

    def commit(self) -> draft_pb2.ProposeRequest:
        """Return the message that tells the draft what has been committed since the last."""
        self.has_stopped, self._alternatives = False, {}
        self._commit_starts.append(self._told)
        span = self._generation.span_from(self._told)
        window = self._window()
        self._end = max(self._end, window)
        self._grant(self._told)
        self._told = len(self._generation.tokens)
        return draft_pb2.ProposeRequest(
            commit=draft_pb2.Commit(
                commit_index=self._commit_index,
                span=span,
                window=window,
                batch_until=self._batch_until(),
                branch=self._generation.branch,
            )
        )

    def on_committed(self, start: int, token_ids: Sequence[int]) -> None:
        """Drop the proposals that a commit decides, and all of them when it contradicts one.

        When it ends with the token of an alternative, that takes their place.
        """
        for position, (token_id, proposal) in enumerate(zip(token_ids, self.proposals, strict=False), start):
            if proposal.token_id != token_id:
                self._overrule(position)
                alternatives, self._alternatives = self._alternatives, {}
                if alternative := alternatives.get((position, token_id)):
                    self._use(alternative)
                return
        del self.proposals[: len(token_ids)]

    def void(self) -> None:
        """Drop all proposals, and those to come from before the next commit."""
        self._void(len(self._generation.tokens))

    def on_response(self, response: draft_pb2.ProposeResponse) -> None:
        """Take the proposals of a response that stand on what is committed.

        Raises:
            CacheMismatchError: the draft's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        self._check(response)
        self.is_on_trial = False  # it speaks, even if what it says is void by now
        if response.commit_index >= self._valid_from:
            self._take_proposals(response)
        for alternative in response.alternatives:
            self._take_alternative(alternative, response.commit_index)

    def _check(self, response: draft_pb2.ProposeResponse) -> None:
        """Raise ServiceFailedError for what cannot come from a draft that keeps the protocol, void or not.

        What is not refused here is used only if it agrees with what is committed. So memory and time that a draft can
        take are bounded by what it was asked for.
        """
        if not self._last_applied <= response.commit_index <= self._commit_index:
            raise ServiceFailedError(f"the draft named commit {response.commit_index}, which it cannot have applied")
        self._last_applied = response.commit_index
        lengths = [1 + len(alternative.proposals) for alternative in response.alternatives]
        self._credit -= 1 + len(response.proposals) + sum(lengths)
        if self._credit < 0:
            raise ServiceFailedError("the draft sent more than it was asked for")
        ends = [it.position + length for it, length in zip(response.alternatives, lengths, strict=True)]
        if response.proposals:
            ends.append(response.start_position + len(response.proposals))
        if max(ends, default=0) > self._end:
            raise ServiceFailedError(f"the draft proposed for position {max(ends) - 1}, beyond its window")
        for alternative in response.alternatives:
            self._check_proposals(alternative.proposals)

    def _check_proposals(self, messages: Sequence[draft_pb2.Proposal]) -> None:
        generation = self._generation
        info, is_coupled = generation.target_info, generation.speculation.is_coupled
        for message in messages:
            check_proposal(message, info.vocab_size, info.limits.max_support or info.vocab_size, is_coupled)

    def _grant(self, start: int) -> None:
        """Allow for all that may come of a message to the draft that lets it propose from a position on."""
        num_tokens = self._end - start
        self._credit += 2 + 2 * num_tokens + self._max_alternatives * (2 + num_tokens)

    @property
    def _max_alternatives(self) -> int:
        generation = self._generation
        return generation.speculation.max_alternatives(generation.warping.is_greedy, self._overlaps)

    def _most_support(self) -> int:
        """Return the most tokens in a support that the caller wants and both services take; 0 where nobody says."""
        assert self.info is not None
        limits = (it.limits.max_support for it in (self.info, self._generation.target_info))
        return min(filter(None, (self._generation.speculation.max_support, *limits)), default=0)

    @property
    def num_wanted(self) -> int:
        """How many proposals the next round should have: 0 where the draft cannot follow."""
        if self.info is None or not self.can_follow:
            return 0
        generation = self._generation
        most = self.info.context_length - len(generation.tokens)
        limit = generation.target_info.limits.max_proposals or generation.length
        ahead = generation.speculation.num_ahead(generation.length, self._overlaps)
        return min(generation.length, generation.num_left, most, limit, ahead)

    def _take_proposals(self, response: draft_pb2.ProposeResponse) -> None:
        if not self._take_agreeing(response.start_position, response.proposals):
            return
        if response.commit_index == self._commit_index:
            self.has_stopped = response.stopped
        if response.start_position + len(response.proposals) > len(self._generation.tokens):
            self._generation.check_cache(response.cache, [proposal.token_id for proposal in self.proposals])

    def _take_agreeing(self, start: int, messages: Sequence[draft_pb2.Proposal]) -> bool:
        """Take those of some proposals that are undecided; return False when another is not what was committed."""
        tokens = self._generation.tokens
        for position, (token_id, message) in enumerate(
            zip(tokens[start : start + len(messages)], messages, strict=False), start
        ):
            if message.token_id != token_id:
                self._overrule(position)
                return False
        num_decided = max(0, len(tokens) - start)
        self._take(start + num_decided, messages[num_decided:])
        return True

    def _take(self, position: int, messages: Sequence[draft_pb2.Proposal]) -> None:
        """Take proposals for undecided positions, the first of which is `position`."""
        if not messages:
            return
        generation = self._generation
        if position != len(generation.tokens) + len(self.proposals):
            raise ServiceFailedError(f"the draft proposed for position {position}, out of order")
        self._check_proposals(messages)
        self.proposals += messages

    def _take_alternative(self, alternative: draft_pb2.Alternative, commit_index: int) -> None:
        """Keep an alternative for when its case comes true, or use it at once where that has happened meanwhile."""
        tokens, position = self._generation.tokens, alternative.position
        if position >= len(tokens):
            if commit_index == self._commit_index >= self._valid_from:
                self._alternatives[position, alternative.token_id] = alternative
        elif (position, commit_index) == (self._overruled_at, self._valid_from - 1) and (
            tokens[position : position + 1] == [alternative.token_id]
        ):
            self._use(alternative)

    def _use(self, alternative: draft_pb2.Alternative) -> None:
        """Go on with an alternative whose case has come true."""
        self._overruled_at = -1  # there is no other for the same token
        is_used = self._take_agreeing(alternative.position + 1, alternative.proposals)
        self._generation.stats.num_alternatives_used += is_used

    def _overrule(self, position: int) -> None:
        """Drop all proposals, since a committed token contradicts that for `position`.

        Alternatives to it may be under way from a draft that has not heard of it, but not after a second one.
        """
        valid_from = self._valid_from
        self._void(position)
        self._overruled_at = position if self._valid_from > valid_from else -1

    def _void(self, position: int) -> None:
        """Drop all proposals, and those to come that were drafted before the commit that decided `position`."""
        self.proposals = []
        is_untold = position >= self._told
        self._valid_from = len(self._commit_starts) + 1 if is_untold else bisect_right(self._commit_starts, position)

    @property
    def _overlaps(self) -> bool:
        assert self.info is not None
        accelerator = self.info.accelerator
        has_targets = accelerator != "" and accelerator == self._generation.target_info.accelerator
        return self._generation.speculation.overlaps(has_targets)

    @property
    def _min_draft_prob(self) -> float:
        """A draft that writes alone must not stop, since only a commit would make it go on."""
        speculation = self._generation.speculation
        return 0.0 if speculation.method == "draft" else speculation.min_draft_prob

    def _batch_until(self) -> int:
        """The next round waits for all its proposals, so they may come together; a draft alone shows each at once."""
        if self._generation.speculation.method == "draft":
            return 0
        return len(self._generation.tokens) + self.num_wanted

    def _window(self) -> int:
        generation = self._generation
        assert self.info is not None
        speculation = generation.speculation
        ahead = speculation.num_ahead(generation.length, self._overlaps)
        if speculation.method == "draft":
            ahead = generation.num_left
        end = min(len(generation.tokens) + ahead, generation.max_length, self.info.context_length)
        return max(end, len(generation.tokens))


def check_proposal(message: draft_pb2.Proposal, vocab_size: int, most_support: int, is_coupled: bool) -> None:
    """Refuse a proposal that the target would refuse, or that cannot have been drawn from what came with it.

    Args:
        vocab_size: the target's.
        most_support: tokens in a support that the target takes.
        is_coupled: the token comes alone.

    Raises:
        ServiceFailedError: it is no proposal.
    """
    if message.token_id >= vocab_size:
        raise ServiceFailedError(f"the draft proposed token {message.token_id}, which the target does not have")
    gaps, weights = message.support_gaps, message.support_weights
    if is_coupled:
        if gaps or weights:
            raise ServiceFailedError("the draft sent a support where it shares its noise, and tokens come alone")
        return
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


def read_proposals(messages: Sequence[draft_pb2.Proposal], vocab_size: int, is_coupled: bool) -> list[Proposal]:
    """Return proposals that have been checked, with the distributions that they were drawn from."""
    if is_coupled:
        return [Proposal.of_token(it.token_id) for it in messages]
    return [_proposal_from_proto(it, vocab_size) for it in messages]


def _proposal_from_proto(message: draft_pb2.Proposal, vocab_size: int) -> Proposal:
    support = wire.support_of(message.support_gaps[:], "support_gaps", vocab_size)
    return Proposal.from_weights(message.token_id, support, np.array(message.support_weights[:], dtype=np.float64))
