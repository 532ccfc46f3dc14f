"""How a distribution is made from logits: the parameters, their ranges, and the logits processors.

The ranges are those of client, services and protos alike: this is the one place that checks them. Adding a processor
takes its parameter here, its class below, and a field of the same name in common.proto.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.structured import StructuredOutputs

COLDEST, HOTTEST = 1e-3, 1e3
MOST_TOP_K = (1 << 31) - 1
MOST_PENALTY = 2.0
MOST_LOGPROBS = 20  # likeliest tokens whose log-probabilities a row reports
MOST_BIAS = 100.0
MOST_IDS, MOST_STOP_IDS = 4096, 256  # so that an opening stays small
MOST_BIASES = MOST_BAD_WORD_IDS = 1024

Logits = Any  # torch.Tensor [V]; clients read the parameters here, and have no torch

NUMBER, COUNT, IDS, SEQUENCES, BIASES = "number", "count", "ids", "sequences", "biases"  # kinds of parameters
GRAMMAR = "grammar"
_PLAIN: dict[str, Callable[[Any], Any]] = {
    NUMBER: lambda value: value,
    COUNT: lambda value: value,
    IDS: tuple,
    SEQUENCES: lambda sequences: tuple(map(tuple, sequences)),
    BIASES: lambda biases: tuple(sorted(dict(biases).items())),
    GRAMMAR: lambda value: None if value is None else StructuredOutputs.of(value),
}  # what is held of a value: something that can be hashed


def _param(kind: str, default: Any, is_valid: Callable[[Any], bool], remedy: str, kw_only: bool = True) -> Any:
    return field(default=default, kw_only=kw_only, metadata={"kind": kind, "is_valid": is_valid, "remedy": remedy})


def _between(least: float, most: float) -> Callable[[float], bool]:
    return lambda number: least <= number <= most


_PENALTY = _between(-MOST_PENALTY, MOST_PENALTY), f"a number from -{MOST_PENALTY:g} to {MOST_PENALTY:g}"
_COUNT = _between(0, MOST_TOP_K)


def _are_ids(most: int) -> Callable[[Sequence[int]], bool]:
    return lambda ids: len(ids) <= most and all(0 <= token_id < 1 << 32 for token_id in ids)


def _are_biases(biases: Sequence[tuple[int, float]]) -> bool:
    is_each_valid = all(-MOST_BIAS <= bias <= MOST_BIAS for _, bias in biases)
    return is_each_valid and _are_ids(MOST_BIASES)([token_id for token_id, _ in biases])


def _are_bad_words(words: Sequence[Sequence[int]]) -> bool:
    return all(words) and _are_ids(MOST_BAD_WORD_IDS)([token_id for word in words for token_id in word])


@dataclass(frozen=True)
class DistributionParams:
    """Temperature, filters and processors, each of which changes nothing by default.

    The processors come first, in the order of PROCESSORS. What they leave are the logits x of a row, which become
    scores s = (x − max x) / temperature, and what the filters leave of these has probabilities in proportion to e^s.
    Tokens are ranked by x, the lowest id first among equals. The likeliest one survives every filter, and a logit of
    −infinity has no probability whatever is kept.

    top_k keeps the first `top_k` of the ranking. top_p divides e^s by its sum over those, and keeps a token when the
    ones before it in the ranking have less than `top_p` together: the shortest beginning of the ranking that reaches
    it. min_p keeps of these the tokens with e^s at least `min_p`, their probability relative to the likeliest one's.

    Raises:
        InvalidArgumentError: a value is out of range; the message names the field.
    """

    # 0 is greedy: the first of the ranking has all, and no filter matters
    temperature: float = _param(
        *(NUMBER, 1.0, lambda it: it == 0 or COLDEST <= it <= HOTTEST),
        *(f"0 (greedy), or a number from {COLDEST} to {HOTTEST}", False),
    )
    top_k: int = _param(COUNT, 0, _COUNT, f"a number from 0 (all) to {MOST_TOP_K}", False)
    top_p: float = _param(NUMBER, 1.0, lambda it: 0 < it <= 1, "a number above 0, up to 1 (all)", False)
    min_p: float = _param(NUMBER, 0.0, _between(0, 1), "a number from 0 (all) to 1", False)
    # Divides positive logits of tokens in prompt and output, multiplies negative ones.
    repetition_penalty: float = _param(NUMBER, 1.0, _between(1e-3, 1e3), "a number from 0.001 to 1000, 1 for none")
    # Taken from the logits of tokens in the output: once, and for each time that they are there.
    presence_penalty: float = _param(NUMBER, 0.0, *_PENALTY)
    frequency_penalty: float = _param(NUMBER, 0.0, *_PENALTY)
    # What is added to the logits of tokens, by their ids.
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = _param(
        BIASES,
        (),
        _are_biases,
        f"up to {MOST_BIASES} token ids, each with a number from -{MOST_BIAS:g} to {MOST_BIAS:g}",
    )
    # Nothing else is written, where there are some.
    allowed_token_ids: Sequence[int] = _param(IDS, (), _are_ids(MOST_IDS), f"up to {MOST_IDS} token ids")
    # Each is a sequence of ids; the last one does not follow the others in the output.
    bad_words: Sequence[Sequence[int]] = _param(
        SEQUENCES, (), _are_bad_words, f"sequences of one token id or more, up to {MOST_BAD_WORD_IDS} ids in all"
    )
    # No sequence of so many tokens comes twice in prompt and output; 0 for none.
    no_repeat_ngram_size: int = _param(COUNT, 0, _COUNT, f"a number from 0 (none) to {MOST_TOP_K}")
    # `stop_token_ids` are not written before so many tokens of output.
    min_tokens: int = _param(COUNT, 0, _COUNT, f"a number from 0 to {MOST_TOP_K}")
    stop_token_ids: Sequence[int] = _param(IDS, (), _are_ids(MOST_STOP_IDS), f"up to {MOST_STOP_IDS} token ids")
    # What the output is written by; where it is complete, only ids that end the text follow.
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = _param(  # noqa: RUF009 - a field, as others
        GRAMMAR, None, lambda _: True, "a mapping with one of json, regex, choice, grammar and json_object"
    )

    def __post_init__(self) -> None:
        for param in fields(DistributionParams):
            value, metadata = _PLAIN[param.metadata["kind"]](getattr(self, param.name)), param.metadata
            if not metadata["is_valid"](value):
                raise InvalidArgumentError(f"{param.name} is {reprlib.repr(value)}: give {metadata['remedy']}")
            object.__setattr__(self, param.name, value)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def has_filters(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @cached_property
    def processors(self) -> tuple[Processor, ...]:
        """The processors that are needed, in their order."""
        return tuple(it for it in PROCESSORS if it.needs(self))


def no_token_left(params: DistributionParams, position: int, why: str | None = None) -> str:
    """Return what to say where processors leave no token for a position."""
    names = ", ".join(name for it in params.processors if it.masks for name in it.parameters)
    who = names or "the sampling parameters"
    reason = f" ({why})" if why else ""
    return f"{who} leave no token for position {position}{reason}: mask fewer, or ask for fewer tokens"


FILTERED = DistributionParams(top_k=2, top_p=0.9, min_p=0.01)  # for warming up: every filter has something to do


class OutputMask(Protocol):
    """Says which tokens may follow an output."""

    failure: str | None  # why nothing may follow the output that was asked about last, where a limit was met

    def allowed(self, output_ids: np.ndarray, num_ids: int) -> np.ndarray:
        """Return `[num_ids] bool`: the ids that may follow `output_ids`, none where these may not stand either."""


@dataclass(frozen=True)
class History:
    """The tokens before a row: committed ones, and the proposals in front of it."""

    token_ids: np.ndarray  # [n] int64
    num_prompt_tokens: int  # what follows these is the output
    grammar: OutputMask | None = None  # of the row's text, if it has `structured_outputs`

    @property
    def output_ids(self) -> np.ndarray:
        return self.token_ids[self.num_prompt_tokens :]


class Processor:
    """Changes the logits of a row, in place; the definitions are vLLM's."""

    parameters: ClassVar[tuple[str, ...]] = ()  # fields of DistributionParams, any of which asks for it
    masks: ClassVar[bool] = False  # tokens, so that none may be left

    def needs(self, params: DistributionParams) -> bool:
        """Return whether `params` ask for it."""
        return any(getattr(params, name) != getattr(DistributionParams, name) for name in self.parameters)

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        """Change `logits` `[V]`, a row behind `history`; ids that the row does not have are passed over."""
        raise NotImplementedError


