"""A suffix automaton that grows with its tokens and knows where the end of a text occurred before.

Every token costs amortised constant time, and at most MOST_MATCH steps more to keep the most recent occurrences.
Nothing is ever taken back, since only committed tokens are put in. Memory: at most two states for each token.

Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text".
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_MATCH = 32  # tokens of a match that are told apart by length: of longer ones the most recent is as good as any


class Index:
    """Tokens, and a match: the longest end of a text that occurs among them, the most recent one if it does twice.

    A state stands for all sequences that occur at the same places. `_ends` has the most recent of these, where the
    shortest of the sequences is no longer than MOST_MATCH: others are never asked for.
    """

    def __init__(self, token_ids: Iterable[int] = ()):
        self._transitions: list[dict[int, int]] = [{}]
        self._links = [-1]  # the state of the longest suffix that occurs at other places too
        self._lengths = [0]  # of the longest sequence of a state
        self._ends = [0]
        self._num_tokens = self._last = 0
        self._state = self.match_length = 0
        for token_id in token_ids:
            self.append(token_id)

    @property
    def match_end(self) -> int:
        """How many of the tokens lie before the one that followed the match."""
        return self._ends[self._state]

    def restart(self) -> None:
        """Match another text from its beginning."""
        self._state = self.match_length = 0

    def advance(self, token_id: int) -> None:
        """Match the text with one more token, which is not put in."""
        transitions, links, lengths = self._transitions, self._links, self._lengths
        state, length = self._state, self.match_length
        while state and token_id not in transitions[state]:
            state = links[state]
            length = lengths[state]
        found = transitions[state].get(token_id)
        if found is None:
            self.restart()
            return
        state, length = found, min(length + 1, MOST_MATCH)
        while lengths[links[state]] >= length:
            state = links[state]
        self._state, self.match_length = state, length

    def append(self, token_id: int) -> int:
        """Match the text with one more token, then put it in; return `match_end` from before it was put in.

        So a text that is put in token by token is matched with all that came before.
        """
        self.advance(token_id)
        match_end = self._ends[self._state] if self.match_length else 0
        self._put_in(token_id)
        links, lengths, ends, number = self._links, self._lengths, self._ends, self._num_tokens
        state = self._state
        while state and lengths[links[state]] >= self.match_length:  # it was split
            state = links[state]
        self._state = state
        while state:
            ends[state] = number
            state = links[state]
        return match_end

    def _put_in(self, token_id: int) -> None:
        transitions, links, lengths = self._transitions, self._links, self._lengths
        self._num_tokens += 1
        new, state = self._new_state({}, self._num_tokens, self._num_tokens), self._last
        self._last = new
        while state >= 0 and token_id not in transitions[state]:
            transitions[state][token_id] = new
            state = links[state]
        if state < 0:
            return
        found = transitions[state][token_id]
        if lengths[found] > lengths[state] + 1:
            found = self._split(found, state, token_id)
        links[new] = found

    def _split(self, whole: int, state: int, token_id: int) -> int:
        """Return a new state for those sequences of `whole` that are no longer than one token behind `state`."""
        transitions, links = self._transitions, self._links
        part = self._new_state(transitions[whole].copy(), self._lengths[state] + 1, self._ends[whole])
        links[part], links[whole] = links[whole], part
        while state >= 0 and transitions[state].get(token_id) == whole:
            transitions[state][token_id] = part
            state = links[state]
        return part

    def _new_state(self, transitions: dict[int, int], length: int, end: int) -> int:
        self._transitions.append(transitions)
        self._links.append(0)
        self._lengths.append(length)
        self._ends.append(end)
        return len(self._links) - 1
