"""How a distribution is made from logits: the settings, without the mathematics (`outrider.sampling.probs` has that).

The ranges are those of client, services and protos alike: this is the one place that checks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider.protocol.errors import InvalidArgumentError

COLDEST, HOTTEST = 1e-3, 1e3
MOST_TOP_K = (1 << 31) - 1


@dataclass(frozen=True)
class Warping:
    """Temperature and filters, applied in the order of the fields.

    The logits x of a row become scores s = (x − max x) / temperature, and what the filters leave has probabilities in
    proportion to e^s. Tokens are ranked by their logits, the lowest id first among equals. The likeliest one survives
    every filter, and a logit of −infinity has no probability whatever is kept.

    top_k keeps the first `top_k` of the ranking. top_p divides e^s by its sum over those, and keeps a token when the
    ones before it in the ranking have less than `top_p` together: the shortest beginning of the ranking that reaches
    it. min_p keeps of these the tokens with e^s at least `min_p`, their probability relative to the likeliest one's.

    Raises:
        InvalidArgumentError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0  # 0 is greedy: the first of the ranking has all, and no filter matters
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    min_p: float = 0.0  # 0 keeps all

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST):
            raise InvalidArgumentError(
                f"temperature is {self.temperature}: give 0 (greedy), or a number from {COLDEST} to {HOTTEST}"
            )
        if not 0 <= self.top_k <= MOST_TOP_K:
            raise InvalidArgumentError(f"top_k is {self.top_k}: give a number from 0 (all) to {MOST_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgumentError(f"top_p is {self.top_p}: give a number above 0, up to 1 (all)")
        if not 0 <= self.min_p <= 1:
            raise InvalidArgumentError(f"min_p is {self.min_p}: give a number from 0 (all) to 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_filters(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


FILTERED = Warping(top_k=2, top_p=0.9, min_p=0.01)  # for warming up: every filter has something to do
