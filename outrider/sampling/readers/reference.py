"""The reference reader: a few operations of torch, with fixed shapes, wherever the rows are.

Drafts are drawn without waiting for the device, so that it can be recorded in a graph, and what is found comes to the
host in one copy. A row of logits becomes probabilities on the way, by its temperature, where 0 is the likeliest token
alone.

Shapes: N rows, V vocabulary size, S tokens of a support at most, I ids of all supports, M other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from outrider.protocol.scales import WEIGHT_UNIT, round_down
from outrider.sampling.distribution import COLDEST
from outrider.sampling.race import arrival_times, race
from outrider.sampling.readers.tables import RowOptions, TableReader


@dataclass(frozen=True)
class DraftRows:
    """What cpu_kernels.draft_rows returns, with supports of one size, padded by weights of 0."""

    ids: torch.Tensor  # [N, S] int64, ascending
    weights: torch.Tensor  # [N, S] int64
    indices: torch.Tensor  # [N, 1] int64, of the token in `ids`
    are_finite: torch.Tensor  # [N, 1] bool
    others: torch.Tensor  # [N, M] int64
    other_probs: torch.Tensor  # [N, M] float64

    @property
    def table(self) -> torch.Tensor:
        """All of it in one, `[N, table_width] float64`."""
        parts = (self.ids, self.weights, self.indices, self.are_finite, self.others, self.other_probs)
        return torch.cat([part.double() for part in parts], -1)

    @property
    def token_ids(self) -> torch.Tensor:
        """The tokens drawn, `[N] int64`; 0 where the row is not finite."""
        return torch.where(self.are_finite, self.ids.gather(1, self.indices), 0)[:, 0]


def draft_table(*arguments, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the table of draft_rows, and the tokens drawn `[N] int64`."""
    found = draft_rows(*arguments, **settings)
    return found.table, found.token_ids


def draft_rows(
    rows: torch.Tensor,
    vocab_sizes: torch.Tensor,
    options: RowOptions,
    max_supports: torch.Tensor,
    min_prob: float,
    most: int,
    num_others: int,
) -> DraftRows:
    """Truncate each of `rows` `[N, V]` to its support, round that to whole weights, and draw a token.

    Args:
        vocab_sizes: `[N]`; what a row holds from there on does not count.
        max_supports: `[N]`; a support has no more tokens, and no more than `most`.
        min_prob: a support has every token of at least this probability, or as the likeliest.
    """
    scores = rows.masked_fill(torch.arange(rows.shape[1], device=rows.device) >= vocab_sizes[:, None], -torch.inf)
    top, ids = scores.topk(min(max(most, num_others + 1), rows.shape[1]), dim=-1)  # [N, S], the likeliest first
    first = scores.argmax(-1, keepdim=True)  # the lowest id of equals; topk takes them in any order
    ids = torch.cat([first, torch.where(ids == first, ids[:, :1], ids)[:, 1:]], -1)
    are_finite = top[:, :1].isfinite()
    probs = _probs(top, scores, options)
    ranks = torch.arange(top.shape[1], device=rows.device)
    limits = max_supports[:, None].clamp(max=most)
    is_kept = (probs >= probs[:, :1].clamp(max=min_prob)) & (ranks < limits) & (probs > 0)
    is_kept |= ranks == 0
    support, order = torch.where(is_kept, ids, rows.shape[1]).sort(dim=-1)
    kept_probs = torch.where(is_kept, probs, 0.0).gather(1, order)
    weights = torch.where(kept_probs > 0, (kept_probs / WEIGHT_UNIT).round().long().clamp(min=1), 0)
    by_uniform = _index_by(weights, options.uniforms)
    rates = kept_probs / arrival_times(options.noises.long(), support)
    indices = torch.where(options.have_noise, rates.argmax(-1, keepdim=True), by_uniform)
    others, other_probs = _others(top, ids, probs, order.gather(1, indices), options.are_greedy, num_others)
    next_indices, next_shares = _next_in_race(rates, num_others)
    others = torch.where(options.have_noise, support.gather(1, next_indices), others)
    other_probs = torch.where(options.have_noise, next_shares, other_probs)
    support = torch.where(weights > 0, support, 0)
    return DraftRows(support, weights, indices, are_finite, others, other_probs)


