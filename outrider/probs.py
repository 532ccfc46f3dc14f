"""From logits to probabilities, to supports, to tokens. Pure functions on torch tensors; all randomness is an argument.

Shapes: N rows, V vocabulary size, S largest support in the batch. Rows keep float64 when the logits have it and are
float32 otherwise; sums that decide a draw are always float64.

A draw takes its randomness in one of two forms: a uniform, which goes through the inverse CDF, or the noise of its
position, which draft and target share (`outrider.race`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from outrider.host_rows import GIVEN, draft_rows, noise_addresses, target_rows
from outrider.race import race, rates_among
from outrider.rng import Noise
from outrider.scales import round_down, whole_weights
from outrider.warping import COLDEST, Warping

MIN_SUPPORT_PROB = 2e-4


def probability_rows(logits: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    """Return the distribution `[N, V]` that each row of `logits` `[N, V]` stands for under its warping.

    Temperature 0 gives a one-hot row. Filters follow transformers: top-k, then top-p of what is left, then min-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if all(warping.is_greedy for warping in warpings):
        return _one_hot(logits)
    scores = logits
    if any(warping.temperature != 1 for warping in warpings):
        scores = logits / logits.new_tensor([max(warping.temperature, COLDEST) for warping in warpings])[:, None]
    if any(warping.has_filters for warping in warpings):
        scores = scores.masked_fill(~_kept_by_filters(scores, warpings), -torch.inf)
    probs = scores.softmax(-1)
    if not any(warping.is_greedy for warping in warpings):
        return probs
    greedy = torch.tensor([warping.is_greedy for warping in warpings], device=logits.device)
    return torch.where(greedy[:, None], _one_hot(logits), probs)