class Grammar(Processor):
    """Masks the tokens that cannot follow the output in what it is to be written by."""

    parameters = ("structured_outputs",)
    masks = True

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        assert history.grammar is not None, "structured_outputs need a compiled grammar"
        logits[~history.grammar.allowed(history.output_ids, len(logits))] = -math.inf


class AllowedTokenIds(Processor):
    """Masks all other tokens."""

    parameters = ("allowed_token_ids",)
    masks = True

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        ids = _known(params.allowed_token_ids, logits)
        kept = logits[ids]
        logits.fill_(-math.inf)
        logits[ids] = kept


class LogitBias(Processor):
    """Adds a number to the logits of some tokens."""

    parameters = ("logit_bias",)

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        biases = {token_id: bias for token_id, bias in dict(params.logit_bias).items() if token_id < len(logits)}
        logits[list(biases)] += logits.new_tensor(list(biases.values()))


class MinTokens(Processor):
    """Masks the tokens that end the text while there is too little of it."""

    parameters = ("min_tokens",)
    masks = True

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        if len(history.output_ids) < params.min_tokens:
            logits[_known(params.stop_token_ids, logits)] = -math.inf


class RepetitionPenalty(Processor):
    """Makes tokens of prompt and output less likely: divides positive logits, multiplies negative ones."""

    parameters = ("repetition_penalty",)

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        ids, penalty = _known(np.unique(history.token_ids), logits), params.repetition_penalty
        scores = logits[ids]
        logits[ids] = (scores / penalty).where(scores > 0, scores * penalty)