def _probs(top: torch.Tensor, scores: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Return the probabilities `[N, S]` float64 of the `top` scores `[N, S]` of rows `[N, V]`."""
    temperatures = options.temperatures.clamp(min=COLDEST)[:, None]
    largest = top[:, :1].double()
    sums = ((scores.double() - largest) / temperatures).exp_().sum(-1, keepdim=True)
    probs = ((top.double() - largest) / temperatures).exp_() / sums
    is_first = torch.arange(top.shape[1], device=top.device) == 0
    return torch.where(options.are_greedy, is_first.double(), probs)


def _index_by(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return an index `[N, 1]` for each row of whole `weights` `[N, S]`, drawn by its uniform."""
    cumulative = weights.cumsum(-1)
    points = uniforms[:, None] * cumulative[:, -1:]
    return (cumulative <= points).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)


def _others(
    top: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, drawn_rank: torch.Tensor, are_greedy, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens but the one drawn, `[N, M]`, and their probabilities, as Draft.others has them."""
    ranks = torch.arange(number, device=top.device).clamp(max=top.shape[1] - 1)
    ranks = ranks + (ranks >= drawn_rank)
    is_there = ranks < top.shape[1]
    ranks = ranks.clamp(max=top.shape[1] - 1)
    parts = torch.where(is_there, (top.gather(1, ranks).double() - top.gather(1, drawn_rank).double()).exp(), 0.0)
    shares = parts / (1 + parts.sum(-1, keepdim=True))
    return ids.gather(1, ranks), torch.where(is_there, torch.where(are_greedy, shares, probs.gather(1, ranks)), 0.0)


def _next_in_race(rates: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of those that arrive after the first, `[N, M]`, and their shares of the rates of all."""
    found, indices = rates.topk(min(number + 1, rates.shape[1]), dim=-1)
    shares = found / found.sum(-1, keepdim=True)
    padding = (0, number + 1 - found.shape[1])
    return F.pad(indices[:, 1:], padding), F.pad(shares[:, 1:], padding)


def target_table(rows: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Read `rows` `[N, V]` on supports, and draw a token from what rounding down and the other ids leave of each.

    Args:
        ids: `[I]`, the supports' ids one after the other.
        ends: `[N]`, where each support ends among them.

    Returns:
        `[4 N + I] float64`: for each row the mass left over, then for each the token drawn from it, then whether each
        is finite, then each token's whole probability; and the rounded probabilities like `ids`.
    """
    owners = torch.searchsorted(ends, torch.arange(len(ids), dtype=ends.dtype, device=ids.device), right=True)
    cells = ids.long() + owners * rows.shape[1]
    likeliest, indices = rows.max(-1, keepdim=True)
    left = ((rows.double() - likeliest.double()) / options.temperatures.clamp(min=COLDEST)[:, None]).exp_()
    left /= left.sum(-1, keepdim=True)
    left = torch.where(options.are_greedy, torch.zeros_like(left).scatter_(1, indices, 1.0), left)
    on_support = left.take(cells)
    reported = round_down(on_support)
    left.view(-1)[cells] = on_support - reported
    masses, token_ids = left.sum(-1), _draw(left, options)
    left.view(-1)[cells] = on_support
    token_probs = left.gather(1, token_ids[:, None])[:, 0]
    return torch.cat([masses, token_ids.double(), likeliest[:, 0].isfinite().double(), token_probs, reported])


def _draw(weights: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Return a token for each row of `weights` `[N, V]`, drawn with its noise, or else its uniform: `[N] int64`."""
    token_ids = inverse_cdf(weights, options.uniforms)
    with_noise = options.have_noise[:, 0].nonzero()[:, 0]
    if len(with_noise):
        token_ids[with_noise] = race(weights[with_noise], options.noises[with_noise].long())
    return token_ids


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return one index a row `[N] int64`, drawn in proportion to `weights` `[N, S]`; 0 where all weights are 0."""
    cumulative = weights.double().cumsum(-1)
    points = uniforms.to(cumulative) * cumulative[:, -1]
    indices = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]
    return torch.where(cumulative[:, -1] > 0, indices.clamp(max=weights.shape[-1] - 1), 0)


READER = TableReader(draft_table, target_table)
