"""Many texts at once: users who each begin a text when the last has ended, or texts that begin at random times."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from outrider_client.aio import AsyncSpeculativeClient
from outrider_client.bench.grid import rotated
from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import Cell, Sample, Settings
from outrider_client.bench.services import Stopwatch, sampling_of, speculation_of, wait_until_quiet
from outrider_client.results import GenerationStats


@dataclass(frozen=True)
class Text:
    prompt_index: int
    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Made:
    """One generated text; `begun_s` counts from the first request of the load."""

    begun_s: float
    timeline: Timeline
    stats: GenerationStats | None = None


class LoadRunner(Protocol):
    """Generates many texts by one or several methods."""

    def prepare(self) -> None:
        """As in bench.grid.Runner."""

    def run(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        """Generate all texts as the cell says and return them in order; `seed` draws the arrivals."""


def run_loads(
    runners: Mapping[str, LoadRunner],
    prompts: Sequence[Sequence[int]],
    cells: Sequence[Cell],
    num_texts_of: Callable[[Cell], int],
    settings: Settings,
    advance: Callable[[Cell], None],
) -> list[Sample]:
    """Run all cells in each repetition, as run_grid does; return the samples, without the warm-up."""
    samples, last_runner = [], None
    for repetition in range(-settings.warm_up, settings.repetitions):
        for cell in rotated(cells, repetition):
            advance(cell)
            runner = runners[cell.method]
            if runner is not last_runner:
                runner.prepare()
            last_runner = runner
            texts = [
                Text(index % len(prompts), prompts[index % len(prompts)], settings.seed_of(repetition, index))
                for index in range(num_texts_of(cell))
            ]
            made = runner.run(texts, cell, settings.seed_of(repetition, 0))
            if repetition >= 0:
                samples += [
                    Sample(cell, repetition, text.prompt_index, one.timeline, one.stats, one.begun_s)
                    for text, one in zip(texts, made, strict=True)
                ]
    return samples


def arrival_times(rate: float, num_texts: int, seed: int) -> list[float]:
    """Return when texts begin, in seconds: a Poisson process of `rate` arrivals per second, the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, num_texts - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


class ServicesLoad:
    """Generates texts with the two services, all from one event loop."""

    def __init__(self, client: AsyncSpeculativeClient, settings: Settings, loop: asyncio.AbstractEventLoop):
        """The client is closed with this. gRPC wants one loop per process, so it is the caller's."""
        self._settings, self._loop = settings, loop
        self._client = client

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        # grpc.aio keeps a closed channel's connections while anything refers to its calls, and prints an error when the
        # services end.
        del self._client
        gc.collect()

    def prepare(self) -> None:
        wait_until_quiet(time.process_time, time.sleep)

    def run(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        run = self._open_loop if cell.request_rate else self._closed_loop
        return self._loop.run_until_complete(run(texts, cell, seed))

    async def _closed_loop(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        """User u generates the texts u, u + num_users, and so on, one after another."""
        began_at = time.perf_counter()

        async def use(user: int) -> list[Made]:
            own = texts[user :: cell.num_users]
            return [await self._make(text, cell, began_at, time.perf_counter()) for text in own]

        by_user = await asyncio.gather(*(use(user) for user in range(cell.num_users)))
        return [by_user[index % cell.num_users][index // cell.num_users] for index in range(len(texts))]

    async def _open_loop(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        """Times count from the moment at which a text was due, so they include a late start."""
        began_at = time.perf_counter()

        async def make_at(text: Text, due_s: float) -> Made:
            await asyncio.sleep(began_at + due_s - time.perf_counter())
            return await self._make(text, cell, began_at, began_at + due_s)

        due = arrival_times(cell.request_rate, len(texts), seed)
        return await asyncio.gather(*map(make_at, texts, due))

    async def _make(self, text: Text, cell: Cell, began_at: float, asked_at: float) -> Made:
        watch = Stopwatch(asked_at)
        sampling = sampling_of(cell, text.seed, self._settings)
        stream = self._client.stream(text.prompt_ids, sampling, speculation_of(cell, self._settings))
        async for chunk in stream:
            watch.note(chunk)
        return Made(asked_at - began_at, watch.timeline(), stream.result.stats)


class BatchGenerator(Protocol):
    """What PeerLoad needs of transformers_peer.TransformersPeer, which imports torch."""

    def prepare(self) -> None: ...

    def generate_batch(self, prompts: Sequence[Sequence[int]], cell: Cell, seed: int) -> list[Timeline]: ...


class PeerLoad:
    def __init__(self, peer: BatchGenerator):
        self._peer = peer

    def prepare(self) -> None:
        self._peer.prepare()

    def run(self, texts: Sequence[Text], cell: Cell, seed: int) -> list[Made]:
        began_at, made = time.perf_counter(), []
        for first in range(0, len(texts), cell.num_users):
            batch = texts[first : first + cell.num_users]
            begun_s = time.perf_counter() - began_at
            timelines = self._peer.generate_batch([text.prompt_ids for text in batch], cell, batch[0].seed)
            made += [Made(begun_s, timeline) for timeline in timelines]
        return made
