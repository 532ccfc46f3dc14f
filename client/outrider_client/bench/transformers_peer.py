"""The same two models in this process under transformers' own `generate`, for comparison.

Only this module of the client imports torch, and only `--compare transformers` imports it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from outrider.engine.models.loader import ModelOptions, ModelRefusedError, load_plain
from outrider_client.bench.metrics import Timeline
from outrider_client.bench.samples import Cell, Settings
from outrider_client.errors import InvalidRequestError

_SETTLE_S = 0.05  # the services' OpenMP threads spin for some milliseconds after their work


@dataclass(frozen=True)
class PeerOptions:
    """What the peer runs; most are fields of a service's ModelInfo."""

    target_model: str
    draft_model: str
    dtype: str
    device: str
    context_length: int
    eos_token_ids: tuple[int, ...]
    threads: int
    quantize: tuple[str | None, str | None] = (None, None)  # of target and draft


def load_peer(options: PeerOptions, settings: Settings) -> TransformersPeer:
    """Load both models; raises InvalidRequestError when one cannot be loaded here."""
    try:
        return TransformersPeer(options, settings)
    except ModelRefusedError as error:
        raise InvalidRequestError(f"--compare transformers loads the services' models here: {error}") from error


class TransformersPeer:
    """Generates texts with transformers.

    To ignore the end of sequence, the model gets no such id, which costs less than masking it. Filters and processors
    are those of the settings, as far as transformers has them.
    """

    def __init__(self, options: PeerOptions, settings: Settings):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(options.threads)
        self._options, self._settings = options, settings
        self._target, self._draft = (
            load_plain(ModelOptions(name, dtype=options.dtype, device=options.device, quantize=quantize))
            for name, quantize in zip((options.target_model, options.draft_model), options.quantize, strict=True)
        )
        self._target.generation_config = transformers.GenerationConfig()  # none of the checkpoint's own defaults
        self._draft_configs: dict[Cell, transformers.GenerationConfig] = {}

    def prepare(self) -> None:
        time.sleep(_SETTLE_S)

    def generate(self, prompt_ids: Sequence[int], cell: Cell, seed: int) -> tuple[Timeline, None]:
        return self.generate_batch([prompt_ids], cell, seed)[0], None

    @torch.inference_mode()
    def generate_batch(self, prompts: Sequence[Sequence[int]], cell: Cell, seed: int) -> list[Timeline]:
        """Generate texts of one length together; prompts are padded on the left."""
        assistant = None
        if cell.method != "transformers":
            self._draft.generation_config = self._draft_configs.setdefault(cell, draft_config(cell))
            assistant = self._draft
        torch.manual_seed(seed)
        arrivals = _Arrivals(len(prompts))
        input_ids, mask = self._padded(prompts)
        self._target.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=mask,
            generation_config=self._config(cell, input_ids.shape[1]),
            assistant_model=assistant,
            streamer=arrivals,
        )
        return [arrivals.timeline() for _ in prompts]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, both [prompts, longest prompt]."""
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return input_ids.to(self._target.device), mask.to(self._target.device)

    def _config(self, cell: Cell, prompt_length: int) -> transformers.GenerationConfig:
        sampling = self._settings.sampling
        assert sampling.max_new_tokens is not None
        asked, biases = sampling.distribution, dict(sampling.distribution.logit_bias)
        filters = {"top_k": asked.top_k, "top_p": asked.top_p, "min_p": asked.min_p or None}
        return transformers.GenerationConfig(
            do_sample=bool(cell.temperature),
            max_new_tokens=min(sampling.max_new_tokens, self._options.context_length - prompt_length),
            min_new_tokens=asked.min_tokens or None,
            eos_token_id=None if sampling.ignore_eos else list(self._options.eos_token_ids) or None,
            pad_token_id=0,
            repetition_penalty=asked.repetition_penalty,
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
            bad_words_ids=[list(word) for word in asked.bad_words] or None,
            sequence_bias=[[[token_id], bias] for token_id, bias in biases.items()] or None,
            **({"temperature": cell.temperature, **filters} if cell.temperature else {}),
        )


def draft_config(cell: Cell) -> transformers.GenerationConfig:
    """Return the config by which assisted generation follows the cell's method; transformers reads it from the draft.

    `transformers-assisted` proposes K tokens in each round. `transformers-dynamic` is transformers' default: up to 20
    tokens, ended by the first below a confidence threshold. `transformers-heuristic` is its schedule of that name: two
    more after a round that was accepted in full, else one less, kept from text to text.
    """
    if cell.method == "transformers-assisted":
        return transformers.GenerationConfig(
            num_assistant_tokens=cell.num_speculative_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
    if cell.method == "transformers-heuristic":
        return transformers.GenerationConfig(
            num_assistant_tokens=5, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.0
        )
    return transformers.GenerationConfig()


class _Arrivals(BaseStreamer):
    """Notes when `generate` delivers tokens; the first delivery is the prompt."""

    def __init__(self, batch_size: int):
        self._batch_size, self._begun_at = batch_size, time.perf_counter()
        self._arrivals_s: list[float] = []
        self._num_tokens: list[int] = []
        self._has_prompt = False
        self._ended_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._arrivals_s.append(time.perf_counter() - self._begun_at)
            self._num_tokens.append(value.numel() // self._batch_size)
        self._has_prompt = True

    def end(self) -> None:
        self._ended_s = time.perf_counter() - self._begun_at

    def timeline(self) -> Timeline:
        return Timeline(list(self._arrivals_s), list(self._num_tokens), self._ended_s)
