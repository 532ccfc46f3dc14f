"""Draws with noise that draft and target share: similar distributions mostly draw the same token. Pure functions.

Token x arrives at the time E(x) / p(x), and the first to arrive is drawn. E(x) = −log u(x) is exponential, so that
−log E(x) is Gumbel noise g(x), and the winner is argmax(log p(x) + g(x)): a draw from p. Where the draft uses the same
noise with q, both choose one token with a probability of at least (1 − d) / (1 + d), d being the total variation of p
and q (Daliri et al. 2024, arXiv 2408.07978).

Shapes: N rows, V vocabulary size, S some token ids.
"""

from __future__ import annotations

import torch

from outrider.sampling.rng import noise_bits

MAX_ELEMENTS = 1 << 22  # numbers of noise made at once on an accelerator


def arrival_times(addresses: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return E `[N, S]` float64 of `token_ids` `[N, S]`, under the noise of `addresses` `[N, 4]` int64.

    See draws.noise_addresses.
    """
    _, low, high, position = addresses.split(1, dim=-1)  # [N, 1] each
    even, odd = noise_bits((low, high), position, token_ids >> 1)
    return _times(torch.where(token_ids & 1 == 0, even, odd))


def race(weights: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
    """Return the winners `[N] int64` of the rows of `weights` `[N, V]`, on their device, under `addresses` `[N, 4]`."""
    num_rows = max(1, MAX_ELEMENTS // weights.shape[-1])
    parts = zip(weights.split(num_rows), addresses.split(num_rows), strict=True)
    return torch.cat([race_at_once(*part) for part in parts])


def race_at_once(weights: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
    """Return what race does, all rows at once."""
    num_rows, vocab_size = weights.shape
    _, low, high, position = addresses.split(1, dim=-1)  # [N, 1] each
    pairs = torch.arange((vocab_size + 1) // 2, device=weights.device)
    times = _times(torch.stack(noise_bits((low, high), position, pairs), -1))
    return (weights / times.reshape(num_rows, -1)[:, :vocab_size]).argmax(-1)


def _times(bits: torch.Tensor) -> torch.Tensor:
    """Return −log u, u being an odd multiple of 2^-53 for each 52 bits: never 0 and never 1, so that it is positive."""
    return ((bits.double() + 0.5) * 2.0**-52).log_().neg_()
