"""What a benchmark measures: cells, their settings, and one sample per text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from outrider.sampling.messages import defaults_of
from outrider.v1 import common_pb2
from outrider_client.bench.metrics import Timeline
from outrider_client.params import AUTO, METHODS, SamplingParams, SpeculationParams
from outrider_client.results import GenerationStats, RoundStats
from outrider_client.rules.rules import rule_of
from outrider_client.text.text import TargetTokenizer, word_to_ids

BASELINE = "autoregressive"
AUTO_METHOD = f"speculative-{AUTO}"  # the client picks K
OWN_METHODS = (*METHODS, AUTO_METHOD)
PEERS = {  # by the values of --compare
    "transformers": ("transformers", "transformers-assisted", "transformers-dynamic", "transformers-heuristic"),
    "llama.cpp": ("llama.cpp", "llama.cpp-speculative"),
}
PEER_METHODS = tuple(method for methods in PEERS.values() for method in methods)
ALL_METHODS = (*OWN_METHODS, *PEER_METHODS)  # in the order of tables, where the baseline comes first
METHODS_WITH_K = ("speculative", "transformers-assisted", "llama.cpp-speculative")


@dataclass(frozen=True)
class Cell:
    """One measured configuration."""

    method: str  # one of ALL_METHODS
    temperature: float
    num_speculative_tokens: int = 0  # K; 0 for methods without one
    num_users: int = 1  # texts at once: each user begins one when the last has ended; for a peer, the batch size
    request_rate: float = 0.0  # texts that begin per second, whatever still runs; 0: as `num_users` says

    @property
    def baseline(self) -> Cell:
        """The target only, under the same conditions."""
        return Cell(BASELINE, self.temperature, 0, self.num_users, self.request_rate)

    @property
    def order(self) -> tuple:
        rank = 0 if self.method == BASELINE else 1 + ALL_METHODS.index(self.method)
        return self.temperature, rank, self.num_speculative_tokens, self.num_users, self.request_rate


# Fields of SamplingParams and SpeculationParams that each cell sets itself.
OF_A_CELL = ("temperature", "method", "num_speculative_tokens")

_SAMPLING = SamplingParams(seed=0, ignore_eos=True)  # all texts have one length, so that rates compare
_SPECULATION = SpeculationParams()


@dataclass(frozen=True)
class Settings:
    """What all cells have in common."""

    repetitions: int = 5
    warm_up: int = 1  # repetitions beforehand that do not count
    sampling: SamplingParams = _SAMPLING
    speculation: SpeculationParams = _SPECULATION

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Settings:
        sampling, speculation = SamplingParams(**record["sampling"]), SpeculationParams(**record["speculation"])
        return cls(record["repetitions"], record["warm_up"], sampling, speculation)

    @property
    def flat(self) -> dict[str, Any]:
        """All of them by name, without the fields that cells set themselves."""
        named = {"repetitions": self.repetitions, "warm_up": self.warm_up}
        named |= vars(self.sampling) | vars(self.speculation)
        return {name: value for name, value in named.items() if name not in OF_A_CELL}

    def resolved(self, target: common_pb2.ModelInfo, tokenizer: TargetTokenizer | None = None) -> Settings:
        """Return these with `auto`, None and texts in `bad_words` resolved, so that all cells are measured alike."""
        rule = rule_of(self.speculation.rule, has_seed=True).name
        sampling = self.sampling.resolved(defaults_of(target))
        sampling = sampling.with_word_ids(lambda word: word_to_ids(word, tokenizer, target.vocab_size))
        return replace(self, sampling=sampling, speculation=replace(self.speculation, rule=rule))

    @property
    def rule_name(self) -> str:
        """The rule, as titles name it."""
        rule = self.speculation.rule
        return "shared noise where seeded" if rule == AUTO else rule.replace("_", " ")

    def seed_of(self, repetition: int, index: int) -> int:
        """Return the seed of a text; all methods get the same."""
        return ((self.sampling.seed or 0) + 7919 * max(repetition, 0) + index) % (1 << 64)


@dataclass(frozen=True)
class Sample:
    """One text of one cell."""

    cell: Cell
    repetition: int
    prompt_index: int
    timeline: Timeline
    stats: GenerationStats | None = None  # None for a peer's text
    begun_s: float = 0.0  # when it was requested, since its cell and repetition began

    def as_dict(self) -> dict[str, Any]:
        """Return the sample for JSON, rounds as columns."""
        stats, timeline = self.stats, self.timeline
        return asdict(self.cell) | {
            "repetition": self.repetition,
            "prompt_index": self.prompt_index,
            "begun_s": self.begun_s,
            "wall_s": timeline.wall_s,
            "arrivals_s": timeline.arrivals_s,
            "num_tokens_per_chunk": timeline.num_tokens_per_chunk,
            "stats": stats and stats.as_dict(),
            "rounds": stats and _columns(stats.rounds),
            "draft_forward_s": stats and stats.draft_forward_s,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Sample:
        timeline = Timeline(record["arrivals_s"], record["num_tokens_per_chunk"], record["wall_s"])
        cell = Cell(**{name: record[name] for name in Cell.__dataclass_fields__})
        stats = _stats_from(record)
        return cls(cell, record["repetition"], record["prompt_index"], timeline, stats, record["begun_s"])


def _stats_from(record: dict[str, Any]) -> GenerationStats | None:
    if record["stats"] is None:
        return None
    fields = GenerationStats.__dataclass_fields__
    counted = {name: value for name, value in record["stats"].items() if name in fields}
    columns = [record["rounds"][name] for name in RoundStats.__dataclass_fields__]
    rounds = [RoundStats(*values) for values in zip(*columns, strict=True)]
    return GenerationStats(**counted, rounds=rounds, draft_forward_s=record["draft_forward_s"])


def _columns(rounds: Sequence[RoundStats]) -> dict[str, list]:
    return {name: [getattr(one, name) for one in rounds] for name in RoundStats.__dataclass_fields__}
