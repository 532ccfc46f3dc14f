"""Addressed uniforms: every random number is a function of (seed, position, purpose).

Nothing is streamed, so a token depends on the seed, its prefix and the models only, and not on how many numbers were
drawn before it. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), keyed by the seed; the counter is (position, branch, purpose, 0). The branch is 0 but for a draft whose proposals
are judged together: what it drafts again, it draws anew.

Shapes: N addresses.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Purpose(IntEnum):
    """What a uniform decides. Two purposes at one position are independent."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    OUTSIDE = 3


def philox4x32(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return words `[N, 4] uint64`, each below 2^32, for `counters` `[N, 4]` and one key of two 32-bit words."""
    words = [np.asarray(counters, dtype=np.uint64)[:, column] for column in range(4)]
    keys = list(key)
    for _ in range(_NUM_ROUNDS):
        products = (words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1])
        words = [
            (products[1] >> _SHIFT) ^ words[1] ^ np.uint64(keys[0]),
            products[1] & _LOW,
            (products[0] >> _SHIFT) ^ words[3] ^ np.uint64(keys[1]),
            products[0] & _LOW,
        ]
        keys = [(word + increment) & 0xFFFFFFFF for word, increment in zip(keys, _KEY_INCREMENTS, strict=True)]
    return np.stack(words, axis=1)


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
    words = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
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
