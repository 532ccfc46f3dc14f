"""What is drawn, and what it is drawn with: drafts, the target's rows, and the arrays that readers take.

Shapes: N rows, n draws one after the other, S tokens of a support, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from outrider.sampling.distribution import DistributionParams
from outrider.sampling.logprobs import Logprobs
from outrider.sampling.rng import Noise, key_of

MIN_SUPPORT_PROB = 2e-4
MOST_SUPPORT = 1024  # tokens of a support that an accelerator's reader finds: it is compiled for one size
MOST_OTHERS = 2  # tokens beside the one that was drawn; likewise
NO_SUPPORT = np.empty(0, np.int64)


def noise_addresses(numbers: Sequence[object]) -> np.ndarray:
    """Return `[N, 4]` uint64: 1, the two words of its seed, and its position, for each Noise; 0 for every uniform."""
    if Noise not in set(map(type, numbers)):
        return np.zeros((len(numbers), 4), dtype=np.uint64)
    return np.array(
        [[1, *key_of(it.seed), it.position] if isinstance(it, Noise) else [0] * 4 for it in numbers], dtype=np.uint64
    )


def _temperatures(params: Sequence[DistributionParams]) -> np.ndarray:
    return np.array([its.temperature for its in params], dtype=np.float64)


def _uniforms(numbers: Sequence[float | Noise]) -> np.ndarray:
    """Return `[N]` float64, 0 where there is noise."""
    if Noise in set(map(type, numbers)):
        numbers = [0.0 if isinstance(number, Noise) else number for number in numbers]
    return np.array(numbers, dtype=np.float64)


@dataclass(frozen=True)
class RowNumbers:
    """How a token is drawn from each of N rows: the numbers that every reader needs."""

    temperatures: np.ndarray  # [N] float64; 0 is the likeliest token alone
    uniforms: np.ndarray  # [N] float64
    noises: np.ndarray  # [N, 4] uint64, noise_addresses: noise takes the place of the uniform

    @classmethod
    def of(cls, params: Sequence[DistributionParams], numbers: Sequence[float | Noise]) -> RowNumbers:
        """Return them for rows that are drawn from with a uniform, or the noise of their positions."""
        return cls(_temperatures(params), _uniforms(numbers), noise_addresses(numbers))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three of them."""
        return self.temperatures, self.uniforms, self.noises


@dataclass(frozen=True)
class Draws:
    """How n tokens are drafted for each of N sequences, one after the other, without logits processors."""

    vocab_sizes: np.ndarray  # [N] int64; no id from there on is drawn
    temperatures: np.ndarray  # [N] float64
    top_ks: np.ndarray  # [N] int64
    top_ps: np.ndarray  # [N] float64
    min_ps: np.ndarray  # [N] float64
    max_supports: np.ndarray  # [N] int64
    uniforms: np.ndarray  # [n, N] float64
    noises: np.ndarray  # [n, N, 4] uint64
    num_others: int = 0  # likeliest tokens that are reported beside the one drawn

    @classmethod
    def of(
        cls,
        vocab_sizes: Sequence[int],
        params: Sequence[DistributionParams],
        max_supports: Sequence[int],
        numbers: Sequence[Sequence[float | Noise]],
        num_others: int = 0,
    ) -> Draws:
        """Return them for `numbers` `[n, N]`."""
        flat, shape = list(chain.from_iterable(numbers)), (len(numbers), len(params))
        return cls(
            np.array(vocab_sizes),
            _temperatures(params),
            np.array([its.top_k for its in params]),
            np.array([its.top_p for its in params], dtype=np.float64),
            np.array([its.min_p for its in params], dtype=np.float64),
            np.array(max_supports),
            _uniforms(flat).reshape(shape),
            noise_addresses(flat).reshape(*shape, 4),
            num_others,
        )

    def with_numbers(self, numbers: Sequence[Sequence[float | Noise]]) -> Draws:
        """Return the same with other random numbers `[n, N]`, of any n."""
        flat, shape = list(chain.from_iterable(numbers)), (len(numbers), len(self.temperatures))
        uniforms, noises = _uniforms(flat).reshape(shape), noise_addresses(flat).reshape(*shape, 4)
        return replace(self, uniforms=uniforms, noises=noises)

    @property
    def have_filters(self) -> bool:
        """Whether a row has filters; they say nothing at the temperature 0."""
        are_on = (self.top_ks > 0) | (self.top_ps < 1) | (self.min_ps > 0)
        return bool((are_on & (self.temperatures != 0)).any())


@dataclass(frozen=True)
class Draft:
    """A drafted token, with the support it was drawn from; without it when it was drawn with noise."""

    token_id: int
    support_ids: np.ndarray  # [S] int64, ascending
    weights: np.ndarray  # [S] int64, whole; outrider.protocol.scales
    token_prob: float  # its share of the support's weights
    others: tuple[tuple[int, float], ...] = ()  # the likeliest tokens that were not drawn, and their probabilities;
    # behind a greedy token or one drawn with noise, their shares among themselves and the token

    def with_others(self, most: int) -> Draft:
        """Return the same with so many other tokens at most."""
        return self if len(self.others) <= most else replace(self, others=self.others[:most])


def drafts_of(parts: Sequence[np.ndarray], have_noise: np.ndarray) -> list[Draft | None]:
    """Return the drafts that cpu_kernels.draft_rows found; None for rows that are no distributions.

    Those that were drawn with noise, as `have_noise` `[N]` says, are without their supports.
    """
    all_ids, all_weights, sizes, indices, are_finite, others, other_probs = parts
    if not len(all_ids):
        return [None] * len(sizes)
    ends = sizes.cumsum()
    starts = ends - sizes
    sums = np.append(0, all_weights.cumsum())
    drawn = np.minimum(starts + indices, len(all_ids) - 1)  # a row that is not finite has no support
    token_probs = all_weights[drawn] / np.maximum(1, sums[ends] - sums[starts])
    columns = (starts, ends, are_finite, all_ids[drawn], token_probs, others, other_probs, have_noise)
    drafts: list[Draft | None] = []
    for first, end, is_finite, token_id, prob, its_others, its_probs, has_noise in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        if not is_finite:
            drafts.append(None)
            continue
        possible = [other for other in zip(its_others, its_probs, strict=True) if other[1]]
        support, weights = (NO_SUPPORT, NO_SUPPORT) if has_noise else (all_ids[first:end], all_weights[first:end])
        drafts.append(Draft(token_id, support, weights, prob, tuple(possible)))
    return drafts


@dataclass(frozen=True)
class TargetRows:
    """The target's distribution on each proposal's support, rounded down, and one draw from what that leaves of it."""

    support_probs: list[np.ndarray]  # N of [S] float64, multiples of scales.PROB_UNIT
    outside_masses: list[float]  # [N]
    outside_token_ids: list[int]  # [N]
    outside_token_probs: list[float]  # [N], each the token's whole probability, whatever of it is reported
    logprobs: list[Logprobs] | None = None  # [N], where they are asked for

    def part(self, start: int, end: int) -> TargetRows:
        """Return some of the rows."""
        where = slice(start, end)
        return TargetRows(
            self.support_probs[where],
            self.outside_masses[where],
            self.outside_token_ids[where],
            self.outside_token_probs[where],
            self.logprobs and self.logprobs[where],
        )


Reading = Callable[[], tuple[TargetRows, list[bool]]]  # waits for rows, and says which of them are distributions
