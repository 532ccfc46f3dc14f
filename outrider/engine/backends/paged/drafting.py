"""Drafts several tokens per call on paged caches: each pass feeds what the one before drew, and the host waits once.

A step is a pass of one token per sequence, the draw, and the inputs of the next step: the drawn token, its position and
its slot. A recorded graph holds all of it, so a round of drafts is a few replays and one copy to the host. The blocks
of all steps are reserved first. The numbers that all steps draw with lie in one buffer, which a counter on the device
indexes.

Shapes: n draws, N sequences (of a bucket, where a graph is meant), S tokens of a support at most, M other tokens, V
vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.engine.backends.batch import Feed
from outrider.engine.backends.paged.graphs import GraphKey, Replay
from outrider.engine.backends.paged.runner import PagedRunner, StagedInputs
from outrider.engine.backends.runner import MOST_DRAWS
from outrider.sampling.draws import MIN_SUPPORT_PROB, MOST_OTHERS, MOST_SUPPORT, Draft, Draws
from outrider.sampling.readers import table_reader_for
from outrider.sampling.readers.tables import RowOptions, drafts_in


@dataclass(frozen=True)
class _Ahead:
    """A cache as it will be when a step begins."""

    length: int
    block_table: np.ndarray


class _StagedNumbers:
    """The numbers that all steps draw with: a pinned buffer of float64, and its copy on the device."""

    def __init__(self, num_sequences: int, device: torch.device):
        self._shapes = {
            "vocab_sizes": (num_sequences,),
            "max_supports": (num_sequences,),
            "temperatures": (num_sequences,),
            "uniforms": (MOST_DRAWS, num_sequences),
            "noises": (MOST_DRAWS, num_sequences, 4),
            "step": (1,),
        }
        num_numbers = sum(map(_padded_size, self._shapes.values()))
        self._host = torch.zeros(num_numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(num_numbers, dtype=torch.float64, device=device)
        self._arrays = {name: part.numpy() for name, part in self._parts(self._host).items()}
        self._tensors = self._parts(self._device)

    def _parts(self, storage: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = zip(self._shapes.items(), storage.split(list(map(_padded_size, self._shapes.values()))), strict=True)
        return {name: part[: int(np.prod(shape))].view(shape) for (name, shape), part in parts}

    def send(self, draws: Draws) -> None:
        """Write the numbers of `draws` and copy them; the next step is the first."""
        num_draws, num_sequences = draws.uniforms.shape
        for name in ("vocab_sizes", "max_supports", "temperatures"):
            self._arrays[name][:num_sequences] = getattr(draws, name)
        for name in ("uniforms", "noises"):
            self._arrays[name][:num_draws, :num_sequences] = getattr(draws, name)
        self._device.copy_(self._host, non_blocking=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return an array on the device; always the same tensor."""
        return self._tensors[name]

    def options(self) -> RowOptions:
        """Return the numbers of the current step."""
        step = self["step"].long()
        uniforms, noises = (self[name].index_select(0, step)[0] for name in ("uniforms", "noises"))
        return RowOptions(self["temperatures"], uniforms, noises)


def _padded_size(shape: tuple[int, ...]) -> int:
    """Return the size of an array, padded so that the next one begins at a multiple of 16 bytes."""
    size = int(np.prod(shape))
    return size + size % 2


@dataclass(frozen=True)
class _Chain:
    """The steps of a bucket of sequences."""

    inputs: StagedInputs
    numbers: _StagedNumbers
    drawn: torch.Tensor  # [MOST_DRAWS, N, numbers of a draft] float64, on the device
    drawn_on_host: torch.Tensor
    replay: Replay


@dataclass(frozen=True)
class _FirstPass:
    """A pass of several tokens before a chain, and the chain's first draw."""

    inputs: StagedInputs
    replay: Replay


