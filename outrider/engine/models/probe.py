"""Compares a backend with the model's own attention on a short text.

Shapes: n tokens of the text, R rows, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from outrider.engine.backends.attention import PackedBatch
from outrider.engine.backends.batch import Feed
from outrider.engine.backends.runner import DeviceRunner, DraftingRunner, ForwardPass, Runner
from outrider.engine.kv_cache import SequenceCache
from outrider.engine.models.configuration import context_length_of, vocab_size_of
from outrider.sampling.distribution import DistributionParams
from outrider.sampling.draws import Draft, Draws
from outrider.sampling.pipeline import draft_tokens
from outrider.sampling.rng import Noise

MAX_VARIATION = 1e-3
MAX_RELATIVE_DISTANCE = 0.2  # of bfloat16, deep models with random weights reach a tenth
MAX_EXACT_DISTANCE = 1e-2  # of float32; kernels that round products to ten bits stay below
MAX_DISTURBANCE = 1e-3  # relative distance in float32; what is beside a text may change how its sums are rounded
MAX_DRAFT_DISTANCE = 1e-3  # of the probabilities of drafts
_LENGTH, _START = 12, 5  # of the text, and where its rows are read from
_SMALL_WINDOW = 32  # the text is longer than windows and chunks up to this size
_NUM_DRAWS, _MAX_SUPPORT = 2, 64


@dataclass(frozen=True)
class Probe:
    """A text, and the rows that every backend is to give for it."""

    token_ids: Sequence[int]  # [n]
    expected: torch.Tensor  # [n - _START, V], behind the first tokens
    is_rounded: bool  # half precision or quantised

    def variation(self, runner: Runner, max_tokens: int) -> float:
        """Return the largest total variation of the runner's rows and the expected ones; see `why_not`."""
        num_tokens = min(len(self.token_ids), max_tokens)
        return total_variation(rows_of(runner, self.token_ids[:num_tokens]), self.expected[: num_tokens - _START])

    def why_not(self, runner: Runner, max_tokens: int) -> str | None:
        """Return in words how the runner's rows, or its drafts, differ; None where rounding explains it.

        Args:
            max_tokens: that its caches hold together; the text is cut to them.
        """
        num_tokens = min(len(self.token_ids), max_tokens)
        expected = self.expected[: num_tokens - _START]
        reason = why_different(rows_of(runner, self.token_ids[:num_tokens]), expected, self.is_rounded)
        # A device draws from the rows that its passes give, by code that is recorded when it is first used.
        if reason or not isinstance(runner, DraftingRunner) or isinstance(runner, DeviceRunner):
            return reason
        if not are_alike(*probe_drafts(runner, self.expected.shape[1]), MAX_DRAFT_DISTANCE):
            return "what it drafts in one go is not what it drafts token by token"
        return None


def probe_text(model: PreTrainedModel) -> list[int]:
    """Return a text of plain tokens and a padding token, which some models treat specially.

    It is longer than small sliding windows and chunks.
    """
    config: Any = model.config.get_text_config()
    sizes = [getattr(config, key, None) or 0 for key in ("sliding_window", "attention_chunk_size")]
    length = max(_LENGTH, *(2 * size + _START for size in sizes if size <= _SMALL_WINDOW))
    vocab_size = vocab_size_of(model)
    token_ids = [(index + _START) * 7919 % vocab_size for index in range(min(length, context_length_of(config)))]
    padding = getattr(config, "pad_token_id", None)
    token_ids[_START + 1] = padding if isinstance(padding, int) and 0 <= padding < vocab_size else 0
    return token_ids


@torch.inference_mode()
def rows_of(runner: Runner, token_ids: Sequence[int]) -> torch.Tensor:
    """Return the rows `[n - _START, V]` of a text, fed with a rollback and with a single last token."""
    cache = runner.new_cache()
    runner.forward([Feed(cache, token_ids[:7], 1)])
    cache.truncate(_START)
    rows = [runner.forward([Feed(cache, token_ids[_START:-1], len(token_ids) - _START - 1)])]
    rows.append(runner.forward([Feed(cache, token_ids[-1:], 1)]))
    cache.clear()
    return torch.cat(rows)


