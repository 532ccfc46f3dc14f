"""Grammars, compiled by llguidance for one tokenizer, and which tokens may follow an output.

What may follow is a function of the output alone: a matcher is brought to it by taking back what differs and adding the
rest, so proposals, rollbacks and reopened sessions need nothing of their own. A token that a matcher refuses breaks it
for ever, so each is tried before.

Shapes: V vocabulary size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, get_version

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.structured import StructuredOutputs

# llguidance's limits of work and memory, lower than its own: a grammar that needs more would hold up other texts.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, max_lexer_states=50_000, max_grammar_size=50_000, verbose_errors=False
)
MOST_SENTENCE = 300  # characters of what llguidance says; it may quote the grammar

VERSION = get_version()  # another one may allow other tokens


class Grammars:
    """Compiles grammars for the tokenizer of one model."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]):
        """Take seconds for a large vocabulary.

        Raises:
            InvalidArgumentError: llguidance cannot read the tokenizer.
        """
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)
        try:
            self.tokenizer = LLTokenizer(tokenizer_json, vocab_size, [*eos_token_ids] or None)
        except Exception as error:
            raise InvalidArgumentError(
                f"structured_outputs cannot be had with this tokenizer ({_sentence(str(error))}): leave it out"
            ) from error

    def compile(self, asked: StructuredOutputs) -> Grammar:
        """Return the grammar; the interpreter is free meanwhile.

        Raises:
            InvalidArgumentError: it is refused; the message names the field and has llguidance's sentence.
        """
        try:
            source = _source_of(asked)
        except Exception as error:  # of a schema; llguidance raises nothing more precise
            raise _refusal(asked, str(error)) from error
        grammar = Grammar(asked, self.new_matcher(source), self, source)
        grammar.check()
        return grammar

    def new_matcher(self, source: str) -> LLMatcher:
        return LLMatcher(self.tokenizer, source, log_level=0, limits=LIMITS)


@dataclass(eq=False)
class Grammar:
    """A compiled grammar, which all texts that ask for it share with what has been learned of it."""

    asked: StructuredOutputs
    _matcher: LLMatcher  # of an empty output; never advanced
    _grammars: Grammars
    _source: str
    is_spent: bool = False  # texts have met a limit together: compile it anew

    def begin(self, end_ids: Sequence[int]) -> OutputGrammar:
        """Return what masks one text, which `end_ids` end, and those of the model.

        Raises:
            InvalidArgumentError: there are none.
        """
        ends = self._grammars.eos_token_ids.union(end_ids)
        if not ends:
            raise InvalidArgumentError(
                "structured_outputs need an id that ends the text, and the model has none: give stop_token_ids"
            )
        return OutputGrammar(self, self._matcher.deep_copy(), ends)

    def eos_token_ids(self, num_ids: int) -> list[int]:
        """Return the ids below `num_ids` that llguidance allows behind a complete output."""
        return [token_id for token_id in self._grammars.tokenizer.eos_tokens if token_id < num_ids]

    def compile_alone(self) -> LLMatcher:
        """Return a matcher that shares nothing with others."""
        return self._grammars.new_matcher(self._source)

    def check(self) -> None:
        """Raise InvalidArgumentError if the grammar, its first two tokens, or taking one back is refused."""
        matcher = self._matcher.deep_copy()
        if not matcher.is_error():
            first = np.flatnonzero(_bits(matcher, self._grammars.vocab_size))
            if len(first) and matcher.validate_tokens([int(first[0])]):
                matcher.consume_token(int(first[0]))
                matcher.compute_bitmask()
                matcher.rollback(1)
        if matcher.is_error():
            raise _refusal(self.asked, matcher.get_error())


@dataclass(eq=False)
class OutputGrammar:
    """Which tokens may follow the output of one text. One thread at a time uses it."""

    _grammar: Grammar
    _matcher: LLMatcher
    _end_ids: frozenset[int]  # that end the text
    _taken: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [n], what the matcher stands behind
    _is_alone: bool = False  # the matcher shares nothing with those of other texts
    failure: str | None = None  # why nothing may follow, where a limit was met

    def allowed(self, output_ids: np.ndarray, num_ids: int) -> np.ndarray:
        """Return `[num_ids] bool`; see `OutputMask`.

        Nothing follows an output that the grammar does not have, and none where a limit of llguidance's is met, whose
        sentence is then the `failure`.
        """
        self.failure, found = None, self._allowed(output_ids, num_ids)
        if self._matcher.is_error() and not self._is_alone:
            # Other texts of this grammar may have used up what they share: what this one needs alone decides.
            self._grammar.is_spent = self._is_alone = True
            self._matcher, self._taken = self._grammar.compile_alone(), self._taken[:0]
            found = self._allowed(output_ids, num_ids)
        if self._matcher.is_error():
            self.failure = _sentence(self._matcher.get_error())
            return np.zeros(num_ids, dtype=bool)
        return found

    def _allowed(self, output_ids: np.ndarray, num_ids: int) -> np.ndarray:
        rest, matcher = self._advance(output_ids), self._matcher
        allowed = np.zeros(num_ids, dtype=bool) if rest else _bits(matcher, num_ids)
        if matcher.is_accepting() and self._end_ids.issuperset(rest):
            allowed[self._grammar.eos_token_ids(num_ids)] = False  # of llguidance, which may have guessed them
            allowed[[token_id for token_id in self._end_ids if token_id < num_ids]] = True
        return allowed

    def _advance(self, output_ids: np.ndarray) -> list[int]:
        """Bring the matcher behind `output_ids`; return what of them it does not take, from the first such token on.

        An id that ends the text where it may is not taken.
        """
        common = min(len(output_ids), len(self._taken))
        differ = np.flatnonzero(output_ids[:common] != self._taken[:common])
        start = int(differ[0]) if len(differ) else common
        if start < len(self._taken):
            self._matcher.rollback(len(self._taken) - start)
        for end in range(start, len(output_ids)):
            token_id = int(output_ids[end])
            is_end = token_id in self._end_ids and self._matcher.is_accepting()
            if is_end or not self._matcher.validate_tokens([token_id]) or not self._matcher.consume_token(token_id):
                break
        else:
            end = len(output_ids)
        self._taken = output_ids[:end].copy()
        return output_ids[end:].tolist()


def _bits(matcher: LLMatcher, num_ids: int) -> np.ndarray:
    """Return which tokens may come next, `[num_ids] bool`; without meaning where the matcher is broken."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(mask, count=num_ids, bitorder="little").view(bool)


def _source_of(asked: StructuredOutputs) -> str:
    """Return the grammar in llguidance's own form."""
    if asked.kind == "regex":
        return LLMatcher.grammar_from_regex(asked.text)
    if asked.kind == "grammar":
        return LLMatcher.grammar_from_lark(asked.text)
    if asked.kind == "choice":  # one terminal: as alternatives of a rule, thousands would be too many
        texts = " | ".join(json.dumps(each) for each in asked.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    return LLMatcher.grammar_from_json_schema(asked.text or '{"type": "object"}')


def _refusal(asked: StructuredOutputs, sentence: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"structured_outputs.{asked.kind} cannot be used: {_sentence(sentence)}; give another grammar, or none"
    )


def _sentence(text: str) -> str:
    """Return what llguidance says on one line, and no more than a little."""
    line = " ".join(text.removesuffix("<non-verbose/>").split())
    return line if len(line) <= MOST_SENTENCE else f"{line[:MOST_SENTENCE]}…"
