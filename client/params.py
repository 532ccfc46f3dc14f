"""What a caller asks for, checked where it is said."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from client.errors import InvalidRequestError
from outrider.errors import InvalidArgumentError
from outrider.warping import Warping

Method = Literal["speculative", "autoregressive", "draft"]
METHODS: tuple[str, ...] = get_args(Method)
AUTO: Literal["auto"] = "auto"  # the client picks K for each round, from what it measures

Acceptance = Literal["token", "block"]
ACCEPTANCES: tuple[str, ...] = get_args(Acceptance)
Coupling = Literal["auto", "none", "gumbel"]
COUPLINGS: tuple[str, ...] = get_args(Coupling)


@dataclass(frozen=True)
class SamplingParams:
    """How text is drawn and where it ends.

    Raises:
        InvalidRequestError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    min_p: float = 0.0  # 0 keeps all
    seed: int | None = None  # 64 bits; None draws one
    max_new_tokens: int = 128
    stop: Sequence[str] = ()  # text ends before the first of these
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequestError("stop holds an empty string or no string: give non-empty strings")
        if self.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidRequestError(f"seed is {self.seed}: give a number from 0 to 2^64 - 1")
        _ = self.warping

    @property
    def warping(self) -> Warping:
        try:
            return Warping(self.temperature, self.top_k, self.top_p, self.min_p)
        except InvalidArgumentError as error:
            raise InvalidRequestError(str(error)) from error

    def seed_or_new(self) -> int:
        """Return the seed, or a fresh one from the system."""
        return secrets.randbits(64) if self.seed is None else self.seed


ALTERNATIVES = 4  # where the target takes its own choice
ALTERNATIVES_TO_DRAWS = 2


@dataclass(frozen=True)
class SpeculationParams:
    """How the pair works on one generation. Nothing here changes the law of the text.

    `acceptance` says how proposals are judged. `token`: one after the other; a seed gives one text for every K from 1
    on, window and timing. `block`: the proposals of a round together, which keeps at least as many on average; the law
    is the same, but a seed's text depends on where rounds begin and end too: on K, on a window shorter than K, on
    `min_draft_prob`, and on rounds that find the draft late or gone.

    `coupling` says which random numbers draft and target draw with. `none`: each its own. `gumbel`: the same noise, and
    a proposal is accepted when it is what the target itself chooses. Fewer proposals may be accepted, but tokens alone
    cross the wire, and a seed's text is the target's own: the same for every draft and K, and without a draft. `auto`:
    `gumbel` where a seed is given, so that its text does not depend on the draft at all, and `none` where none is, or
    with `acceptance="block"`, which is acceptance sampling.

    Raises:
        InvalidRequestError: a value is out of range; the message names the field.
    """

    method: Method = "speculative"
    num_speculative_tokens: int | Literal["auto"] = AUTO  # K: most proposals in a round; 0 is the method autoregressive
    overlap: bool | None = None  # the draft goes on while the target verifies; None: unless they share an accelerator
    window: int | None = None  # positions the draft may be ahead of the committed text; None: 2 K with overlap, else K
    max_support: int = 0  # 0: the draft service's own limit
    min_draft_prob: float = 0.0
    greedy_draft: bool = False
    acceptance: Acceptance = "token"
    coupling: Coupling = AUTO
    num_alternatives: int | None = None  # other ends of a round that the draft prepares for; None: see max_alternatives

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequestError(f"method is {self.method!r}: give one of {', '.join(METHODS)}")
        if self.num_speculative_tokens != AUTO and not _is_length(self.num_speculative_tokens):
            raise InvalidRequestError(
                f"num_speculative_tokens is {self.num_speculative_tokens!r}: give {AUTO!r}, or 0 or more"
            )
        if self.window is not None and self.window < 1:
            raise InvalidRequestError(f"window is {self.window}: give 1 or more")
        if self.num_alternatives is not None and not _is_length(self.num_alternatives):
            raise InvalidRequestError(f"num_alternatives is {self.num_alternatives!r}: give None, or 0 or more")
        if not 0 <= self.min_draft_prob <= 1:
            raise InvalidRequestError(f"min_draft_prob is {self.min_draft_prob}: give a number from 0 to 1")
        if self.acceptance not in ACCEPTANCES:
            raise InvalidRequestError(f"acceptance is {self.acceptance!r}: give one of {', '.join(ACCEPTANCES)}")
        if self.coupling not in COUPLINGS:
            raise InvalidRequestError(f"coupling is {self.coupling!r}: give one of {', '.join(COUPLINGS)}")
        if self.is_coupled and self.acceptance != "token":
            raise InvalidRequestError(
                f"acceptance is {self.acceptance!r} and coupling is {self.coupling!r}: a coupling leaves nothing to "
                "judge, so leave acceptance at 'token' or coupling at 'none'"
            )

    @property
    def uses_draft(self) -> bool:
        return self.method == "draft" or (self.method == "speculative" and self.num_speculative_tokens != 0)

    @property
    def is_coupled(self) -> bool:
        """Whether draft and target share their noise; `auto` says so only once it is `resolved`."""
        return self.coupling == "gumbel"

    def resolved(self, has_seed: bool) -> SpeculationParams:
        """Return these with the coupling that `auto` means for a text with or without a seed of its own."""
        if self.coupling != AUTO:
            return self
        return replace(self, coupling="gumbel" if has_seed and self.acceptance == "token" else "none")

    def overlaps(self, have_one_accelerator: bool) -> bool:
        """Return whether the draft goes on while the target verifies: on one accelerator they would take turns."""
        return not have_one_accelerator if self.overlap is None else self.overlap

    def max_alternatives(self, is_greedy: bool, overlaps: bool) -> int:
        """Return how many alternatives the draft is asked for.

        None without overlap, and none with block acceptance, where what is drafted next depends on the whole round.
        By default fewer where they are harder to guess and supports make their messages long.
        """
        if self.method != "speculative" or not overlaps or self.acceptance != "token":
            return 0
        if self.num_alternatives is not None:
            return self.num_alternatives
        return ALTERNATIVES if is_greedy or self.greedy_draft or self.is_coupled else ALTERNATIVES_TO_DRAWS

    def num_ahead(self, num_speculative_tokens: int, overlaps: bool) -> int:
        """Return how far beyond the committed text the draft may go when rounds have so many proposals."""
        if self.window is not None:
            return self.window
        return num_speculative_tokens * (2 if overlaps else 1)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
