"""Runs a grid of configurations, alternating, so that all of them meet the same machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from client.params import Acceptance, Coupling, Method, SamplingParams
from client.results import GenerationStats
from client.sync import SpeculativeClient

RESULT_SCHEMA = 1
BASELINE: Method = "autoregressive"
REPORTED_PACKAGES = ("outrider", "grpcio", "protobuf", "numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Configuration:
    """One cell of the grid."""

    method: Method
    temperature: float
    num_speculative_tokens: int = 0  # 0 for the methods that do not speculate


@dataclass(frozen=True)
class Settings:
    """What all cells have in common."""

    max_new_tokens: int = 128
    repetitions: int = 5
    warm_up: int = 1  # rounds over the grid that are not counted
    seed: int = 0
    ignore_eos: bool = True  # all texts of one length, so that rates compare
    overlap: bool = True
    window: int | None = None
    acceptance: Acceptance = "token"
    coupling: Coupling = "none"


@dataclass(frozen=True)
class Sample:
    """One generation."""

    configuration: Configuration
    repetition: int
    prompt_index: int
    stats: GenerationStats

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.configuration) | {
            "repetition": self.repetition,
            "prompt_index": self.prompt_index,
            "stats": self.stats.as_dict(),
        }


def make_grid(
    methods: Sequence[Method], temperatures: Sequence[float], num_speculative_tokens: Sequence[int]
) -> list[Configuration]:
    """Return every cell, the baseline of each temperature first."""
    grid = []
    for temperature in temperatures:
        for method in sorted(methods, key=lambda name: name != BASELINE):
            lengths = num_speculative_tokens if method == "speculative" else (0,)
            grid += [Configuration(method, temperature, length) for length in lengths]
    return grid


def run_grid(
    client: SpeculativeClient,
    prompts: Sequence[str],
    grid: Sequence[Configuration],
    settings: Settings,
    advance: Callable[[Configuration], None],
) -> list[Sample]:
    """Run every cell on every prompt, again and again, and return the samples that count.

    Cells alternate within a prompt, in an order that turns with each repetition, so that drift of the machine's speed
    falls on all alike. `advance` is called before each generation.
    """
    samples = []
    for repetition in range(-settings.warm_up, settings.repetitions):
        for prompt_index, prompt in enumerate(prompts):
            for configuration in _turned(grid, repetition):
                advance(configuration)
                stats = _generate(client, prompt, configuration, settings, repetition, prompt_index)
                if repetition >= 0:
                    samples.append(Sample(configuration, repetition, prompt_index, stats))
    return samples


def _turned(grid: Sequence[Configuration], repetition: int) -> Iterator[Configuration]:
    start = repetition % len(grid)
    yield from grid[start:]
    yield from grid[:start]


def _generate(client, prompt, configuration, settings, repetition, prompt_index) -> GenerationStats:
    sampling = SamplingParams(
        temperature=configuration.temperature,
        seed=(settings.seed + 7919 * max(repetition, 0) + prompt_index) % (1 << 64),
        max_new_tokens=settings.max_new_tokens,
        ignore_eos=settings.ignore_eos,
    )
    result = client.generate(
        prompt,
        sampling,
        method=configuration.method,
        num_speculative_tokens=configuration.num_speculative_tokens,
        overlap=settings.overlap,
        window=settings.window if configuration.method == "speculative" else None,
        acceptance=settings.acceptance,
        coupling=settings.coupling,
    )
    return result.stats


def result_document(
    samples: Sequence[Sample], settings: Settings, prompts: Sequence[str], pair: dict[str, Any]
) -> dict[str, Any]:
    """Return everything that a result file holds but the summary."""
    return {
        "schema": RESULT_SCHEMA,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": asdict(settings),
        "prompts": list(prompts),
        "pair": pair,
        "versions": {name: _version(name) for name in REPORTED_PACKAGES} | {"python": platform.python_version()},
        "machine": machine(),
        "samples": [sample.as_dict() for sample in samples],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return what is known of the client's machine."""
    import os

    return {"system": platform.platform(), "processor": _processor(), "num_cores": os.cpu_count()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
