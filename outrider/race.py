"""Draws with noise that draft and target share: alike laws mostly draw the same token. Pure functions.

Token x arrives at the time E(x) / p(x), and the first to arrive is drawn. E(x) = −log u(x) is exponential, so that
−log E(x) is Gumbel noise g(x), and the winner is argmax(log p(x) + g(x)): a draw from p. Where the draft uses the same
noise with q, both choose one token with a probability of at least (1 − d) / (1 + d), d being the total variation of p
and q (Daliri et al. 2024, arXiv 2408.07978).

Shapes: N rows, V vocabulary size, S some token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from outrider.rng import Noise, key_of, noise_bits

MAX_ELEMENTS = 1 << 22  # numbers of noise made at once on an accelerator


def rates_among(token_ids: np.ndarray, weights: np.ndarray, noise: Noise) -> np.ndarray:
    """Return `weights` `[S]` over the arrival times of E of `token_ids` `[S]`: the highest is that of the winner."""
    times = _times_on_host(noise, token_ids.astype(np.uint64) >> np.uint64(1))
    return weights / times[np.arange(len(token_ids)), token_ids & 1]


def race(weights: torch.Tensor, noises: Sequence[Noise]) -> torch.Tensor:
    """Return the winners `[N] int64` of the rows of `weights` `[N, V]`, on their device."""
    num_rows = max(1, MAX_ELEMENTS // weights.shape[-1])
    starts = range(0, len(noises), num_rows)
    parts = [race_on_device(weights[start : start + num_rows], noises[start : start + num_rows]) for start in starts]
    return torch.cat(parts)


def race_on_device(weights: torch.Tensor, noises: Sequence[Noise]) -> torch.Tensor:
    """Return the winners `[N] int64` of `weights` `[N, V]`, all rows at once and where the weights lie."""
    num_rows, vocab_size = weights.shape
    addresses = torch.tensor([[*key_of(noise.seed), noise.position] for noise in noises], device=weights.device)
    low, high, position = addresses.split(1, dim=-1)  # [N, 1] each
    pairs = torch.arange((vocab_size + 1) // 2, device=weights.device)
    bits = torch.stack(noise_bits((low, high), position, pairs), -1)
    times = _uniform(bits.double()).log_().neg_()
    return (weights / times.reshape(num_rows, -1)[:, :vocab_size]).argmax(-1)


def _times_on_host(noise: Noise, pairs: np.ndarray) -> np.ndarray:
    """Return E `[S, 2]` of the token ids 2 · pairs and 2 · pairs + 1."""
    position = np.array([noise.position], dtype=np.uint64)
    bits = np.stack(noise_bits(key_of(noise.seed), position, pairs), -1)
    return -np.log(_uniform(bits))


def _uniform(bits: Any) -> Any:
    """Return an odd multiple of 2^-53 for each 52 bits: never 0 and never 1, so that E is positive and finite."""
    return (bits + 0.5) * 2.0**-52
