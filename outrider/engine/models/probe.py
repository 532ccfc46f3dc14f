"""A short text that shows whether two runners compute the same.

Shapes: R rows, V vocabulary size.
"""

from __future__ import annotations

import torch

from outrider.engine.backends.attention import PackedBatch
from outrider.engine.backends.runner import DraftingRunner, Feed, ForwardPass, Runner
from outrider.engine.kv_cache import Cache, SequenceCache
from outrider.sampling.probs import Draft, PlainSampling, draft_tokens
from outrider.sampling.rng import Noise
from outrider.sampling.warping import Warping

MAX_VARIATION = 1e-3
MAX_RELATIVE_DISTANCE = 0.2  # of bfloat16, deep models with random weights reach a tenth
MAX_EXACT_DISTANCE = 1e-2  # of float32; kernels that round products to ten bits stay below
MAX_DISTURBANCE = 1e-3  # relative distance in float32; what is beside a text may change how its sums are rounded
_LENGTH = 13
_NUM_DRAWS, _MAX_SUPPORT = 2, 64


def probe_text(vocab_size: int, num_tokens: int) -> list[int]:
    """Return the ids of a text without sense."""
    return [index * 7919 % vocab_size for index in range(num_tokens)]


@torch.inference_mode()
def probe_rows(runner: Runner, vocab_size: int, cache: Cache | None = None) -> torch.Tensor:
    """Return rows `[R, V]` of a short text, fed with a rollback on the way and with one token alone.

    A `cache` that is given is left filled; else one is made and given back.
    """
    token_ids = probe_text(vocab_size, _LENGTH)
    used = runner.new_cache() if cache is None else cache
    runner.forward([Feed(used, token_ids[:7], 1)])
    used.truncate(5)
    rows = [runner.forward([Feed(used, token_ids[5:-1], _LENGTH - 6)])]
    rows.append(runner.forward([Feed(used, token_ids[-1:], 1)]))
    if cache is None:
        used.clear()
    return torch.cat(rows)


@torch.inference_mode()
def probe_drafts(runner: DraftingRunner, vocab_size: int) -> tuple[list[Draft | None], list[Draft | None]]:
    """Return what the runner drafts in one call, and what is drawn token by token from the rows that it returns.

    Three texts are continued, in the three ways in which a token is drawn.
    """
    texts = [[index * 7919 % vocab_size for index in range(first, 2 * first)] for first in (1, 2, 4)]
    warpings, limits = [Warping(1.0), Warping(0.0), Warping(1.0)], [_MAX_SUPPORT] * 3
    numbers: list[list[float | Noise]] = [[0.3, 0.3, Noise(0, index)] for index in range(_NUM_DRAWS)]
    sampling = PlainSampling.of([vocab_size] * 3, warpings, limits, numbers)
    assert sampling
    together = runner.draft(_feeds(runner, texts), sampling)
    feeds, one_by_one = _feeds(runner, texts), []
    for its_numbers in numbers:
        drawn = draft_tokens(runner.forward(feeds), warpings, limits, its_numbers)
        one_by_one += drawn
        feeds = [
            Feed(feed.cache, [draft.token_id if draft else 0], 1) for feed, draft in zip(feeds, drawn, strict=True)
        ]
    return together, one_by_one


def _feeds(runner: Runner, texts: list[list[int]]) -> list[Feed]:
    return [Feed(runner.new_cache(), text, 1) for text in texts]


def are_alike(drafts: list[Draft | None], others: list[Draft | None], tolerance: float) -> bool:
    """Return whether all are tokens, and the same ones, with about the same probabilities."""
    return all(
        one and other and one.token_id == other.token_id and abs(one.token_prob - other.token_prob) < tolerance
        for one, other in zip(drafts, others, strict=True)
    )


def total_variation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest total variation of two laws in rows of logits `[R, V]`."""
    return (actual.float().softmax(-1) - expected.float().softmax(-1)).abs().sum(-1).max().item() / 2


def why_different(actual: torch.Tensor, expected: torch.Tensor, is_rounded: bool) -> str | None:
    """Return in words how far apart rows of logits `[R, V]` are; None where rounding explains it.

    Of half precision and of quantised weights (`is_rounded`), what counts is a row's distance in relation to its
    spread: a law that is sharp makes a large variation of a small difference. Without rounding both count: a law that
    is flat makes a small variation of a large one.
    """
    variation, distance = total_variation(actual, expected), _relative_distance(actual, expected)
    if not is_rounded and not variation < MAX_VARIATION:
        return f"rows differ by a total variation of {variation:.2g}"
    if not distance < (MAX_RELATIVE_DISTANCE if is_rounded else MAX_EXACT_DISTANCE):
        return f"rows differ by a relative distance of {distance:.2g}"
    return None


@torch.inference_mode()
def why_disturbed(forward_pass: ForwardPass, token_ids: list[int], context_length: int, is_rounded: bool) -> str | None:
    """Return in words how a text's rows change beside one at the end of the context, or after it; None for not at all.

    The other text has no past: where tokens stand is all that counts here.
    """
    num_tokens, num_others = len(token_ids), 3
    far = [*range(num_tokens), *range(context_length - num_others, context_length)]
    alone = _rows_at(forward_pass, token_ids, list(range(num_tokens)), num_tokens)
    beside = _rows_at(forward_pass, token_ids + token_ids[:num_others], far, num_tokens)
    after = _rows_at(forward_pass, token_ids, list(range(num_tokens)), num_tokens)
    distance = max(_relative_distance(rows, alone) for rows in (beside, after))
    limit = MAX_RELATIVE_DISTANCE if is_rounded else MAX_DISTURBANCE
    return None if distance < limit else f"by a relative distance of {distance:.2g}"


def _rows_at(forward_pass: ForwardPass, token_ids: list[int], positions: list[int], num_tokens: int) -> torch.Tensor:
    """Return the rows of the first `num_tokens` tokens, which are one text; what is behind them is another."""
    device, parts = forward_pass.device, [slice(0, num_tokens), slice(num_tokens, len(token_ids))]
    packed = PackedBatch([(part, SequenceCache()) for part in parts if part.start < part.stop])
    ids, at = (torch.tensor(values, device=device) for values in (token_ids, positions))
    return forward_pass(ids, at, torch.arange(num_tokens, device=device), packed)


def _relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance of two rows over the length of the expected one, both without their means."""
    centred, other = (rows.float() - rows.float().mean(-1, keepdim=True) for rows in (expected, actual))
    return ((other - centred).norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-6)).max().item()
