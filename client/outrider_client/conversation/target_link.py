"""The target's side of one generation, whoever decides: how it opens a session, and what it reports. No sockets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.protocol import wire
from outrider.protocol.errors import InvalidArgumentError
from outrider.v1 import target_pb2
from outrider_client.conversation.committed import Committed, Task
from outrider_client.errors import ServiceFailedError
from outrider_client.logprobs import prompt_logprobs_of
from outrider_client.results import TokenLogprobs
from outrider_client.rules.acceptance import TargetRow

MASS_SLACK = 2.0**-10  # a row's probabilities are computed in float32


class TargetLink:
    """What both kinds have: `RoundsLink`, and `AheadLink`."""

    def __init__(self, task: Task, committed: Committed):
        self._task, self._committed = task, committed
        self.round_logprobs: list[TokenLogprobs] = []  # of the last round's tokens, if asked for
        self.prompt_logprobs: list[TokenLogprobs | None] = []  # once they have come, if asked for

    @property
    def num_proposals(self) -> int:
        """How many proposals the last round has."""
        raise NotImplementedError

    def _opening(self) -> target_pb2.OpenVerification:
        """Return the opening of a session with all committed tokens."""
        return target_pb2.OpenVerification(
            sampling=self._task.sampling,
            seed=self._task.rule.seed,
            committed=self._committed.span_from(0),
            model_identity=self._task.target_info.identity,
            num_prompt_tokens=len(self._task.prompt_ids),
            num_logprobs=self._task.num_logprobs,
            num_prompt_logprobs=None if self.prompt_logprobs else self._task.num_prompt_logprobs,
        )

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether the answer to the opening is still to come."""
        return self._task.num_prompt_logprobs is not None and not self.prompt_logprobs

    def take_prompt_logprobs(self, response: target_pb2.VerifyResponse) -> None:
        """Keep what answers an opening; raises as what reads a round does."""
        assert self._task.num_prompt_logprobs is not None
        if response.round_index or not response.HasField("prompt_logprobs"):
            raise ServiceFailedError("the target did not answer the opening, which asks for log-probabilities")
        self._committed.check_cache(response.cache, [])
        asked = self._task.num_prompt_logprobs, self._task.target_info.vocab_size
        self.prompt_logprobs = prompt_logprobs_of(self._task.prompt_ids, response.prompt_logprobs, *asked)


def rows_from_proto(
    rows: Sequence[target_pb2.TargetRow], support_sizes: Sequence[int], vocab_size: int
) -> list[TargetRow]:
    """Return the rows of a response; raises ServiceFailedError if one is no distribution on a support of its size."""
    try:
        probs = [wire.probs_of(row.support_units[:], f"rows[{index}].support_units") for index, row in enumerate(rows)]
    except InvalidArgumentError as error:
        raise ServiceFailedError(f"the target sent a row that breaks the protocol: {error}") from error
    if [len(row_probs) for row_probs in probs] != list(support_sizes):
        raise ServiceFailedError("the target sent a row of another length than the support")
    result = [
        TargetRow(row_probs, row.outside_mass, row.outside_token_id, _known_prob(row.outside_token_prob))
        for row_probs, row in zip(probs, rows, strict=True)
    ]
    for index, row in enumerate(result):
        _check_row(row, index, vocab_size)
    return result


def _check_row(row: TargetRow, index: int, vocab_size: int) -> None:
    """Raise ServiceFailedError unless a row is a distribution over the target's vocabulary."""
    if not 0 <= row.outside_mass <= 1 + MASS_SLACK:  # false for NaN
        raise ServiceFailedError(
            f"the target sent rows[{index}].outside_mass {row.outside_mass}, which is no probability"
        )
    mass = float(np.add.reduce(row.probs)) + row.outside_mass
    if abs(mass - 1) > MASS_SLACK:
        raise ServiceFailedError(f"the target sent rows[{index}] with a mass of {mass:g}, where it is 1")
    if row.outside_mass > 0 and row.outside_token_id >= vocab_size:
        raise ServiceFailedError(
            f"the target sent token {row.outside_token_id} in rows[{index}]: its vocabulary has {vocab_size} ids"
        )


def _known_prob(prob: float) -> float | None:
    """Return a reported probability; None if it was not reported."""
    return min(prob, 1.0) if prob > 0 else None  # None for NaN too