class DraftingPagedRunner(PagedRunner):
    """A PagedRunner that also draws tokens itself. See runner.DraftingRunner."""

    def __init__(self, *arguments, **settings):
        """See PagedRunner; `graphs` is required."""
        super().__init__(*arguments, **settings)
        assert self._graph_runner
        self._capture: Callable[[Callable[[], None]], Replay] = self._graph_runner.capture
        self._chains: dict[int, _Chain] = {}  # by number of sequences
        self._first_passes: dict[GraphKey, _FirstPass] = {}

    def can_draft(self, sizes: Sequence[int], draws: Draws) -> bool:
        fits = len(draws.uniforms) <= MOST_DRAWS and draws.num_others <= MOST_OTHERS and not draws.have_filters
        return fits and draws.max_supports.max() <= MOST_SUPPORT and self._buckets.key_for(sizes) is not None

    @torch.inference_mode()
    def prepare_drafting(self) -> None:
        with self._on_device():
            for key in self._buckets.all():
                if key.tokens_per_sequence == 1:
                    self._chain_of(key.num_sequences)
                else:
                    self._first_pass_of(key)

    @torch.inference_mode()
    def draft(self, feeds: Sequence[Feed], draws: Draws) -> list[Draft | None]:
        num_more = len(draws.uniforms) - 1
        with self._growing(feeds, num_more) as slots:
            drawn = self._draw_all(feeds, slots, draws)
        table = drawn[:, : len(feeds)].flatten(0, 1).numpy()
        drafts = drafts_in(table, MOST_OTHERS, draws.noises[..., 0].ravel())
        return [draft and draft.with_others(draws.num_others) for draft in drafts]

    def _draw_all(self, feeds: Sequence[Feed], slots: Sequence[np.ndarray], draws: Draws) -> torch.Tensor:
        """Run all steps; return what they drew, `[n, N, numbers of a draft]`, on the host once the device is done."""
        key = self._buckets.key_for([len(feed.token_ids) for feed in feeds])
        assert key
        num_draws, chain = len(draws.uniforms), self._chain_of(key.num_sequences)
        first = None if key.tokens_per_sequence == 1 else self._first_pass_of(key)  # recording it counts steps
        chain.numbers.send(draws)
        if first is None:
            chain.inputs.send(feeds, [its_slots[:1] for its_slots in slots])
            num_left = num_draws
        else:
            sizes = [len(feed.token_ids) for feed in feeds]
            first.inputs.send(feeds, [its_slots[:size] for its_slots, size in zip(slots, sizes, strict=True)])
            if num_draws > 1:
                ahead = [
                    Feed(_Ahead(feed.cache.length + size, feed.cache.block_table), [0], 1)
                    for feed, size in zip(feeds, sizes, strict=True)
                ]
                next_slots = [its_slots[size : size + 1] for its_slots, size in zip(slots, sizes, strict=True)]
                chain.inputs.send(ahead, next_slots)
            first.replay()
            num_left = num_draws - 1
        for _ in range(num_left):
            chain.replay()
        host = chain.drawn_on_host[:num_draws]
        return host.copy_(chain.drawn[:num_draws], non_blocking=True)

    def _chain_of(self, num_sequences: int) -> _Chain:
        """Return the chain, recorded on first use."""
        if num_sequences not in self._chains:
            inputs = self._inputs(num_sequences, num_sequences)
            inputs.send([], [])
            numbers = _StagedNumbers(num_sequences, self.device)
            every_row = self._every_row[:num_sequences]

            def step() -> torch.Tensor:
                return self._draw(self._call(inputs, every_row, 1, self._context_length), inputs, numbers)

            drawn = (found := step()).new_zeros(MOST_DRAWS, *found.shape)

            def run() -> None:
                self._end_step(drawn, step(), numbers)
                self._move_on(inputs)

            replay = self._capture(run)
            host = torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=self.device.type == "cuda")
            self._chains[num_sequences] = _Chain(inputs, numbers, drawn, host, replay)
        return self._chains[num_sequences]

    def _first_pass_of(self, key: GraphKey) -> _FirstPass:
        """Return the first pass, recorded on first use."""
        if key not in self._first_passes:
            chain, inputs = self._chain_of(key.num_sequences), self._inputs(key.num_sequences, key.num_tokens)
            inputs.send([], [])
            rows = inputs["rows"][: key.num_sequences]

            def run() -> None:
                logits = self._call(inputs, rows, key.tokens_per_sequence, self._context_length)
                self._end_step(chain.drawn, self._draw(logits, chain.inputs, chain.numbers), chain.numbers)

            self._first_passes[key] = _FirstPass(inputs, self._capture(run))
        return self._first_passes[key]

    @staticmethod
    def _draw(logits: torch.Tensor, inputs: StagedInputs, numbers: _StagedNumbers) -> torch.Tensor:
        """Draw from `logits` `[N, V]` into the next step's `inputs`; return `[N, numbers of a draft]`."""
        read, sizes, limits = table_reader_for(logits).draft_table, numbers["vocab_sizes"], numbers["max_supports"]
        table, token_ids = read(logits, sizes, numbers.options(), limits, MIN_SUPPORT_PROB, MOST_SUPPORT, MOST_OTHERS)
        inputs["token_ids"].copy_(token_ids)
        return table

    @staticmethod
    def _end_step(drawn: torch.Tensor, found: torch.Tensor, numbers: _StagedNumbers) -> None:
        """Keep what a step drew, and count it."""
        drawn.index_copy_(0, numbers["step"].long(), found[None])
        numbers["step"].add_(1).remainder_(MOST_DRAWS)  # recording runs it more often than MOST_DRAWS

    def _move_on(self, inputs: StagedInputs) -> None:
        """Advance the inputs to the next position."""
        positions, block_size = inputs["positions"].add_(1), self._pool.block_size
        inputs["seqused_k"].add_(1)
        table = inputs["block_table"]
        index = (positions // block_size).clamp_(max=table.shape[1] - 1)
        blocks = table.gather(1, index[:, None])[:, 0].long()
        inputs["slots"].copy_(blocks * block_size + positions % block_size)
