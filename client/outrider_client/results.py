"""What a generation yields: chunks, a result at its end, and statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Segment:
    """The text that one token released."""

    text: str
    is_drafted: bool  # an accepted proposal; otherwise the target's own token


@dataclass(frozen=True)
class Chunk:
    """What one round committed."""

    token_ids: list[int]
    segments: list[Segment]
    # The target's probability of each token under the sampling parameters, rounded down to a multiple of 2^-18 for
    # accepted proposals; None where it is unknown, as under the method `draft`.
    token_probs: list[float | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What one round did and where its time went. Waits include failed tries."""

    num_draft_tokens: int  # proposals sent; the target's pass had as many tokens, or one if there were none
    num_committed_tokens: int
    draft_wait_s: float
    target_wait_s: float  # from request to response
    target_queue_s: float
    target_forward_s: float


@dataclass
class GenerationStats:
    """Counters and seconds of one generation, without tokens behind the end of the text."""

    num_generated_tokens: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0  # proposals that were verified
    num_alternatives_used: int = 0  # rejections for which the draft had prepared
    num_accepted_tokens: int = 0
    num_draft_tokens_per_position: list[int] = field(default_factory=list)  # by index in the round
    num_accepted_tokens_per_position: list[int] = field(default_factory=list)
    # By where proposals came from: `draft` is the draft service, `lookup` the text itself, `prediction` the caller's.
    num_draft_tokens_by_source: dict[str, int] = field(default_factory=dict)
    num_accepted_tokens_by_source: dict[str, int] = field(default_factory=dict)
    total_s: float = 0.0  # without the time the caller spent between chunks
    first_token_s: float = 0.0
    draft_wait_s: float = 0.0
    target_wait_s: float = 0.0  # includes the queue, the forward passes and the wire
    target_queue_s: float = 0.0
    target_forward_s: float = 0.0
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    num_rounds_without_draft: int = 0  # of a speculative generation
    draft_failures: dict[str, int] = field(default_factory=dict)  # by reason
    first_draft_failure: str = ""  # its reason and details
    num_target_retries: int = 0
    num_cache_mismatches: int = 0
    rounds: list[RoundStats] = field(default_factory=list)
    draft_forward_s: list[float] = field(default_factory=list)  # per token, a mean for each message of proposals alone

    @property
    def num_draft_failures(self) -> int:
        return sum(self.draft_failures.values())

    def add_draft_failure(self, reason: str, details: str) -> None:
        self.draft_failures[reason] = self.draft_failures.get(reason, 0) + 1
        self.first_draft_failure = self.first_draft_failure or f"{reason}: {details}"

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 if nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per round; 0 without rounds."""
        return self.num_generated_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the proposals at each index of a round that were accepted."""
        pairs = zip(self.num_accepted_tokens_per_position, self.num_draft_tokens_per_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    @property
    def client_s(self) -> float:
        """Seconds outside the waits for the draft and the target."""
        return self.total_s - self.draft_wait_s - self.target_wait_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_generated_tokens / self.total_s if self.total_s else 0.0

    def waits_s(self) -> tuple[float, float, float, float]:
        """Return the totals of the seconds in RoundStats, in its order."""
        return self.draft_wait_s, self.target_wait_s, self.target_queue_s, self.target_forward_s

    def as_dict(self) -> dict[str, Any]:
        """Return all counters and derived figures, for JSON, without single rounds and messages."""
        derived = [name for name, member in vars(GenerationStats).items() if isinstance(member, property)]
        counted = {name: value for name, value in asdict(self).items() if name not in ("rounds", "draft_forward_s")}
        return counted | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the target's raw probabilities at one position, at least -9999."""

    token_id: int
    logprob: float
    likeliest: list[tuple[int, float]]  # (token id, logprob), in descending order
    rank: int | None = None  # of a prompt's token among all ids: 1 is the likeliest


@dataclass(frozen=True)
class GenerationResult:
    """A generation that finished, or that an error ended."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None  # None: an error ended it
    seed: int
    prompt_token_ids: list[int]
    stats: GenerationStats
    token_probs: list[float | None] = field(default_factory=list)  # of token_ids, as in Chunk
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, where SamplingParams asks for them
    # Of prompt_token_ids, where SamplingParams asks for them; the first token has none.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"stats": self.stats.as_dict()}
