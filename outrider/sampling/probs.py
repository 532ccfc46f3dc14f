"""From logits to probabilities, to supports, to tokens. Pure functions on torch tensors; all randomness is an argument.

Shapes: N rows, V vocabulary size, S largest support in the batch. Rows keep float64 when the logits have it and are
float32 otherwise; sums that decide a draw are always float64.

A draw takes its randomness in one of two forms: a uniform, which goes through the inverse CDF, or the noise of its
position, which draft and target share (`outrider.sampling.race`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from outrider.sampling.readers import device_rows
from outrider.sampling.readers.device_rows import RowOptions
from outrider.sampling.readers.host_rows import GIVEN, draft_rows, noise_addresses, target_rows
from outrider.sampling.rng import Noise
from outrider.sampling.transfers import begin_to_host, lies_on_host, on_device, wait_for
from outrider.sampling.warping import Warping

MIN_SUPPORT_PROB = 2e-4
# Usual sizes of what is told of a draft. Kernels are compiled for each size, so that less is read as these are.
MOST_SUPPORT = 1024  # tokens of a support
MOST_OTHERS = 2  # tokens beside the one that was drawn


def probability_rows(logits: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    """Return the distribution `[N, V]` that each row of `logits` `[N, V]` stands for; Warping has the definitions.

    Everything that decides is computed in float64: over a temperature of 0.001, neighbours among float32 logits of 1e4
    are e apart, and float32 would take them for equal. What is returned is right to float32's last place.
    """
    probs = torch.empty_like(logits, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    kinds = [_one_hot if it.is_greedy else _filtered if it.has_filters else _softmax for it in warpings]
    for kind in dict.fromkeys(kinds):
        rows = [row for row, its_kind in enumerate(kinds) if its_kind is kind]
        probs[rows] = kind(logits[rows], [warpings[row] for row in rows]).to(probs.dtype)
    return probs


def _one_hot(logits: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _softmax(logits: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    return _scores(logits, logits.amax(-1, keepdim=True), warpings).softmax(-1)


def _column(logits: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Return a number for each row, `[N, 1] float64`, where the logits lie."""
    return torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]


