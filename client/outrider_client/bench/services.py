"""Generates texts with the two services, one at a time, through the blocking client."""

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
    def __init__(self, client: SpeculativeClient, settings: Settings):
        self._client, self._settings = client, settings

    def prepare(self) -> None:
        wait_until_quiet(time.process_time, time.sleep)

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, GenerationStats]:
        clock = Stopwatch()
        sampling = sampling_of(cell, seed, self._settings)
        stream = self._client.stream(prompt_ids, sampling, speculation_of(cell, self._settings))
        for chunk in stream:
            clock.note(chunk)
        return clock.timeline(), stream.result.stats


class Stopwatch:
    """Notes when chunks arrive, in seconds since `begun_at` (`time.perf_counter`), by default since it was made."""

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
    """Return the cell's sampling. Where the client picks K there is no seed, so that it may pick 0."""
    its_seed = None if cell.method == AUTO_METHOD else seed
    return replace(settings.sampling, temperature=cell.temperature, seed=its_seed)


def speculation_of(cell: Cell, settings: Settings) -> SpeculationParams:
    """Return the cell's speculation. Only cells with a fixed K have a window."""
    if cell.method == AUTO_METHOD:
        return replace(settings.speculation, window=None)
    method = cast("Method", cell.method)
    window = settings.speculation.window if method == "speculative" else None
    num_proposals = cell.num_speculative_tokens
    return replace(settings.speculation, method=method, num_speculative_tokens=num_proposals, window=window)


def wait_until_quiet(process_time: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Return when this process is idle.

    OpenMP threads spin for some milliseconds after their work and would take a core from the services.

    Args:
        process_time: CPU seconds of all threads of the process.

    Raises:
        InvalidRequestError: the process does not become idle.
    """
    for _ in range(round(_PATIENCE_S / _QUIET_WINDOW_S)):
        used_before = process_time()
        sleep(_QUIET_WINDOW_S)
        if process_time() - used_before < _QUIET_SHARE * _QUIET_WINDOW_S:
            return
    raise InvalidRequestError(
        "this process keeps a core busy, which would slow the services: unset OMP_WAIT_POLICY and GOMP_SPINCOUNT, "
        "which can make threads spin without end"
    )
