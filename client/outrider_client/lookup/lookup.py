"""The proposals of one text that are looked up, in the text itself and in a prediction of it.

The longest end of the text that occurs elsewhere is found, and what came behind it, the most recent time, is proposed.
This place is followed as long as the text agrees; when it does not, another is looked for. A prediction is followed
from its own beginning first, and comes before the text where both have equally long matches.

What is proposed for a position is a function of the tokens before it: a round that begins in the middle of another's
proposals would have the same ones, since the place that is followed is the same. So with no other source, how many
proposals rounds have changes none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider_client.lookup.experience import Experience
from outrider_client.lookup.index import Index

LOOKUP, PREDICTION = "lookup", "prediction"  # names of the two places
LEAST_MATCH = 2  # tokens; `python -m benchmarks.lookup --sweep` has others
PREDICTED_MATCH = 8  # tokens that the caller's word for the beginning of a prediction is worth
MOST_PROPOSALS = 48  # in a round, where the number is not given


class Tokens(Protocol):
    """Token ids, to be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: slice, /) -> list[int]: ...


@dataclass(frozen=True)
class Found:
    """What a lookup proposes for a round."""

    source: str = LOOKUP
    token_ids: Sequence[int] = ()
    expected_tokens: float = 1.0  # that the round commits with these proposals


NOTHING = Found()


@dataclass
class _Place:
    """Where tokens are found, and how far the text has been followed there."""

    source: str
    tokens: Tokens
    index: Index
    end: int = 0  # of the tokens of the match; behind it lies what is proposed
    match_length: int = 0


class Lookup:
    """Follows one text."""

    def __init__(
        self,
        text: Tokens,
        experience: Experience,
        length: int | None = None,
        is_wanted: bool = False,
        prediction_ids: Sequence[int] = (),
    ):
        """Nothing is read before the first call.

        Args:
            text: the prompt, to which committed tokens are then added by its owner.
            length: proposals in a round; None: as many as pay.
            is_wanted: have at least one where there is a match.
            prediction_ids: what the caller thinks that will come behind the prompt.
        """
        self._text, self._experience = text, experience
        self._length, self._is_wanted = length, is_wanted
        self._num_prompt_tokens, self._num_read = len(text), 0
        self._own = _Place(LOOKUP, text, Index())
        self._own_end = 0  # of its match, from before its last token was put in
        self._places = [self._own]
        self._followed: _Place | None = None
        if prediction_ids:
            index = Index(prediction_ids)
            index.restart()
            self._followed = _Place(PREDICTION, list(prediction_ids), index, match_length=PREDICTED_MATCH)
            self._places.insert(0, self._followed)

    def propose(self, most: int) -> Found:
        """Return at most so many proposals behind the text as it is now."""
        self.catch_up()
        place = self._followed
        if place is None:
            return NOTHING
        length = MOST_PROPOSALS if self._length is None else self._length
        token_ids = self._behind(place, min(most, length))
        expected = self._experience.expected_tokens(place.match_length, len(token_ids))
        if self._length is None:
            number = max(self._experience.best_number(expected), int(self._is_wanted))
            token_ids = token_ids[:number]
        return Found(place.source, token_ids, expected[len(token_ids)]) if token_ids else NOTHING

    def is_better_than_draft(self, found: Found) -> bool:
        """Return whether a round with what was found is expected to commit more than one with a draft's proposals.

        It rests on rounds that are over. If it looked at what the draft proposes now, that would no longer be a draw
        from the distribution that it comes with.
        """
        return found.expected_tokens > self._experience.draft_tokens

    def learn_round(self, num_proposals: int, num_committed: int, round_s: float, is_drafts: bool) -> None:
        """Learn from a round what it took, or how good the draft service's proposals are."""
        if is_drafts:
            self._experience.learn_draft_round(num_committed)
        else:
            self._experience.learn_round(num_proposals, round_s)

    def catch_up(self) -> None:
        """Read what has been committed since the last call; the first reads the prompt."""
        token_ids = self._text[self._num_read :]
        num_left_of_prompt = max(0, self._num_prompt_tokens - self._num_read)
        self._num_read = len(self._text)
        for token_id in token_ids[:num_left_of_prompt]:
            self._own_end = self._own.index.append(token_id)
        if num_left_of_prompt and self._followed is None:
            self._followed = self._longest_match()
        outcomes = [self._read(token_id) for token_id in token_ids[num_left_of_prompt:]]
        self._experience.learn_agreement(filter(None, outcomes))

    def _read(self, token_id: int) -> tuple[int, bool] | None:
        """Read one token of the output; return how long the match before it was, if any, and whether it agrees."""
        place = self._followed
        self._own_end = self._own.index.append(token_id)
        for other in self._places[:-1]:
            other.index.advance(token_id)
        if place is None:
            self._followed = self._longest_match()
            return None
        match_length, agrees = place.match_length, place.tokens[place.end : place.end + 1] == [token_id]
        place.end += 1
        place.match_length += 1
        if not agrees or place.end == len(place.tokens):
            self._followed = self._longest_match()
        return match_length, agrees

    def _longest_match(self) -> _Place | None:
        """Return the place of the longest match, if there is one that is long enough and has something behind it."""
        longest = None
        for place in self._places:
            place.match_length = place.index.match_length
            place.end = self._own_end if place is self._own else place.index.match_end
            is_usable = place.match_length >= LEAST_MATCH and place.end < len(place.tokens)
            if is_usable and (longest is None or place.match_length > longest.match_length):
                longest = place
        return longest

    def _behind(self, place: _Place, most: int) -> list[int]:
        """Return what came behind a match; where it reaches into the match itself, it goes round."""
        found = place.tokens[place.end : place.end + most]
        period = len(place.tokens) - place.end
        while place is self._own and len(found) < most:
            found.append(found[-period])
        return found
