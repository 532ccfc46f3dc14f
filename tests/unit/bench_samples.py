"""Samples made by hand, whose figures can be computed in the head."""

from __future__ import annotations

from typing import Any

from outrider_client.bench.metrics import Timeline
from outrider_client.bench.result_file import Kind, Result
from outrider_client.bench.samples import Cell, Sample, Settings
from outrider_client.params import SamplingParams
from outrider_client.results import GenerationStats, RoundStats

AR = Cell("autoregressive", 0.0)
PAIR = Cell("speculative", 0.0, 2)
HF = Cell("transformers", 0.0)
ASSISTED = Cell("transformers-assisted", 0.0, 2)
VOCAB_SIZE = 100


def ar_sample(repetition: int = 0, wall_s: float = 0.4, cell: Cell = AR, **changes: Any) -> Sample:
    """Return four tokens, one a round, of which each takes a quarter of the time: 10 tokens/s by default.

    Of each round, a tenth is queue, six tenths are forward, a fifth is wire and a tenth is the client's.
    """
    step = wall_s / 4
    rounds = [RoundStats(0, 1, 0.0, 0.9 * step, 0.1 * step, 0.6 * step)] * 4
    stats = GenerationStats(
        num_generated_tokens=4,
        num_rounds=4,
        total_s=wall_s,
        target_wait_s=0.9 * wall_s,
        target_queue_s=0.1 * wall_s,
        target_forward_s=0.6 * wall_s,
        num_bytes_sent=100,
        num_bytes_received=300,
        rounds=rounds,
    )
    for name, value in changes.items():
        setattr(stats, name, value)
    return Sample(cell, repetition, 0, Timeline([step, 2 * step, 3 * step, 4 * step], [1, 1, 1, 1], wall_s), stats)


def pair_sample(repetition: int = 0, wall_s: float = 0.2, cell: Cell = PAIR) -> Sample:
    """Return four tokens in three rounds of K = 2: nothing accepted, one accepted, all accepted but cut to one."""
    step = wall_s / 4
    rounds = [
        RoundStats(2, 1, 0.2 * step, 0.8 * step, 0.0, 0.9 * step),
        RoundStats(2, 2, 0.4 * step, 1.6 * step, 0.1 * step, 0.7 * step),
        RoundStats(2, 1, 0.2 * step, 0.8 * step, 0.0, 0.5 * step),
    ]
    stats = GenerationStats(
        num_generated_tokens=4,
        num_rounds=3,
        num_draft_tokens=5,
        num_accepted_tokens=2,
        num_draft_tokens_per_position=[3, 2],
        num_accepted_tokens_per_position=[2, 0],
        total_s=wall_s,
        draft_wait_s=0.2 * wall_s,
        target_wait_s=0.8 * wall_s,
        target_queue_s=0.1 * step,
        target_forward_s=2.1 * step,
        num_bytes_sent=1000,
        num_bytes_received=3000,
        rounds=rounds,
        draft_forward_s=[0.1 * step, 0.1 * step, 0.3 * step],
    )
    return Sample(cell, repetition, 0, Timeline([step, 3 * step, 4 * step], [1, 2, 1], wall_s), stats)


def peer_sample(repetition: int = 0, wall_s: float = 0.8, cell: Cell = HF, begun_s: float = 0.0) -> Sample:
    step = wall_s / 4
    return Sample(cell, repetition, 0, Timeline([step, 2 * step, 4 * step], [1, 2, 1], wall_s), None, begun_s)


def make_result(kind: Kind, samples: list[Sample]) -> Result:
    model = {"vocab_size": VOCAB_SIZE, "revision": "", "device": "cpu", "dtype": "float32", "service_version": "1"}
    return Result(
        kind=kind,
        settings=Settings(2, sampling=SamplingParams(seed=0, max_new_tokens=4, ignore_eos=True)),
        prompts=["Once", "Twice"],
        pair={role: {"model_id": f"a-{role}"} | model for role in ("draft", "target")},
        samples=samples,
        threads={"service": 1, "peer": 2},
        versions={"outrider": "1", "torch": None},
        machine={"num_cores": 2},
        made_at="2026-01-01T00:00:00Z",
    )
