"""Runs forward passes over packed sequences; the only module that calls the model.

Shapes: T new tokens in the batch, N sequences, R rows read, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from outrider.engine.backends.attention import AttentionBatch, PackedBatch
from outrider.engine.backends.batch import Batch, Feed
from outrider.engine.kv_cache import Cache, SequenceCache
from outrider.engine.models.configuration import context_length_of
from outrider.engine.models.visibility import LayerVisibility, Visible
from outrider.sampling.draws import Draft, Draws
from outrider.sampling.transfers import wait_for

MOST_DRAWS = 32  # of a DraftingRunner in one call


class Runner(Protocol):
    """Feeds tokens to a causal language model and returns rows of logits."""

    def new_cache(self) -> Cache:
        """Return an empty cache for one sequence."""

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Feed all of `feeds` in one pass, write their caches, and return the rows they ask for, in order: `[R, V]`.

        The rows are there when it returns, so that the time it took is the pass's own. When the model raises, no cache
        has grown.
        """

    @property
    def device(self) -> torch.device:
        """Where the model is."""


@runtime_checkable
class DraftingRunner(Runner, Protocol):
    """A runner that also draws tokens itself, several in one call."""

    def can_draft(self, sizes: Sequence[int], sampling: Draws) -> bool:
        """Return whether `draft` can be called for feeds of so many tokens."""

    def prepare_drafting(self) -> None:
        """Record or compile now what the first drafts would otherwise wait for."""

    def draft(self, feeds: Sequence[Feed], sampling: Draws) -> list[Draft | None]:
        """Feed all of `feeds`, whose rows are one each, draw a token for each, feed these, and so on.

        Returns:
            The n · N drafts of n draws for N feeds, draw by draw; None for a row that is not finite, after which its
            feed's drafts mean nothing. The caches hold all but the last draw.
        """


@runtime_checkable
class DeviceRunner(Runner, Protocol):
    """A runner whose device computes rows while the host goes on."""

    def forward_with(self, feeds: Sequence[Feed], then: Callable[[torch.Tensor], None]) -> None:
        """Like `forward`, but call `then` with the rows once the pass is queued on the device.

        Work that `then` queues runs after the pass; all of it is done when this returns.
        """


class ForwardPass(Protocol):
    """One forward pass of a model over a packed row of T new tokens."""

    device: torch.device

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, packed: AttentionBatch
    ) -> torch.Tensor:
        """Write the caches of `packed` and return the logits `[R, V]` of some rows.

        Args:
            token_ids, positions: `[T] int64`.
            rows: `[R] int64`, indices into the packed row.
        """


class TransformersForward:
    """The forward pass as transformers has it: for every family, and the reference for faster ones."""

    def __init__(self, model: PreTrainedModel):
        """Learn from a text of two tokens what each layer of `model` sees, which has packed attention already.

        Raises:
            TypeError: the model asks for what packed attention does not do.
            ModelRefusedError: its configuration says no context length.
        """
        self._model = model
        self.device: torch.device = next(model.parameters()).device
        self._visibility, cache = LayerVisibility(context_length_of(model.config)), SequenceCache()
        with torch.inference_mode():
            two = torch.arange(2, device=self.device)
            self(two, two, two, PackedBatch([(slice(0, 2), cache)]))
        self.num_layers, self.kv_shape = cache.num_layers, cache.kv_shape  # of caches

    @property
    def visible(self) -> list[Visible]:
        """What positions see, layer by layer."""
        return self._visibility.layers

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, packed: AttentionBatch
    ) -> torch.Tensor:
        return self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            packed=packed,
            visibility=self._visibility,
        ).logits[0]


class ModelRunner:
    """Runs a forward pass on caches that grow, one buffer for each sequence and layer. See Runner."""

    def __init__(self, forward_pass: ForwardPass):
        self._forward_pass = forward_pass

    def new_cache(self) -> SequenceCache:
        return SequenceCache()

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        batch = Batch.of(feeds)
        ids, positions, rows = (
            torch.from_numpy(part).to(self.device) for part in (batch.token_ids, batch.positions, batch.rows)
        )
        bounds = pairwise(batch.starts.tolist())
        segments = [(slice(*its), feed.cache) for its, feed in zip(bounds, feeds, strict=True)]
        logits = self._forward_pass(ids, positions, rows, PackedBatch(segments))
        wait_for(self.device)
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids))
        return logits

    @property
    def device(self) -> torch.device:
        return self._forward_pass.device
