"""Means and lines of what is measured again and again, in which old values count less and less."""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_SLOPE_WEIGHT = 3.0  # of the stand-in for a slope


@dataclass
class Line:
    """A decayed least-squares line y = intercept + slope · x, with a prior on the slope."""

    memory: float
    weight: float = 0.0
    x: float = 0.0  # decayed sums
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        memory = self.memory
        self.weight, self.x, self.y = memory * self.weight + 1.0, memory * self.x + x, memory * self.y + y
        self.xx, self.xy = memory * self.xx + x * x, memory * self.xy + x * y

    def slope(self, prior: float) -> float:
        """Return the slope, at least 0, pulled towards `prior` as if by values that differ by one in x."""
        if not self.weight:
            return prior
        spread = self.xx - self.x * self.x / self.weight
        covariance = self.xy - self.x * self.y / self.weight
        return max(0.0, (covariance + PRIOR_SLOPE_WEIGHT * prior) / (spread + PRIOR_SLOPE_WEIGHT))

    def at(self, x: float, slope: float) -> float:
        """Return y at `x` on the line of this slope through the mean of what was added."""
        return self.y / self.weight + slope * (x - self.x / self.weight)


@dataclass
class Average:
    """A decayed mean."""

    memory: float  # weight of a value, against the one after it
    weight: float = 0.0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.weight, self.total = self.memory * self.weight + 1.0, self.memory * self.total + value

    def fade(self, weight: float) -> None:
        """Have all that was added so far weigh no more than so many further values."""
        if self.weight > weight:
            self.weight, self.total = weight, self.mean * weight

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0
