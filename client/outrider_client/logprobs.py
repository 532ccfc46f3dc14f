"""Log-probabilities of committed tokens, from the target's rows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from outrider.v1 import target_pb2
from outrider_client.errors import ServiceFailedError
from outrider_client.results import TokenLogprobs


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
        if not (row.HasField("logprobs") and are_as_asked and all(it <= 0 and math.isfinite(it) for it in logprobs)):
            raise ServiceFailedError("the target reports log-probabilities other than it was asked for")
        logprob = its.support[index] if is_in_support else its.outside_token
        yield TokenLogprobs(token_id, logprob, list(zip(its.likeliest_ids, its.likeliest, strict=True)))