def _one_hot(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _kept_by_filters(scores: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    """Return a mask `[N, V]` of the tokens that the filters leave."""
    vocab_size = scores.shape[-1]
    top_k = scores.new_tensor([warping.top_k or vocab_size for warping in warpings])
    top_p = scores.new_tensor([warping.top_p or 1.0 for warping in warpings])
    min_p = scores.new_tensor([warping.min_p for warping in warpings])
    descending, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(vocab_size, device=scores.device) < top_k[:, None]
    probs = descending.masked_fill(~kept, -torch.inf).softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    kept &= (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept &= probs >= min_p[:, None] * probs[:, :1]
    return torch.zeros_like(kept).scatter_(-1, order, kept)


@dataclass(frozen=True)
class Draft:
    """A drafted token, with the support it was drawn from; without it when it was drawn with noise."""

    token_id: int
    support_ids: np.ndarray  # [num_support] int64, ascending
    weights: np.ndarray  # [num_support] int64, whole; outrider.scales
    token_prob: float  # its share of the support's weights
    others: tuple[tuple[int, float], ...] = ()  # the likeliest tokens that were not drawn, and their probabilities;
    # behind a greedy token or one drawn with noise, their shares among themselves and the token


def draw_drafts(
    probs: torch.Tensor, max_supports: Sequence[int], numbers: Sequence[float | Noise], num_others: int = 0
) -> list[Draft]:
    """Truncate each row of `probs` `[N, V]` to its support and draw a token from what is left; return N drafts.

    The support is every token of at least `MIN_SUPPORT_PROB`, or as the likeliest, and of these the row's
    `max_supports` likeliest. Dropping by probability, not by mass, loses the least acceptance for the number of ids.
    The token is drawn from the whole weights that are returned, divided by their sum, so that the receiver knows
    the law to the letter. Each row has a uniform, or the noise of its position. Each draft tells `num_others` likeliest
    other tokens, if there are so many.
    """
    if lies_on_host(probs):
        drafts = _drafts_on_host(probs.numpy(), np.full(len(probs), GIVEN), max_supports, numbers, num_others)
        return [draft for draft in drafts if draft]
    supports = _supports_on_device(probs, max(max_supports))
    parts = zip(supports, max_supports, numbers, strict=True)
    return [
        _draw_draft(*_likeliest(*support, max_support), number, num_others) for support, max_support, number in parts
    ]


def _drafts_on_host(
    rows: np.ndarray,
    temperatures: np.ndarray,
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int,
) -> list[Draft | None]:
    """Return a draft for each of `rows` `[N, V]`, as host_rows reads them; None where the row is no law."""
    vocab_sizes, limits = np.full(len(rows), rows.shape[1]), np.array(max_supports)
    uniforms, noises = _uniforms_and_noises(numbers)
    parts = draft_rows(rows, vocab_sizes, temperatures, MIN_SUPPORT_PROB, limits, uniforms, noises, num_others)
    return drafts_of(parts, noises[:, 0])


def drafts_of(parts: Sequence[np.ndarray], are_coupled: np.ndarray) -> list[Draft | None]:
    """Return the drafts that host_rows.draft_rows tells by its parts; None for rows that are no law.

    Those drawn with noise, which `are_coupled` `[N]` tells, are without their supports.
    """
    all_ids, all_weights, *by_row = parts
    drafts: list[Draft | None] = []
    end = 0
    columns = (part.tolist() for part in (*by_row, are_coupled))
    for size, place, is_finite, others, probs, is_coupled in zip(*columns, strict=True):
        first, end = end, end + size
        if not is_finite:
            drafts.append(None)
            continue
        ids, weights = all_ids[first:end], all_weights[first:end]
        possible = tuple((other, prob) for other, prob in zip(others, probs, strict=True) if prob)
        token_prob = float(weights[place] / weights.sum())
        told = slice(0, 0) if is_coupled else slice(None)
        drafts.append(Draft(int(ids[place]), ids[told], weights[told], token_prob, possible))
    return drafts


def _supports_on_device(probs: torch.Tensor, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the same for at most `most` tokens a row; only they leave the device."""
    likeliest, ids = on_host(*probs.topk(min(most, probs.shape[-1]), dim=-1))
    sizes = (likeliest >= np.minimum(likeliest[:, :1], MIN_SUPPORT_PROB)).sum(-1)
    supports = []
    for row, size in enumerate(sizes):
        order = ids[row, :size].argsort()
        supports.append((ids[row, :size][order], likeliest[row, :size][order]))
    return supports


def _likeliest(ids: np.ndarray, probs: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `most` likeliest of the tokens, in the order they have."""
    if len(ids) <= most:
        return ids, probs
    kept = np.sort(np.argpartition(-probs, most - 1)[:most])
    return ids[kept], probs[kept]


def _draw_draft(ids: np.ndarray, probs: np.ndarray, number: float | Noise, num_others: int) -> Draft:
    if isinstance(number, Noise):
        rates = rates_among(ids, probs, number)
        index = int(rates.argmax())
        likeliest = np.argsort(-rates)[: num_others + 1]
        others = tuple((int(ids[it]), float(rates[it] / rates[likeliest].sum())) for it in likeliest[1:])
        return Draft(int(ids[index]), ids[:0], ids[:0], float(probs[index] / probs.sum()), others)
    weights = whole_weights(probs)
    cumulative = weights.cumsum()
    index = min(int(np.searchsorted(cumulative, number * cumulative[-1], side="right")), len(ids) - 1)
    order = np.argsort(-probs, kind="stable")
    others = tuple((int(ids[it]), float(probs[it])) for it in order[order != index][:num_others])
    return Draft(int(ids[index]), ids, weights, float(weights[index] / cumulative[-1]), others)


def draft_tokens(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int = 0,
) -> list[Draft | None]:
    """Draw a token for each row of `logits` `[N, V]` under its warping, as draw_drafts does; None for no law."""
    if _is_compiled(logits, warpings):
        return _drafts_on_host(logits.numpy(), _temperatures(warpings), max_supports, numbers, num_others)
    logits, finite = _only_finite(logits)
    if all(warping.is_greedy for warping in warpings) and not _have_noise(numbers):
        drafts = greedy_drafts(logits, num_others)
    else:
        drafts = draw_drafts(probability_rows(logits, warpings), max_supports, numbers, num_others)
    return [draft if is_finite else None for draft, is_finite in zip(drafts, finite, strict=True)]


@dataclass(frozen=True)
class PlainSampling:
    """How compiled code draws n tokens for each of N sequences one after the other: without filters."""

    vocab_sizes: np.ndarray  # [N] int64; no id from there on is drawn
    temperatures: np.ndarray  # [N] float64
    max_supports: np.ndarray  # [N] int64
    uniforms: np.ndarray  # [n, N] float64
    noises: np.ndarray  # [n, N, 4] uint64; host_rows.noise_addresses
    num_others: int  # as for draw_drafts

    @classmethod
    def of(
        cls,
        vocab_sizes: Sequence[int],
        warpings: Sequence[Warping],
        max_supports: Sequence[int],
        numbers: Sequence[Sequence[float | Noise]],
        num_others: int = 0,
    ) -> PlainSampling | None:
        """Return it for `numbers` `[n, N]`; None where it is not so plain."""
        if not _are_plain(warpings):
            return None
        uniforms, noises = _uniforms_and_noises(list(chain.from_iterable(numbers)))
        shape = (len(numbers), len(warpings))
        return cls(
            np.array(vocab_sizes),
            _temperatures(warpings),
            np.array(max_supports),
            uniforms.reshape(shape),
            noises.reshape(*shape, 4),
            num_others,
        )


def _uniforms_and_noises(numbers: Sequence[float | Noise]) -> tuple[np.ndarray, np.ndarray]:
    """Return `[N]` float64 with 0 in the place of noise, and its addresses `[N, 4]`, as host_rows reads them."""
    uniforms = np.array([0.0 if isinstance(number, Noise) else number for number in numbers])
    return uniforms, noise_addresses(numbers)


def _is_compiled(logits: torch.Tensor, warpings: Sequence[Warping]) -> bool:
    """Return whether compiled code reads the rows from their logits on."""
    return lies_on_host(logits) and logits.dtype == torch.float32 and _are_plain(warpings)


def _are_plain(warpings: Sequence[Warping]) -> bool:
    """Return whether rows are drawn from without filters."""
    return not any(warping.has_filters for warping in warpings)


def _have_noise(numbers: Sequence[float | Noise]) -> bool:
    return any(isinstance(number, Noise) for number in numbers)


def _temperatures(warpings: Sequence[Warping]) -> np.ndarray:
    return np.array([0.0 if warping.is_greedy else warping.temperature for warping in warpings])


def _only_finite(logits: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Return the rows with zeros for those that are no law, and which are."""
    finite = are_rows_finite(logits)
    if all(finite):
        return logits, finite
    return logits.where(torch.tensor(finite, device=logits.device)[:, None], 0.0), finite


def greedy_drafts(logits: torch.Tensor, num_others: int = 0) -> list[Draft]:
    """Return what draw_drafts draws when every row of `logits` `[N, V]` is greedy: the likeliest token alone."""
    drawn = logits.argmax(-1, keepdim=True)
    scores, ids = logits.scatter(-1, drawn, -torch.inf).topk(min(num_others, logits.shape[1] - 1), -1)
    shares = torch.cat([logits.gather(-1, drawn), scores], -1).softmax(-1)[:, 1:]
    alone, drafts = whole_weights(np.ones(1)), []
    for [token_id], its_ids, its_shares in zip(*(part.tolist() for part in on_host(drawn, ids, shares)), strict=True):
        others = tuple((other, share) for other, share in zip(its_ids, its_shares, strict=True) if share)
        drafts.append(Draft(token_id, np.array([token_id]), alone, 1.0, others))
    return drafts


def are_rows_finite(logits: torch.Tensor) -> list[bool]:
    """Return for each row of `logits` `[N, V]` whether it is a law: no NaN, no +infinity, and not all −infinity."""
    return logits.amax(-1).isfinite().tolist()


def inverse_cdf(weights: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Return one index a row `[N] int64`, drawn in proportion to `weights` `[N, S]`; 0 where all weights are 0."""
    cumulative = weights.double().cumsum(-1)
    points = cumulative.new_tensor(uniforms) * cumulative[:, -1]
    indices = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]
    return torch.where(cumulative[:, -1] > 0, indices.clamp(max=weights.shape[-1] - 1), 0)


@dataclass(frozen=True)
class TargetRows:
    """The target's distribution on each proposal's support, rounded down, and one draw from what that leaves of it."""

    support_probs: list[np.ndarray]  # N of [num_support] float64, multiples of scales.PROB_UNIT
    outside_masses: list[float]  # [N]
    outside_token_ids: list[int]  # [N]

    def part(self, start: int, end: int) -> TargetRows:
        """Return some of the rows."""
        where = slice(start, end)
        return TargetRows(self.support_probs[where], self.outside_masses[where], self.outside_token_ids[where])


def read_target_rows(
    probs: torch.Tensor, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> TargetRows:
    """Read `probs` `[N, V]` on `supports` (N of `[num_support] int64`) and draw a token from what is left.

    Each row has a uniform, or the noise of its position; with noise and an empty support, y is the target's own choice.
    Left are the other ids and what rounding takes from those of the support, so that nothing of the law is lost. The
    mass outside is summed, not subtracted from 1, so that a small one keeps its precision.
    """
    if lies_on_host(probs):
        return _rows_on_host(probs.numpy(), np.full(len(probs), GIVEN), supports, numbers)[0]
    sizes = [len(support) for support in supports]
    told, masses, token_ids = _read_with_torch(probs, np.concatenate(supports), sizes, numbers)
    return TargetRows(np.split(told, np.cumsum(sizes)[:-1]), masses.tolist(), token_ids.tolist())


def _rows_on_host(
    rows: np.ndarray, temperatures: np.ndarray, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> tuple[TargetRows, list[bool]]:
    """Return what `rows` `[N, V]` are on their supports, as host_rows reads them, and which of them are laws."""
    sizes = np.array([len(support) for support in supports])
    parts = target_rows(rows, temperatures, np.concatenate(supports), sizes, *_uniforms_and_noises(numbers))
    told, masses, token_ids, finite = parts
    ends = sizes.cumsum().tolist()
    told_by_row = [told[end - len(support) : end] for end, support in zip(ends, supports, strict=True)]
    return TargetRows(told_by_row, masses.tolist(), token_ids.tolist()), finite.tolist()


def _read_with_torch(
    probs: torch.Tensor, flat_ids: np.ndarray, sizes: list[int], numbers: Sequence[float | Noise]
) -> list[np.ndarray]:
    """Return what is told of each id, the masses left over and the tokens drawn from them, on any device."""
    flat_ids = flat_ids + np.repeat(np.arange(len(sizes)) * probs.shape[1], sizes)
    cells = torch.from_numpy(flat_ids).to(probs.device)
    outside = probs.to(torch.float64, copy=True)
    on_support = outside.take(cells)
    told = round_down(on_support)
    outside.view(-1)[cells] = on_support - told
    return on_host(told, outside.sum(-1), _draw_rows(outside, numbers))


def read_logits(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> tuple[TargetRows, list[bool]]:
    """Read `logits` `[N, V]` under their warpings as read_target_rows reads laws; tell also which rows are laws."""
    if _is_compiled(logits, warpings):
        return _rows_on_host(logits.numpy(), _temperatures(warpings), supports, numbers)
    logits, finite = _only_finite(logits)
    if all(warping.is_greedy for warping in warpings):
        return greedy_target_rows(logits, supports), finite
    return read_target_rows(probability_rows(logits, warpings), supports, numbers), finite


def greedy_target_rows(logits: torch.Tensor, supports: Sequence[np.ndarray]) -> TargetRows:
    """Return what read_target_rows reads when every row of `logits` `[N, V]` is greedy."""
    likeliest = logits.argmax(-1).tolist()
    on_support = [support == token_id for support, token_id in zip(supports, likeliest, strict=True)]
    are_outside = [not hits.any() for hits in on_support]
    return TargetRows(
        support_probs=[hits.astype(np.float64) for hits in on_support],
        outside_masses=[float(is_outside) for is_outside in are_outside],
        outside_token_ids=[token_id * outside for token_id, outside in zip(likeliest, are_outside, strict=True)],
    )


def _draw_rows(weights: torch.Tensor, numbers: Sequence[float | Noise]) -> torch.Tensor:
    """Return a token for each row of `weights` `[N, V]`, drawn with its uniform or its noise: `[N] int64`."""
    noises = {row: number for row, number in enumerate(numbers) if isinstance(number, Noise)}
    uniforms = {row: number for row, number in enumerate(numbers) if not isinstance(number, Noise)}
    if not noises:
        return inverse_cdf(weights, list(uniforms.values()))
    token_ids = torch.empty(len(numbers), dtype=torch.long, device=weights.device)
    token_ids[list(noises)] = race(weights[list(noises)], list(noises.values()))
    if uniforms:
        token_ids[list(uniforms)] = inverse_cdf(weights[list(uniforms)], list(uniforms.values()))
    return token_ids


def on_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Return tensors of one device as arrays; from an accelerator in one copy, since each waits for the device.

    They travel as float64, which holds float32 and token ids exactly.
    """
    if lies_on_host(tensors[0]):
        return [tensor.numpy() for tensor in tensors]
    joined = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype).numpy() for part, tensor in zip(parts, tensors, strict=True)]


def lies_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the CPU can read the tensor as it is."""
    return tensor.device.type == "cpu"