def expected_rows(logits: torch.Tensor) -> torch.Tensor:
    """Return, of all rows of the text `[n, V]`, those that `rows_of` returns."""
    return logits[_START:]


@torch.inference_mode()
def probe_drafts(runner: DraftingRunner, vocab_size: int) -> tuple[list[Draft | None], list[Draft | None]]:
    """Return what the runner drafts in one call, and what is drawn token by token from its rows.

    Three texts are continued: with uniforms, greedily, and with shared noise.
    """
    texts = [[index * 7919 % vocab_size for index in range(first, 2 * first)] for first in (1, 2, 4)]
    limits = [_MAX_SUPPORT] * 3
    params = [DistributionParams(1.0), DistributionParams(0.0), DistributionParams(1.0)]
    numbers: list[list[float | Noise]] = [[0.3, 0.3, Noise(0, index)] for index in range(_NUM_DRAWS)]
    together = runner.draft(_feeds(runner, texts), Draws.of([vocab_size] * 3, params, limits, numbers))
    feeds, one_by_one = _feeds(runner, texts), []
    for its_numbers in numbers:
        drawn = draft_tokens([runner.forward(feeds)], params, limits, its_numbers)
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
    """Return the largest total variation between the distributions of two tensors of logits `[R, V]`."""
    return (actual.float().softmax(-1) - expected.float().softmax(-1)).abs().sum(-1).max().item() / 2


def why_different(actual: torch.Tensor, expected: torch.Tensor, is_rounded: bool) -> str | None:
    """Return in words how far apart rows of logits `[R, V]` are; None where rounding explains it.

    For half precision and quantised weights (`is_rounded`), only the distance relative to a row's spread counts: a
    sharp distribution turns a small difference into a large variation. Otherwise both count: a flat distribution turns
    a large difference into a small variation.
    """
    variation, distance = total_variation(actual, expected), _relative_distance(actual, expected)
    if not is_rounded and not variation < MAX_VARIATION:
        return f"rows differ by a total variation of {variation:.2g}"
    if not distance < (MAX_RELATIVE_DISTANCE if is_rounded else MAX_EXACT_DISTANCE):
        return f"rows differ by a relative distance of {distance:.2g}"
    return None


@torch.inference_mode()
def why_disturbed(forward_pass: ForwardPass, token_ids: list[int], context_length: int, is_rounded: bool) -> str | None:
    """Return in words how a text's rows change beside or after another text at the end of the context; None if not."""
    num_tokens, num_others = len(token_ids), 3
    far = [*range(num_tokens), *range(context_length - num_others, context_length)]
    alone = _rows_at(forward_pass, token_ids, list(range(num_tokens)), num_tokens)
    beside = _rows_at(forward_pass, token_ids + token_ids[:num_others], far, num_tokens)
    after = _rows_at(forward_pass, token_ids, list(range(num_tokens)), num_tokens)
    distance = max(_relative_distance(rows, alone) for rows in (beside, after))
    limit = MAX_RELATIVE_DISTANCE if is_rounded else MAX_DISTURBANCE
    return None if distance < limit else f"by a relative distance of {distance:.2g}"


def _rows_at(forward_pass: ForwardPass, token_ids: list[int], positions: list[int], num_tokens: int) -> torch.Tensor:
    """Return the rows of the first `num_tokens` tokens, which are one text; the others are a second text."""
    device, parts = forward_pass.device, [slice(0, num_tokens), slice(num_tokens, len(token_ids))]
    packed = PackedBatch([(part, SequenceCache()) for part in parts if part.start < part.stop])
    ids, at = (torch.tensor(values, device=device) for values in (token_ids, positions))
    return forward_pass(ids, at, torch.arange(num_tokens, device=device), packed)


def _relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance of two rows over the length of the expected one, both without their means."""
    centred, other = (rows.float() - rows.float().mean(-1, keepdim=True) for rows in (expected, actual))
    return ((other - centred).norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-6)).max().item()