def _scores(logits: torch.Tensor, likeliest: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    """Return Warping's scores `[N, V] float64` of `logits` `[N, V]`, the greatest of which are `likeliest` `[N, 1]`."""
    temperatures = _column(logits, [warping.temperature for warping in warpings])
    return (logits.double() - likeliest.double()).div_(temperatures)


def _filtered(logits: torch.Tensor, warpings: Sequence[Warping]) -> torch.Tensor:
    """Return the distributions `[N, V] float64` of `logits` `[N, V]` behind the filters."""
    vocab_size = logits.shape[-1]
    top_k = _column(logits, [min(warping.top_k or vocab_size, vocab_size) for warping in warpings]).long()
    top_p = _column(logits, [warping.top_p for warping in warpings])
    least_score = _column(logits, [math.log(warping.min_p) if warping.min_p else -math.inf for warping in warpings])
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    scores = _scores(ranked, ranked[:, :1], warpings)
    weights = scores.exp()
    cumulative = weights.cumsum(-1)
    kept = torch.arange(vocab_size, device=logits.device) < top_k
    is_short = (cumulative < top_p * cumulative.gather(-1, top_k - 1)) | (top_p == 1)
    kept[:, 1:] &= is_short[:, :-1] & (scores >= least_score)[:, 1:]
    weights.masked_fill_(~kept, 0.0)
    return torch.empty_like(weights).scatter_(-1, order, weights.div_(weights.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class Draft:
    """A drafted token, with the support it was drawn from; without it when it was drawn with noise."""

    token_id: int
    support_ids: np.ndarray  # [num_support] int64, ascending
    weights: np.ndarray  # [num_support] int64, whole; outrider.protocol.scales
    token_prob: float  # its share of the support's weights
    others: tuple[tuple[int, float], ...] = ()  # the likeliest tokens that were not drawn, and their probabilities;
    # behind a greedy token or one drawn with noise, their shares among themselves and the token

    def with_others(self, most: int) -> Draft:
        """Return the same with so many other tokens at most."""
        return self if len(self.others) <= most else replace(self, others=self.others[:most])


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
    given = np.full(len(probs), GIVEN)
    if lies_on_host(probs):
        drafts = _drafts_on_host(probs.numpy(), given, max_supports, numbers, num_others)
    else:
        drafts = _drafts_on_device(probs, given, max_supports, numbers, num_others)
    return [draft for draft in drafts if draft]


def _drafts_on_device(
    rows: torch.Tensor,
    temperatures: np.ndarray,
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int,
) -> list[Draft | None]:
    """Return a draft for each of `rows` `[N, V]`, as device_rows reads them; None where the row is no law."""
    vocab_sizes, limits = np.full(len(rows), rows.shape[1]), np.array(max_supports)
    uniforms, noises = _uniforms_and_noises(numbers)
    sizes, most, *options = on_device(rows.device, vocab_sizes, limits, temperatures, uniforms, noises)
    room, read = max(MOST_SUPPORT, int(limits.max())), reader_of(rows).draft_table
    others = num_others or MOST_OTHERS
    table, _ = read(rows, sizes, RowOptions(*options), most, MIN_SUPPORT_PROB, room, others)
    drafts = drafts_in(table.cpu().numpy(), others, noises[:, 0])
    return [draft and draft.with_others(num_others) for draft in drafts]


def drafts_in(table: np.ndarray, num_others: int, are_coupled: np.ndarray) -> list[Draft | None]:
    """Return the drafts of a table by device_rows.DraftRows `[N, numbers]`; None for rows that are no law."""
    most = (table.shape[1] - device_rows.table_width(0, num_others)) // 2
    borders = np.cumsum([most, most, 1, 1, num_others])
    ids, weights, places, finite, others, other_probs = np.split(table, borders, axis=1)
    ids, weights, places, others = (part.astype(np.int64) for part in (ids, weights, places, others))
    are_finite = finite.astype(bool)
    is_kept = (weights > 0) & are_finite
    flat = (ids[is_kept], weights[is_kept], is_kept.sum(-1), places[:, 0], are_finite[:, 0], others, other_probs)
    return drafts_of(flat, are_coupled)


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


def draft_tokens(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int = 0,
) -> list[Draft | None]:
    """Draw a token for each row of `logits` `[N, V]` under its warping, as draw_drafts does; None for no law.

    Rows are read by what each needs, whatever is beside them.
    """
    parts = _alike([(it.has_filters, most > MOST_SUPPORT) for it, most in zip(warpings, max_supports, strict=True)])
    columns = (warpings, max_supports, numbers)
    drafts: dict[int, Draft | None] = {}
    for indices in parts:
        rows, (its_warpings, its_limits, its_numbers) = _rows_at(logits, indices), _chosen(indices, *columns)
        its_drafts = _draft_alike(rows, its_warpings, its_limits, its_numbers, num_others)
        drafts |= zip(indices, its_drafts, strict=True)
    return [drafts[index] for index in range(len(warpings))]


def _draft_alike(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    max_supports: Sequence[int],
    numbers: Sequence[float | Noise],
    num_others: int,
) -> list[Draft | None]:
    """Do draft_tokens for rows that all need filters, or all none."""
    if _is_compiled(logits, warpings):
        return _drafts_on_host(logits.numpy(), _temperatures(warpings), max_supports, numbers, num_others)
    if _are_plain(warpings):
        return _drafts_on_device(logits, _temperatures(warpings), max_supports, numbers, num_others)
    finite = are_rows_finite(logits)
    drafts = draw_drafts(probability_rows(_with_zeros(logits, finite), warpings), max_supports, numbers, num_others)
    return [draft if is_finite else None for draft, is_finite in zip(drafts, finite, strict=True)]


def _alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of rows in groups of one kind each."""
    groups: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _rows_at(logits: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Return some rows of `logits` `[N, V]`, in the order that they have."""
    return logits if len(indices) == len(logits) else logits[torch.tensor(indices, device=logits.device)]


def _chosen(indices: list[int], *columns: Sequence[Any]) -> list[Sequence[Any]]:
    """Return what each of `columns` has for some rows."""
    return [column if len(indices) == len(column) else [column[index] for index in indices] for column in columns]


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


def _temperatures(warpings: Sequence[Warping]) -> np.ndarray:
    return np.array([warping.temperature for warping in warpings], dtype=np.float64)


def _with_zeros(logits: torch.Tensor, finite: list[bool]) -> torch.Tensor:
    """Return the rows, zeros in the place of those that are no law."""
    return logits if all(finite) else logits.where(torch.tensor(finite, device=logits.device)[:, None], 0.0)


def are_rows_finite(logits: torch.Tensor) -> list[bool]:
    """Return for each row of `logits` `[N, V]` whether it is a law: no NaN, no +infinity, and not all −infinity."""
    return logits.amax(-1).isfinite().tolist()


@dataclass(frozen=True)
class TargetRows:
    """The target's distribution on each proposal's support, rounded down, and one draw from what that leaves of it."""

    support_probs: list[np.ndarray]  # N of [num_support] float64, multiples of scales.PROB_UNIT
    outside_masses: list[float]  # [N]
    outside_token_ids: list[int]  # [N]
    outside_token_probs: list[float]  # [N], each the token's whole probability, whatever of it has been told

    def part(self, start: int, end: int) -> TargetRows:
        """Return some of the rows."""
        where = slice(start, end)
        return TargetRows(
            self.support_probs[where],
            self.outside_masses[where],
            self.outside_token_ids[where],
            self.outside_token_probs[where],
        )


Reading = Callable[[], tuple[TargetRows, list[bool]]]  # of rows: waits for them, and tells which of them are laws


def read_target_rows(
    probs: torch.Tensor, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> TargetRows:
    """Read `probs` `[N, V]` on `supports` (N of `[num_support] int64`) and draw a token from what is left.

    Each row has a uniform, or the noise of its position; with noise and an empty support, y is the target's own choice.
    Left are the other ids and what rounding takes from those of the support, so that nothing of the law is lost. The
    mass outside is summed, not subtracted from 1, so that a small one keeps its precision.
    """
    given = np.full(len(probs), GIVEN)
    if lies_on_host(probs):
        return _rows_on_host(probs.numpy(), given, supports, numbers)[0]
    return _rows_on_device(probs, given, supports, numbers)()[0]


def _rows_on_host(
    rows: np.ndarray, temperatures: np.ndarray, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> tuple[TargetRows, list[bool]]:
    """Return what `rows` `[N, V]` are on their supports, as host_rows reads them, and which of them are laws."""
    sizes = np.array([len(support) for support in supports])
    parts = target_rows(rows, temperatures, np.concatenate(supports), sizes, *_uniforms_and_noises(numbers))
    told, masses, token_ids, finite, token_probs = parts
    ends = sizes.cumsum().tolist()
    told_by_row = [told[end - len(support) : end] for end, support in zip(ends, supports, strict=True)]
    read = TargetRows(told_by_row, masses.tolist(), token_ids.tolist(), token_probs.tolist())
    return read, finite.tolist()


def _rows_on_device(
    rows: torch.Tensor, temperatures: np.ndarray, supports: Sequence[np.ndarray], numbers: Sequence[float | Noise]
) -> Reading:
    """Have the device read `rows` `[N, V]` on their supports, as device_rows does, and return how to get the result."""
    ends = np.array([len(support) for support in supports]).cumsum()
    inputs = (np.concatenate(supports), ends, temperatures, *_uniforms_and_noises(numbers))
    ids, its_ends, *options = on_device(rows.device, *inputs)
    table = begin_to_host(reader_of(rows).target_table(rows, ids, its_ends, RowOptions(*options)))

    def result() -> tuple[TargetRows, list[bool]]:
        wait_for(rows.device)
        masses, token_ids, are_finite, probs, told = np.split(table.numpy(), np.arange(1, 5) * len(rows))
        told_by_row = np.split(told, ends[:-1])
        read = TargetRows(told_by_row, masses.tolist(), token_ids.astype(np.int64).tolist(), probs.tolist())
        return read, are_finite.astype(bool).tolist()

    return result


def reader_of(rows: torch.Tensor) -> Any:
    """Return the module that reads rows where they lie: gpu_rows where it can, or else device_rows."""
    if rows.device.type != "cuda" or rows.dtype == torch.float64:
        return device_rows
    gpu_rows = _gpu_rows()
    return gpu_rows if gpu_rows and gpu_rows.can_run(rows.device) else device_rows


@lru_cache
def _gpu_rows() -> Any:
    """Return the module; None where there is no Triton."""
    try:
        from outrider.sampling.readers import gpu_rows
    except ImportError:
        return None
    return gpu_rows


def begin_reading(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> Reading:
    """Begin to read `logits` `[N, V]`, which an accelerator may not have computed yet, and return how to go on.

    An accelerator reads them behind the pass that it is in, and nobody has to tell it when that is over. Where filters
    apply, and on a CPU, all is done when the result is asked for. Rows are read by what each needs, whatever is beside
    them.
    """
    parts = _alike([warping.has_filters for warping in warpings])
    readings = []
    for indices in parts:
        chosen = _chosen(indices, warpings, supports, numbers)
        readings.append(_begin_alike(_rows_at(logits, indices), *chosen))
    return readings[0] if len(readings) == 1 else lambda: _put_together(parts, [its() for its in readings])


def _put_together(
    parts: Sequence[Sequence[int]], results: Sequence[tuple[TargetRows, list[bool]]]
) -> tuple[TargetRows, list[bool]]:
    """Return the rows that were read in parts, in their order."""
    num_rows = sum(map(len, parts))
    columns: dict[str, list[Any]] = {field.name: [None] * num_rows for field in fields(TargetRows)}
    are_finite = [False] * num_rows
    for indices, (rows, finite) in zip(parts, results, strict=True):
        for name, column in columns.items():
            _place_at(indices, getattr(rows, name), column)
        _place_at(indices, finite, are_finite)
    return TargetRows(**columns), are_finite


def _place_at(indices: Sequence[int], values: Sequence[Any], column: list[Any]) -> None:
    for index, value in zip(indices, values, strict=True):
        column[index] = value


def _begin_alike(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> Reading:
    """Do begin_reading for rows that all need filters, or all none."""
    if _are_plain(warpings) and not lies_on_host(logits):
        return _rows_on_device(logits, _temperatures(warpings), supports, numbers)
    return lambda: _read_alike(logits, warpings, supports, numbers)


def read_logits(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> tuple[TargetRows, list[bool]]:
    """Read `logits` `[N, V]` under their warpings as read_target_rows reads laws; tell also which rows are laws."""
    return begin_reading(logits, warpings, supports, numbers)()


def _read_alike(
    logits: torch.Tensor,
    warpings: Sequence[Warping],
    supports: Sequence[np.ndarray],
    numbers: Sequence[float | Noise],
) -> tuple[TargetRows, list[bool]]:
    if _is_compiled(logits, warpings):
        return _rows_on_host(logits.numpy(), _temperatures(warpings), supports, numbers)
    if _are_plain(warpings):
        return _rows_on_device(logits, _temperatures(warpings), supports, numbers)()
    finite = are_rows_finite(logits)
    return read_target_rows(probability_rows(_with_zeros(logits, finite), warpings), supports, numbers), finite
