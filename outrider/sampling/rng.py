"""Addressed random numbers: each is a function of (seed, position, purpose), or of (seed, position, token id).

Nothing is streamed, so a token depends on the seed, its prefix and the models only, and not on how many numbers were
drawn before it. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), keyed by the seed; the counter is (position, branch, purpose, 0). The branch is 0 but for a draft whose proposals
are judged together: what it drafts again, it draws anew. The noise that draft and target share has one number for every
token id; its counter is (position, token id / 2, purpose, 0), and each counter serves two ids.

Shapes: N addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_LOW = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a uniform decides. Two purposes at one position are independent."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    OUTSIDE = 3
    NOISE = 4
    TEXT = 5


def philox_words(counter: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """Return the four words, each below 2^32, of a counter of four words under a key of two.

    Words are integers, or arrays of them that broadcast: numpy uint64 or torch int64, whose products wrap alike.
    """
    words, keys = list(counter), list(key)
    for _ in range(_NUM_ROUNDS):
        products = (words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1])
        words = [
            ((products[1] >> 32) & _LOW) ^ words[1] ^ keys[0],  # the mask is for signs
            products[1] & _LOW,
            ((products[0] >> 32) & _LOW) ^ words[3] ^ keys[1],
            products[0] & _LOW,
        ]
        keys = [(word + increment) & _LOW for word, increment in zip(keys, KEY_INCREMENTS, strict=True)]
    return words


def philox4x32(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return words `[N, 4] uint64`, each below 2^32, for `counters` `[N, 4]` and one key of two 32-bit words."""
    counters = np.asarray(counters, dtype=np.uint64)
    return np.stack(philox_words([counters[:, column] for column in range(4)], key), axis=1)


def key_of(seed: int) -> tuple[int, int]:
    """Return the two words of a 64-bit seed, the lower one first."""
    return seed & _LOW, seed >> 32


def seed_of_text(seed: int, index: int) -> int:
    """Return the 64-bit seed of another text of the same prompt: two words of the counter (index, 0, TEXT, 0)."""
    words = philox_words((index, 0, int(Purpose.TEXT), 0), key_of(seed))
    return words[0] + (words[1] << 32)


def uniforms(seed: int, positions: np.ndarray, purpose: Purpose, branch: int = 0) -> np.ndarray:
    """Return one uniform in [0, 1) with 53 random bits for each position: `[N] float64` for `[N]` integers.

    Args:
        seed: 64 bits, the request's.
        positions: absolute positions of the tokens that the uniforms decide.
        purpose: what they decide.
        branch: 32 bits; other branches give independent uniforms.
    """
    counters = np.zeros((len(positions), 4), dtype=np.uint64)
    counters[:, 0] = positions
    counters[:, 1] = branch
    counters[:, 2] = int(purpose)
    words = philox4x32(counters, key_of(seed))
    return ((words[:, 0] >> np.uint64(5)) * 67108864.0 + (words[:, 1] >> np.uint64(6))) / 9007199254740992.0


class AddressedUniforms:
    """The uniforms of one seed, purpose and branch, computed in blocks, since one costs as much as a hundred."""

    _BLOCK = 128

    def __init__(self, seed: int, purpose: Purpose, branch: int = 0):
        self._seed, self._purpose, self._branch = seed, purpose, branch
        self._block = -1
        self._values: list[float] = []

    def at(self, position: int) -> float:
        """Return the uniform at an absolute position."""
        block, offset = divmod(position, self._BLOCK)
        if block != self._block:
            positions = np.arange(block * self._BLOCK, (block + 1) * self._BLOCK)
            self._values = uniforms(self._seed, positions, self._purpose, self._branch).tolist()
            self._block = block
        return self._values[offset]


@dataclass(frozen=True)
class Noise:
    """The address of the noise at one position: a number for every token id, one and the same for all who know it."""

    seed: int
    position: int


class SharedNoise:
    """The noise of one seed."""

    def __init__(self, seed: int):
        self._seed = seed

    def at(self, position: int) -> Noise:
        """Return the noise at an absolute position."""
        return Noise(self._seed, position)


def noise_bits(key: Sequence[Any], position: Any, pairs: Any) -> list[Any]:
    """Return 52 random bits for each even token id `2 * pairs` and for each odd one, `2 * pairs + 1`.

    Words of the key, positions and pairs are arrays that broadcast, as for `philox_words`.
    """
    zero = 0 * position
    words = philox_words((position, pairs, zero + int(Purpose.NOISE), zero), key)
    return [((high >> 6) << 26) + (low >> 6) for high, low in (words[:2], words[2:])]
