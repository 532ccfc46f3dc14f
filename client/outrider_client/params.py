"""Sampling and speculation parameters, checked when they are made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, get_args

from outrider.protocol.errors import InvalidArgumentError
from outrider.sampling.distribution import (
    BIASES,
    COUNT,
    IDS,
    MOST_LOGPROBS,
    MOST_TOP_K,
    NUMBER,
    SEQUENCES,
    DistributionParams,
)
from outrider_client import arguments
from outrider_client.errors import InvalidRequestError
from outrider_client.rules.rules import RULES, RuleName

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or chat messages
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]]

Method = Literal["speculative", "autoregressive", "draft"]
METHODS: tuple[str, ...] = get_args(Method)
AUTO: Literal["auto"] = "auto"  # the client picks K for each round, from what it measures
RULE_NAMES = (AUTO, *RULES)
PARAMETERS = fields(DistributionParams)
MOST_STOP_CHARACTERS = 1 << 16  # of all stop strings together: each token is compared with all of them

_PLAIN: dict[str, Callable[[str, Any, str], Any]] = {
    NUMBER: lambda name, value, _: arguments.real_number(name, value, -math.inf, math.inf, "a number"),
    COUNT: lambda name, value, remedy: arguments.whole_number(name, value, 0, MOST_TOP_K, remedy),
    IDS: arguments.token_ids,
    SEQUENCES: lambda name, value, remedy: arguments.words(name, value, f"a list of texts, or of {remedy}"),
    BIASES: arguments.biases,
}  # by the kinds of a distribution's parameters


def _open() -> Any:
    return field(default=None, kw_only=True)


@dataclass(frozen=True)
class SamplingParams(DistributionParams):
    """How text is sampled and where it ends. `DistributionParams` documents the fields that make the distribution.

    None in a field of `NEUTRAL` is open: it takes the default of the target model's generation_config, as in vLLM, or
    else the value in `NEUTRAL`. Services get the `distribution`, in which nothing is open. Ids may be any iterable,
    `logit_bias` also a mapping. `bad_words` takes texts as well as sequences of ids: a text is banned as the target's
    tokenizer encodes it with a leading space, and without. A text ends at `stop_token_ids` too.

    Raises:
        InvalidRequestError: a value is out of range or of another type; the message names the field.
    """

    temperature: float | None = None  # type: ignore[assignment]
    top_k: int | None = None  # type: ignore[assignment]
    top_p: float | None = None  # type: ignore[assignment]
    min_p: float | None = None  # type: ignore[assignment]
    repetition_penalty: float | None = _open()  # type: ignore[assignment]
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = _open()  # type: ignore[assignment]
    bad_words: Sequence[str | Sequence[int]] | None = _open()  # type: ignore[assignment]
    no_repeat_ngram_size: int | None = _open()  # type: ignore[assignment]
    min_tokens: int | None = _open()  # type: ignore[assignment]
    seed: int | None = None  # 64 bits; None draws one
    max_new_tokens: int | None = None  # 0 is for those who want `prompt_logprobs` alone
    stop: Sequence[str] = ()  # text ends before the first of these; any iterable
    ignore_eos: bool = False
    logprobs: int | None = None  # of the chosen tokens, and of this many likeliest ones at each position; None: none
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, each given those before it

    def __post_init__(self) -> None:
        self._check_distribution()
        if self.seed is not None:
            remedy = "None, or a whole number from 0 to 2^64 - 1"
            _set(self, "seed", arguments.whole_number("seed", self.seed, 0, (1 << 64) - 1, remedy))
        if self.max_new_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            remedy = f"None, or a whole number, {least} or more{', or 0 with prompt_logprobs' if least else ''}"
            most_new = arguments.whole_number("max_new_tokens", self.max_new_tokens, least, None, remedy)
            _set(self, "max_new_tokens", most_new)
        _set(self, "stop", arguments.strings("stop", self.stop, MOST_STOP_CHARACTERS))
        _set(self, "ignore_eos", arguments.flag("ignore_eos", self.ignore_eos))
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None:
                remedy = f"None, or a whole number from 0 to {MOST_LOGPROBS}"
                _set(self, name, arguments.whole_number(name, number, 0, MOST_LOGPROBS, remedy))
        if (self.min_tokens or 0) > (math.inf if self.max_new_tokens is None else self.max_new_tokens):
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}: give at most max_new_tokens, which is {self.max_new_tokens}"
            )

    def _check_distribution(self) -> None:
        given = {param.name: param.metadata for param in PARAMETERS if not self._is_open(param.name)}
        for name, metadata in given.items():
            _set(self, name, _PLAIN[metadata["kind"]](name, getattr(self, name), metadata["remedy"]))
        words = self.bad_words
        if words is not None:
            _set(self, "bad_words", [word for word in words if not isinstance(word, str)])
        try:
            distribution = self.distribution
        except InvalidArgumentError as error:
            raise InvalidRequestError(str(error)) from error
        for name in given:
            _set(self, name, getattr(distribution, name))
        if words is not None:
            _set(self, "bad_words", tuple(word if isinstance(word, str) else tuple(word) for word in words))

    def _is_open(self, name: str) -> bool:
        return name in NEUTRAL and getattr(self, name) is None

    @property
    def distribution(self) -> DistributionParams:
        """The part that services need; open fields have their neutral values.

        Raises:
            InvalidRequestError: `bad_words` holds texts, which `with_word_ids` turns into ids.
        """
        if self._has_word_texts:
            raise InvalidRequestError("bad_words holds texts: services take sequences of token ids")
        names = [param.name for param in PARAMETERS if not self._is_open(param.name)]
        return DistributionParams(**{name: getattr(self, name) for name in names})

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return these with all open fields set, from the model's `defaults` or else to neutral values.

        The model's own `min_tokens` is cut to `max_new_tokens`.

        Raises:
            InvalidRequestError: the caller's `min_tokens` exceeds the default of `max_new_tokens`.
        """
        values = NEUTRAL | dict(defaults)
        most = values["max_new_tokens"] if self.max_new_tokens is None else self.max_new_tokens
        values["min_tokens"] = min(values["min_tokens"], most)
        return replace(self, **{name: value for name, value in values.items() if self._is_open(name)})

    @property
    def _has_word_texts(self) -> bool:
        return any(isinstance(word, str) for word in self.bad_words or ())

    def with_word_ids(self, ids_of: Callable[[str], Sequence[Sequence[int]]]) -> SamplingParams:
        """Return these with the sequences of ids that `ids_of` makes of each text in `bad_words`.

        Raises:
            InvalidRequestError: they are too many.
        """
        if not self._has_word_texts:
            return self
        words = [ids_of(word) if isinstance(word, str) else [word] for word in self.bad_words or ()]
        return replace(self, bad_words=[ids for sequences in words for ids in sequences])

    def seed_or_new(self) -> int:
        """Return the seed, or a random one."""
        return secrets.randbits(64) if self.seed is None else self.seed


