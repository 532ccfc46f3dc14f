"""How a distribution is made from logits: the settings, without the mathematics (`outrider.probs` has that)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.errors import InvalidArgumentError

COLDEST = 1e-30  # below it, logits over the temperature would leave float32's range


@dataclass(frozen=True)
class Warping:
    """Temperature and filters, applied in the order of the fields.

    Raises:
        InvalidArgumentError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0  # 0 is greedy, and so is what is colder than COLDEST
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 0 and 1 keep all
    min_p: float = 0.0  # 0 keeps all

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgumentError(f"temperature is {self.temperature}: give a finite number, 0 (greedy) or more")
        if self.top_k < 0:
            raise InvalidArgumentError(f"top_k is {self.top_k}: give 0 (all) or more")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= value <= 1:
                raise InvalidArgumentError(f"{name} is {value}: give a number from 0 to 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def has_filters(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or 0 < self.top_p < 1 or self.min_p > 0)
