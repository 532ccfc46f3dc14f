"""Runs a grid of cells, alternating, so that drift of the machine's speed affects all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import AUTO_METHOD, BASELINE, METHODS_WITH_K, Cell, Sample, Settings
from outrider_client.params import AUTO
from outrider_client.results import GenerationStats


class Runner(Protocol):
    """Generates texts by one or several methods."""

    def prepare(self) -> None:
        """Wait until the runner before has stopped using the CPU."""

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, GenerationStats | None]: ...


def make_grid(
    methods: Sequence[str], temperatures: Sequence[float], num_speculative_tokens: Sequence[int | Literal["auto"]]
) -> list[Cell]:
    """Return all cells, the baseline of each temperature first; K = `auto` is a method of its own."""
    lengths = [length for length in num_speculative_tokens if length != AUTO]
    if "speculative" in methods and len(lengths) < len(num_speculative_tokens):
        methods = [*methods, AUTO_METHOD]
    grid = []
    for temperature in temperatures:
        for method in sorted(methods, key=lambda name: name != BASELINE):
            grid += [Cell(method, temperature, length) for length in (lengths if method in METHODS_WITH_K else (0,))]
    return grid


def run_grid(
    runners: Mapping[str, Runner],
    prompts: Sequence[Sequence[int]],
    grid: Sequence[Cell],
    settings: Settings,
    advance: Callable[[Cell], None],
) -> list[Sample]:
    """Run all cells on all prompts in each repetition; return the samples, without the warm-up.

    Cells alternate within a prompt, in an order that rotates with each repetition.

    Args:
        runners: by method.
        prompts: token ids.
        advance: called before each text.
    """
    samples, last_runner = [], None
    for repetition in range(-settings.warm_up, settings.repetitions):
        for prompt_index, prompt_ids in enumerate(prompts):
            for cell in rotated(grid, repetition):
                advance(cell)
                runner = runners[cell.method]
                if runner is not last_runner:
                    runner.prepare()
                last_runner = runner
                timeline, stats = runner.generate(prompt_ids, cell, settings.seed_of(repetition, prompt_index))
                if repetition >= 0:
                    samples.append(Sample(cell, repetition, prompt_index, timeline, stats))
    return samples


def rotated(grid: Sequence[Cell], repetition: int) -> list[Cell]:
    """Return the cells, starting with another one in each repetition."""
    start = repetition % len(grid)
    return [*grid[start:], *grid[:start]]
