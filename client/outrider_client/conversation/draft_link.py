"""The draft's side of one generation: its proposals, and what it has been sent. Knows no sockets.

`t` is the first undecided position, which is the number of committed tokens. `length` is K of the next round, before
the text's end and the services' limits cut it. All ids and positions are the draft's, which are the target's unless the
tokenizers differ (`translated.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from outrider.protocol.tokens import extend_digest
from outrider.v1 import common_pb2, draft_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.conversation.translated import TranslatedTokens, translated_proposals, translated_sampling
from outrider_client.errors import ServiceFailedError
from outrider_client.text.vocabulary import Translation

GREEDY_ALTERNATIVES = 4  # by default, if the draft or the target is greedy


class DraftLink:
    """What the draft service has proposed and been sent.

    Responses come in order, and each names the last commit that the draft has applied. A commit truncates the draft's
    tokens exactly if it contradicts them, and all that was drafted before arrives before all that is drafted after.
    So the client knows which tokens each response continues.
    """

    def __init__(self, task: Task, committed: Committed):
        self._task, self._text = task, committed
        self._committed = committed  # as the draft reads the text
        self._translation: Translation | None = None  # None: the draft has the target's tokenizer
        self._most_taken = task.target_info.limits.max_support or task.target_info.vocab_size  # tokens of a support
        self.proposals: list[draft_pb2.Proposal] = []  # at t, t + 1, …
        self.has_stopped = False  # until the next commit
        self.info: common_pb2.ModelInfo | None = None  # None until the service has described itself
        self.is_on_trial = False  # after a failure, or far behind: rounds do not wait for it until it has responded
        self._valid_from = 0  # the commit before which proposals are void
        self._branch = 0  # OpenProposals.branch in draft.proto
        self._num_sent = 0  # committed tokens that the draft has been sent
        self.num_alternatives_used = 0  # rejections for which the draft had prepared
        self._alternatives: dict[tuple[int, int], draft_pb2.Alternative] = {}  # by position and token
        self._overruled_at = -1  # where a token contradicted a proposal, while alternatives to it may come
        self._commit_starts: list[int] = []  # first position of each commit sent, ascending
        self._last_applied = 0  # the commit that the last response named
        self._end: float = math.inf  # of the session's furthest window
        self._credit = math.inf  # messages, proposals and alternatives that may still come

    # Messages to the draft.

    def read_as(self, translation: Translation | None) -> None:
        """Set how the draft reads the text, before its session opens. None: as the target does."""
        if translation is not self._translation:
            self.proposals, self._alternatives = [], {}  # of another draft, in its ids
        if translation is None:
            self._committed = self._text
        else:
            self._committed = TranslatedTokens(translation, self._text, len(self._task.prompt_ids))
        self._translation, self._num_sent = translation, 0

    def open(self, length: int) -> draft_pb2.ProposeRequest:
        """Return the message that opens a session with all committed tokens; earlier proposals become void."""
        task = self._task
        assert self.info is not None
        self.proposals, self.has_stopped = [], False
        self._alternatives, self._overruled_at = {}, -1
        self._valid_from = 0
        self._commit_starts.clear()
        self._last_applied, self._credit = 0, 0.0
        self._num_sent = len(self._committed)
        self._end = self._window(length)
        self._grant(self._num_sent)
        return draft_pb2.ProposeRequest(
            open=draft_pb2.OpenProposals(
                sampling=self._sampling,
                seed=task.rule.seed,
                committed=self._committed.span_from(0),
                window=self._end,
                vocab_size=min(self.info.vocab_size, self._vocab_size),
                greedy=self._is_greedy,
                max_support=self._most_support(),
                min_draft_prob=self._min_draft_prob,
                tokenizer=self._tokenizer,
                num_prompt_tokens=self._num_prompt_tokens,
                batch_until=self._batch_until(length),
                branch=self._branch,
                max_alternatives=self._max_alternatives,
                model_identity=self.info.identity,
            )
        )

    def commit(self, length: int) -> draft_pb2.ProposeRequest:
        """Return the message with the tokens committed since the last one."""
        self.has_stopped, self._alternatives = False, {}
        self._commit_starts.append(self._num_sent)
        span = self._committed.span_from(self._num_sent)
        window = self._window(length)
        self._end = max(self._end, window)
        self._grant(self._num_sent)
        self._num_sent = len(self._committed)
        return draft_pb2.ProposeRequest(
            commit=draft_pb2.Commit(
                commit_index=self._commit_index,
                span=span,
                window=window,
                batch_until=self._batch_until(length),
                branch=self._branch,
            )
        )

    @property
    def can_follow(self) -> bool:
        """Whether the committed tokens fit the draft's context and vocabulary."""
        if self.info is None or (isinstance(self._committed, TranslatedTokens) and not self._committed.is_whole):
            return False
        info, unsent = self.info, self._committed[self._num_sent :]
        return len(self._committed) < info.context_length and (not unsent or max(unsent) < info.vocab_size)

    def num_wanted(self, length: int) -> int:
        """Return how many proposals the next round should have; 0 if the draft cannot follow."""
        if self.info is None or not self.can_follow:
            return 0
        task, num_left = self._task, self.info.context_length - len(self._committed)
        limit = task.target_info.limits.max_proposals or length
        ahead = task.speculation.num_ahead(length, self._overlaps)
        return min(length, self._num_left, num_left, limit, ahead)

    def first(self, number: int) -> list[draft_pb2.Proposal]:
        """Return the first proposals in the target's ids, so many or up to one that the target does not have."""
        proposals = self.proposals[:number]
        if self._translation is None:
            return proposals
        return translated_proposals(self._translation, proposals)

    def continuations(self) -> Iterator[tuple[int, list[int]]]:
        """Yield all that may come next, in the target's ids: the digest of a prefix, and tokens behind it."""
        path = [proposal.token_id for proposal in self.first(len(self.proposals))]
        digests = list(accumulate(path, extend_digest, initial=self._text.digest))
        yield digests[0], path
        if self._translation is not None:
            return
        for (position, token_id), alternative in self._alternatives.items():
            index = position - len(self._text)
            if 0 <= index < len(digests):
                behind = [proposal.token_id for proposal in alternative.proposals]
                yield extend_digest(digests[index], token_id), behind

    @property
    def _vocab_size(self) -> int:
        """Below which all proposals are."""
        return self._task.target_info.vocab_size if self._translation is None else self._translation.draft_size

    @property
    def _described(self) -> common_pb2.ModelInfo:
        assert self.info is not None
        return self.info

    @property
    def _tokenizer(self) -> common_pb2.TokenizerFingerprint | None:
        info = self._task.target_info if self._translation is None else self._described
        return info.tokenizer if info.HasField("tokenizer") else None

    @property
    def _sampling(self) -> common_pb2.SamplingParams:
        sampling = self._task.sampling
        return sampling if self._translation is None else translated_sampling(self._translation, sampling)

    @property
    def _num_prompt_tokens(self) -> int:
        text = self._committed
        return text.num_prompt_tokens if isinstance(text, TranslatedTokens) else len(self._task.prompt_ids)

    @property
    def _is_greedy(self) -> bool:
        """Noise has the target's ids and positions as its address, so a draft of others cannot draw with it."""
        is_other = self._translation is not None and self._task.rule.shares_noise
        return is_other or self._task.speculation.greedy_draft

    @property
    def _commit_index(self) -> int:
        return len(self._commit_starts)

    def _window(self, length: int) -> int:
        assert self.info is not None
        speculation = self._task.speculation
        ahead = self._num_left if speculation.method == "draft" else speculation.num_ahead(length, self._overlaps)
        return min(len(self._committed) + min(ahead, self._num_left), self.info.context_length)

    def _batch_until(self, length: int) -> int:
        """A round needs all its proposals, so they may come together. Under the method `draft` each comes at once."""
        if self._task.speculation.method == "draft":
            return 0
        return len(self._committed) + self.num_wanted(length)

    def _most_support(self) -> int:
        """Return the most tokens in a support, by the caller's and both services' limits; 0: no limit."""
        assert self.info is not None
        limits = (it.limits.max_support for it in (self.info, self._task.target_info))
        return min(filter(None, (self._task.speculation.max_support, *limits)), default=0)

    @property
    def _min_draft_prob(self) -> float:
        """0 under the method `draft`, where no commit would make a stopped draft go on."""
        speculation = self._task.speculation
        return 0.0 if speculation.method == "draft" else speculation.min_draft_prob

    @property
    def _max_alternatives(self) -> int:
        """How many alternatives to ask the draft for: none without overlap, or under a rule that allows none."""
        speculation, most = self._task.speculation, self._task.rule.num_alternatives
        if speculation.method != "speculative" or not self._overlaps or not most:
            return 0
        if speculation.num_alternatives is not None:
            return speculation.num_alternatives
        is_greedy = self._task.distribution.is_greedy or self._is_greedy
        return GREEDY_ALTERNATIVES if is_greedy else most

    @property
    def _overlaps(self) -> bool:
        assert self.info is not None
        accelerator = self.info.accelerator
        has_targets = accelerator != "" and accelerator == self._task.target_info.accelerator
        return self._task.speculation.overlaps(has_targets)

    @property
    def _num_left(self) -> int:
        """Tokens until the longest length."""
        return self._task.max_length - len(self._text)

    def _grant(self, start: int) -> None:
        """Add credit for all responses to a message that lets the draft propose from `start` on."""
        num_tokens = self._end - start
        self._credit += 2 + 2 * num_tokens + self._max_alternatives * (2 + num_tokens)

    # Commits and responses.

    def on_committed(self, start: int, token_ids: Sequence[int]) -> None:
        """Drop the proposals that a commit decides, or all if it contradicts one. `start` and the ids are the target's.

        If it contradicts one with the token of an alternative, the alternative's proposals replace them.
        """
        if isinstance(self._committed, TranslatedTokens):
            start, token_ids = len(self._committed), self._committed.take(token_ids)
        for position, (token_id, proposal) in enumerate(zip(token_ids, self.proposals, strict=False), start):
            if proposal.token_id != token_id:
                self._overrule(position)
                alternatives, self._alternatives = self._alternatives, {}
                if alternative := alternatives.get((position, token_id)):
                    self._use(alternative)
                return
        del self.proposals[: len(token_ids)]

    def void(self) -> None:
        """Drop all proposals, including those that arrive before the next commit."""
        self._void(len(self._committed))

    def begin_branch(self) -> None:
        """Have the draft use new random numbers from here on; its proposals become void."""
        self._branch = len(self._committed)
        self.void()

    def on_response(self, response: draft_pb2.ProposeResponse) -> None:
        """Take the proposals of a response that continue the committed tokens.

        Raises:
            CacheMismatchError: the draft's cache is not that of these tokens.
            ServiceFailedError: the response breaks the protocol.
        """
        self._check(response)
        self.is_on_trial = False  # it responds, even if with void proposals
        if response.commit_index >= self._valid_from:
            self._take_proposals(response)
        for alternative in response.alternatives:
            self._take_alternative(alternative, response.commit_index)

    def _take_proposals(self, response: draft_pb2.ProposeResponse) -> None:
        if not self._take_agreeing(response.start_position, response.proposals):
            return
        if response.commit_index == self._commit_index:
            self.has_stopped = response.stopped
        if response.start_position + len(response.proposals) > len(self._committed):
            self._committed.check_cache(response.cache, [proposal.token_id for proposal in self.proposals])

    def _take_agreeing(self, start: int, messages: Sequence[draft_pb2.Proposal]) -> bool:
        """Take undecided proposals; return False if a decided one differs from the committed token."""
        decided = self._committed[start : start + len(messages)]
        for position, (token_id, message) in enumerate(zip(decided, messages, strict=False), start):
            if message.token_id != token_id:
                self._overrule(position)
                return False
        num_decided = max(0, len(self._committed) - start)
        self._take(start + num_decided, messages[num_decided:])
        return True

    def _take(self, position: int, messages: Sequence[draft_pb2.Proposal]) -> None:
        """Take proposals for undecided positions from `position` on."""
        if not messages:
            return
        if position != len(self._committed) + len(self.proposals):
            raise ServiceFailedError(f"the draft proposed for position {position}, out of order")
        self.proposals += messages

    def _take_alternative(self, alternative: draft_pb2.Alternative, commit_index: int) -> None:
        """Keep an alternative, or use it at once if its token has been committed meanwhile."""
        position = alternative.position
        if position >= len(self._committed):
            if commit_index == self._commit_index >= self._valid_from:
                self._alternatives[position, alternative.token_id] = alternative
        elif (position, commit_index) == (self._overruled_at, self._valid_from - 1) and (
            self._committed[position : position + 1] == [alternative.token_id]
        ):
            self._use(alternative)

    def _use(self, alternative: draft_pb2.Alternative) -> None:
        """Go on with the proposals of an alternative whose token was committed."""
        self._overruled_at = -1  # only one alternative has this token
        self.num_alternatives_used += self._take_agreeing(alternative.position + 1, alternative.proposals)

    def _overrule(self, position: int) -> None:
        """Drop all proposals, since a committed token contradicts the one for `position`.

        Alternatives to it may still come from a draft that has not received the token, but not after a second one.
        """
        valid_from = self._valid_from
        self._void(position)
        self._overruled_at = position if self._valid_from > valid_from else -1

    def _void(self, position: int) -> None:
        """Drop all proposals, including late ones drafted before the commit that decided `position`."""
        self.proposals = []
        is_unsent = position >= self._num_sent
        self._valid_from = len(self._commit_starts) + 1 if is_unsent else bisect_right(self._commit_starts, position)

    # Protocol checks.

    def _check(self, response: draft_pb2.ProposeResponse) -> None:
        """Raise ServiceFailedError if a response, void or not, breaks the protocol.

        So the memory and time that a draft can take are bounded by what it was asked for.
        """
        if not self._last_applied <= response.commit_index <= self._commit_index:
            raise ServiceFailedError(f"the draft named commit {response.commit_index}, which it cannot have applied")
        self._last_applied = response.commit_index
        groups = [(it.position, 1, it.proposals[:]) for it in response.alternatives]
        groups.append((response.start_position, 0, response.proposals[:]))
        self._credit -= 1 + sum([num_own + len(messages) for _, num_own, messages in groups])
        if self._credit < 0:
            raise ServiceFailedError("the draft sent more than it was asked for")
        end = max(
            [start + num_own + len(messages) for start, num_own, messages in groups if num_own or messages], default=0
        )
        if end > self._end:
            raise ServiceFailedError(f"the draft proposed for position {end - 1}, beyond its window")
        for _, _, messages in groups:
            self._task.rule.check_proposals(messages, self._vocab_size, self._most_taken)