class FrequencyPenalty(Processor):
    """Makes tokens of the output less likely, by how often they are there."""

    parameters = ("frequency_penalty",)

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        ids, counts = np.unique(_known(history.output_ids, logits), return_counts=True)
        logits[ids] -= params.frequency_penalty * logits.new_tensor(counts)


class PresencePenalty(Processor):
    """Makes tokens of the output less likely, however often they are there."""

    parameters = ("presence_penalty",)

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        logits[_known(np.unique(history.output_ids), logits)] -= params.presence_penalty


class BadWords(Processor):
    """Masks the last token of a sequence behind the others of it, in the output alone."""

    parameters = ("bad_words",)
    masks = True

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        output = history.output_ids.tolist()
        begun = [word for word in params.bad_words if output[max(0, len(output) + 1 - len(word)) :] == [*word[:-1]]]
        logits[_known([word[-1] for word in begun], logits)] = -math.inf


class NoRepeatNgrams(Processor):
    """Masks tokens that would end a sequence of n tokens that prompt and output have already; as transformers does."""

    parameters = ("no_repeat_ngram_size",)
    masks = True

    def apply(self, logits: Logits, params: DistributionParams, history: History) -> None:
        size, ids = params.no_repeat_ngram_size, history.token_ids
        if len(ids) >= size:
            ngrams = np.lib.stride_tricks.sliding_window_view(ids, size)
            are_alike = (ngrams[:, :-1] == ids[len(ids) - size + 1 :]).all(-1)
            logits[_known(ngrams[are_alike, -1], logits)] = -math.inf


# A grammar, then vLLM's order: masks that are always the same, biases, min_tokens, penalties, masks by what is written.
PROCESSORS = (
    Grammar(),
    AllowedTokenIds(),
    LogitBias(),
    MinTokens(),
    RepetitionPenalty(),
    FrequencyPenalty(),
    PresencePenalty(),
    BadWords(),
    NoRepeatNgrams(),
)


def _known(token_ids: Sequence[int] | np.ndarray, logits: Logits) -> np.ndarray:
    """Return the ids that a row `[V]` has."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[ids < len(logits)]
