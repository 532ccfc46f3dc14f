"""Our own methods, one text at a time, through the blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import AUTO_METHOD, Cell, Settings
from outrider_client.errors import InvalidRequestError
from outrider_client.params import Method, SamplingParams, SpeculationParams
from outrider_client.results import Chunk, GenerationStats
from outrider_client.sync import SpeculativeClient

_QUIET_WINDOW_S = 0.02
_QUIET_SHARE = 0.1  # of one core
_PATIENCE_S = 2.0


class ServicesRunner:
    """Makes texts with the two services."""

    def __init__(self, client: SpeculativeClient, settings: Settings):
        self._client, self._settings = client, settings

    def prepare(self) -> None:
        wait_until_quiet(time.process_time, time.sleep)

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, GenerationStats]:
        clock = Stopwatch()
        stream = self._client.stream(
            prompt_ids, sampling_of(cell, seed, self._settings), speculation_of(cell, self._settings)
        )
        for chunk in stream:
            clock.note(chunk)
        return clock.timeline(), stream.result.stats


class Stopwatch:
    """Notes when chunks arrive, in seconds since it was made or since the moment it was given."""

    def __init__(self, begun_at: float | None = None):
        self._begun_at = time.perf_counter() if begun_at is None else begun_at
        self._arrivals_s: list[float] = []
        self._num_tokens: list[int] = []

    def note(self, chunk: Chunk) -> None:
        if chunk.token_ids:
            self._arrivals_s.append(time.perf_counter() - self._begun_at)
            self._num_tokens.append(len(chunk.token_ids))

    def timeline(self) -> Timeline:
        return Timeline(self._arrivals_s, self._num_tokens, time.perf_counter() - self._begun_at)


def sampling_of(cell: Cell, seed: int, settings: Settings) -> SamplingParams:
    """Return the cell's sampling; where the client picks K there is no seed, so that K = 0 is among its choices."""
    its_seed = None if cell.method == AUTO_METHOD else seed
    return replace(settings.sampling, temperature=cell.temperature, seed=its_seed)


def speculation_of(cell: Cell, settings: Settings) -> SpeculationParams:
    """Return how the pair works on the cell's texts; a window is of a K that is set."""
    if cell.method == AUTO_METHOD:
        return replace(settings.speculation, window=None)
    method = cast("Method", cell.method)
    window = settings.speculation.window if method == "speculative" else None
    num_proposals = cell.num_speculative_tokens
    return replace(settings.speculation, method=method, num_speculative_tokens=num_proposals, window=window)


def wait_until_quiet(process_time: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Return when this process computes nothing any more.

    Threads of OpenMP go on spinning after their work, some milliseconds by default; they would take a core from the
    services.

    Args:
        process_time: CPU seconds of all threads of the process.

    Raises:
        InvalidRequestError: the threads do not come to rest.
    """
    for _ in range(round(_PATIENCE_S / _QUIET_WINDOW_S)):
        used_before = process_time()
        sleep(_QUIET_WINDOW_S)
        if process_time() - used_before < _QUIET_SHARE * _QUIET_WINDOW_S:
            return
    raise InvalidRequestError(
        "this process keeps a core busy while the services are to be measured: unset OMP_WAIT_POLICY and "
        "GOMP_SPINCOUNT, which can make threads spin without end"
    )
