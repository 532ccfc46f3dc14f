"""Log-probabilities of tokens, as the target reports them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import repeat

from outrider.v1 import target_pb2
from outrider_client.errors import ServiceFailedError
from outrider_client.results import TokenLogprobs

OTHER_THAN_ASKED = "the target reports log-probabilities other than it was asked for"


def logprobs_of(
    token_ids: Sequence[int], rows: Sequence[target_pb2.TargetRow], supports: Sequence[Sequence[int]], number: int
) -> Iterator[TokenLogprobs]:
    """Yield the log-probabilities of a round's tokens. Each is in its row's support, or is the token outside it.

    Raises:
        ServiceFailedError: the rows do not hold what was asked for.
    """
    for token_id, row, support in zip(token_ids, rows, supports, strict=False):
        its = row.logprobs
        index = bisect_left(support, token_id)
        is_in_support = index < len(support) and support[index] == token_id
        logprobs = [*its.support, *its.likeliest, its.outside_token]
        are_as_asked = len(its.support) == len(support) and len(its.likeliest_ids) == len(its.likeliest) <= number
        if not (row.HasField("logprobs") and are_as_asked and _are_logprobs(logprobs)):
            raise ServiceFailedError(OTHER_THAN_ASKED)
        logprob = its.support[index] if is_in_support else its.outside_token
        yield TokenLogprobs(token_id, logprob, list(zip(its.likeliest_ids, its.likeliest, strict=True)))


def prompt_logprobs_of(
    token_ids: Sequence[int], found: target_pb2.PromptLogprobs, number: int, vocab_size: int
) -> list[TokenLogprobs | None]:
    """Return the log-probabilities of a prompt's tokens; the first has none.

    Raises:
        ServiceFailedError: the target reports other than was asked for.
    """
    num_scored, width = len(token_ids) - 1, min(number, vocab_size)
    sizes = len(found.token), len(found.ranks), len(found.likeliest_ids), len(found.likeliest)
    ids, likeliest = found.likeliest_ids[:], found.likeliest[:]
    if (
        sizes != (num_scored, num_scored, num_scored * width, num_scored * width)
        or not (_are_logprobs([*found.token, *likeliest]) and all(found.ranks))
        or any(token_id >= vocab_size for token_id in ids)
    ):
        raise ServiceFailedError(OTHER_THAN_ASKED)
    pairs = list(zip(ids, likeliest, strict=True))
    parts = (pairs[start : start + width] for start in range(0, num_scored * width, width)) if width else repeat([])
    return [None, *map(TokenLogprobs, token_ids[1:], found.token, parts, found.ranks)]


def _are_logprobs(values: Sequence[float]) -> bool:
    return all(it <= 0 and math.isfinite(it) for it in values)