# Values of open fields for which the target's model has no default either.
NEUTRAL: dict[str, Any] = {"max_new_tokens": 128} | {
    param.name: param.default for param in PARAMETERS if getattr(SamplingParams, param.name) is None
}


class SpeculationFields(TypedDict, total=False):
    """The commonest fields of SpeculationParams, which calls also take as keywords."""

    method: Method
    num_speculative_tokens: int | Literal["auto"]
    rule: RuleName
    overlap: bool | None
    lookup: bool | None
    prediction: str | Sequence[int] | None


@dataclass(frozen=True)
class SpeculationParams:
    """How the pair works on one generation. Nothing here changes the distribution of the text.

    `rule` says how proposals are judged, and so what a seed's text depends on (`outrider_client.rules`):

    * `rejection`: one by one. The text depends on the draft, but not on K (from 1 on), the window or timing.
    * `block`: a round's proposals together, which accepts at least as many. The text also depends on where rounds begin
      and end: on K, the window, `min_draft_prob`, and on rounds for which the draft was late.
    * `shared_noise`: may accept fewer, but sends no supports, and the text is the target's own, with any draft or none.
    * `auto`: `shared_noise` with a seed, else `rejection`.

    `lookup` proposes what followed the last time that the text read as it ends now, and `prediction` what the caller
    thinks will be written: beside a draft service the one that promises more tokens has the round, and without one they
    are the whole draft (`outrider_client.lookup`).

    Raises:
        InvalidRequestError: a value is out of range or of another type; the message names the field.
    """

    method: Method = "speculative"
    num_speculative_tokens: int | Literal["auto"] = AUTO  # K: most proposals in a round; 0: target only
    overlap: bool | None = None  # the draft goes on while the target verifies; None: unless they share an accelerator
    window: int | None = None  # positions the draft may be ahead of the committed text; None: 2 K with overlap, else K
    max_support: int = 0  # 0: the draft service's own limit
    min_draft_prob: float = 0.0
    greedy_draft: bool = False
    rule: RuleName = AUTO
    num_alternatives: int | None = None  # other ends of a round that the draft prepares for; None: as the rule says
    lookup: bool | None = None  # look up proposals in the text; None: with a prediction, or if the client's draft is so
    prediction: str | Sequence[int] | None = None  # of the output, as text or token ids: proposals, never more

    def __post_init__(self) -> None:
        arguments.one_of("method", self.method, METHODS)
        arguments.one_of("rule", self.rule, RULE_NAMES)
        if not (isinstance(self.num_speculative_tokens, str) and self.num_speculative_tokens == AUTO):
            self._take_whole_number("num_speculative_tokens", 0, f"{AUTO!r}, or 0 or more")
        if self.window is not None:
            self._take_whole_number("window", 1, "None, or 1 or more")
        if self.num_alternatives is not None:
            self._take_whole_number("num_alternatives", 0, "None, or 0 or more")
        self._take_whole_number("max_support", 0, "0 (the service's limit) or more")
        prob = arguments.real_number("min_draft_prob", self.min_draft_prob, 0.0, 1.0, "a number from 0 to 1")
        _set(self, "min_draft_prob", prob)
        _set(self, "greedy_draft", arguments.flag("greedy_draft", self.greedy_draft))
        if self.overlap is not None:
            _set(self, "overlap", arguments.flag("overlap", self.overlap, "None, True or False"))
        if self.lookup is not None:
            _set(self, "lookup", arguments.flag("lookup", self.lookup, "None, True or False"))
        self._take_prediction()

    def _take_prediction(self) -> None:
        if self.prediction is None:
            return
        if isinstance(self.prediction, str):
            _set(self, "prediction", arguments.text("prediction", self.prediction))
        else:
            ids = arguments.token_ids("prediction", self.prediction, "text, or a list of token ids")
            _set(self, "prediction", tuple(ids))
        if self.lookup is False:
            raise InvalidRequestError(
                "prediction needs lookup, which is False: leave lookup None, or give no prediction"
            )

    def with_fields(self, keywords: Mapping[str, Any]) -> SpeculationParams:
        """Return these with the keywords of a call; raises InvalidRequestError for an unknown one."""
        for name in keywords:
            if name not in SpeculationFields.__annotations__:
                known = ", ".join(SpeculationFields.__annotations__)
                raise InvalidRequestError(
                    f"{name} is no keyword of this call: give {known}, or SamplingParams and SpeculationParams"
                )
        return replace(self, **keywords) if keywords else self

    def _take_whole_number(self, name: str, least: int, remedy: str) -> None:
        remedy = f"{remedy}, and at most {arguments.MOST_UINT32}"
        _set(self, name, arguments.whole_number(name, getattr(self, name), least, arguments.MOST_UINT32, remedy))

    @property
    def uses_draft(self) -> bool:
        return self.method == "draft" or (self.method == "speculative" and self.num_speculative_tokens != 0)

    def looks_up(self, by_default: bool) -> bool:
        """Return whether proposals are looked up; `by_default` where the client's draft is made of lookups."""
        if self.method != "speculative" or self.num_speculative_tokens == 0:
            return False
        return (by_default or self.prediction is not None) if self.lookup is None else self.lookup

    def overlaps(self, have_one_accelerator: bool) -> bool:
        """Return whether the draft goes on while the target verifies; on one accelerator they would take turns."""
        return not have_one_accelerator if self.overlap is None else self.overlap

    def num_ahead(self, num_speculative_tokens: int, overlaps: bool) -> int:
        """Return how far ahead of the committed text the draft may be, in rounds of so many proposals."""
        if self.window is not None:
            return self.window
        return num_speculative_tokens * (2 if overlaps else 1)


def _set(params: Any, name: str, value: object) -> None:
    object.__setattr__(params, name, value)
