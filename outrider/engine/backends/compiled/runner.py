"""Runs a model with Llama's layers by compiled code; see kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from outrider.engine.backends.batch import Batch, Feed
from outrider.engine.backends.compiled import drafting, kernels
from outrider.engine.backends.compiled.cache import PanelCache
from outrider.engine.backends.compiled.kernels import Caches, Scratch, Sizes, Weights
from outrider.engine.backends.compiled.memory import aligned_empty, aligned_stack, aligned_zeros
from outrider.engine.backends.compiled.panels import BFLOAT16, FLOAT16, LANES, attention_width
from outrider.engine.backends.compiled.products import layout_for, padded
from outrider.engine.backends.llama import why_not as why_not_llama
from outrider.engine.models.spec import DecoderSpec, DecoderWeights, Linear
from outrider.sampling.draws import MIN_SUPPORT_PROB, Draft, Draws, drafts_of

_NUM_TOKENS, _NUM_POSITIONS = 64, 1024  # that there is memory for at first
_NO_WINDOW = np.iinfo(np.int64).max


def why_not(spec: DecoderSpec) -> str | None:
    """Return why `CompiledLlamaRunner` cannot run the model."""
    reason = why_not_llama(spec)
    if reason is None and spec.dtype != torch.float32:
        return "it takes float32"
    if reason is None and spec.kv_shape and spec.kv_shape.head_dim % LANES:
        return f"it takes heads of multiples of {LANES}, not of {spec.kv_shape.head_dim}"
    return reason


class CompiledLlamaRunner:
    """Holds its own copy of the weights, and runs passes on one thread. See Runner."""

    device = torch.device("cpu")

    def __init__(self, spec: DecoderSpec):
        """Copy the numbers of a model to which `why_not` has no objection."""
        weights, entries = spec.weights, spec.kv_shape
        assert weights
        assert weights.rotary
        assert entries
        layers, self._vocab_size = weights.layers, len(weights.head)
        self._sizes = Sizes(
            num_layers=len(layers),
            num_query_heads=spec.num_query_heads,
            num_kv_heads=entries.num_kv_heads,
            head_dim=entries.head_dim,
            feed_forward=layers[0].down.weight.shape[1],
            sliding_windows=np.array([layer.visible.sliding_window or _NO_WINDOW for layer in layers], dtype=np.int64),
            scaling=layers[0].scaling,
            eps=weights.norm.eps,
        )
        self._rotary = weights.rotary
        self._weights = _weights_of(weights, *self._angles_up_to(_NUM_POSITIONS))
        self._scratch = self._scratch_for(_NUM_TOKENS, _NUM_POSITIONS)

    def new_cache(self) -> PanelCache:
        """See Runner."""
        sizes = self._sizes
        return PanelCache(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, attention_width(sizes.head_dim))

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        batch, caches = self._batch_of(feeds)
        logits = aligned_empty((len(batch.rows), padded(self._vocab_size)), np.float32)
        kernels.forward(batch, caches, self._sizes, self._weights, self._scratch, logits)
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids))
        rows = torch.from_numpy(logits)
        return rows if logits.shape[1] == self._vocab_size else rows[:, : self._vocab_size].contiguous()

    def can_draft(self, sizes: Sequence[int], draws: Draws) -> bool:
        """See DraftingRunner."""
        return True

    def prepare_drafting(self) -> None:
        """See DraftingRunner: the code is compiled when drafts of one kind are first made."""

    def draft(self, feeds: Sequence[Feed], draws: Draws) -> list[Draft | None]:
        """See DraftingRunner."""
        num_draws = len(draws.uniforms)
        parts = drafting.draft(
            *self._batch_of(feeds, num_draws - 1),
            self._sizes,
            self._weights,
            self._scratch,
            draws.vocab_sizes,
            draws.temperatures,
            (draws.top_ks, draws.top_ps, draws.min_ps),
            MIN_SUPPORT_PROB,
            draws.max_supports,
            draws.uniforms,
            draws.noises,
            draws.num_others,
        )
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids) + num_draws - 1)
        return drafts_of(parts, draws.noises[..., 0].ravel())

    def _batch_of(self, feeds: Sequence[Feed], num_more: int = 0) -> tuple[Batch, Caches]:
        """Pack `feeds`, with memory for them and for `num_more` tokens behind each."""
        lengths = [feed.cache.length + len(feed.token_ids) + num_more for feed in feeds]
        self._make_room(sum(len(feed.token_ids) for feed in feeds), max(lengths))
        for feed, length in zip(feeds, lengths, strict=True):
            feed.cache.reserve(length)
        places = [feed.cache.address for feed in feeds] + [feed.cache.capacity for feed in feeds]
        numbers = np.array(places, dtype=np.int64)
        return Batch.of(feeds), Caches(numbers[: len(feeds)], numbers[len(feeds) :])

    def _make_room(self, num_tokens: int, longest: int) -> None:
        if longest > len(self._weights.cosines):
            cosines, sines = self._angles_up_to(max(longest, 2 * len(self._weights.cosines)))
            self._weights = self._weights._replace(cosines=cosines, sines=sines)
        has_tokens, has_positions = len(self._scratch.mixed), self._scratch.scores.shape[1]
        if num_tokens > has_tokens or longest > has_positions:
            self._scratch = self._scratch_for(max(num_tokens, has_tokens), max(longest, has_positions))

    def _scratch_for(self, num_tokens: int, longest: int) -> Scratch:
        weights, sizes = self._weights, self._sizes

        def memory(num_columns: int, num_rows: int = num_tokens) -> np.ndarray:
            return aligned_zeros((num_rows, padded(num_columns)), np.float32)

        hidden_size = weights.norms.shape[1]
        return Scratch(
            hidden=memory(hidden_size),
            normed=memory(hidden_size),
            projected=memory(weights.biases.shape[1]),
            mixed=aligned_zeros((num_tokens, sizes.num_query_heads * sizes.head_dim), np.float32),
            gates=memory(2 * sizes.feed_forward),
            scores=memory(longest, kernels.CHUNK),
        )

    def _angles_up_to(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines `[length, D / 2]` of rotary embedding."""
        cosines, sines = self._rotary.angles(length)
        return cosines.numpy(), sines.numpy()


def _weights_of(weights: DecoderWeights, cosines: np.ndarray, sines: np.ndarray) -> Weights:
    """Return the model's numbers as the kernels read them."""
    layers = weights.layers
    matrices = {
        "query_key_value": [layer.query_key_value.weight for layer in layers],
        "output": [layer.output.weight for layer in layers],
        "gate_up": [layer.up.weight for layer in layers],
        "down": [layer.down.weight for layer in layers],
    }
    products = [weights.head, *chain.from_iterable(matrices.values())]
    store = _storage_for([weights.embedding, *products])
    lay_out = layout_for(store(weights.head).dtype, [(len(matrix), matrix.shape[1]) for matrix in products])
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
    return Weights(
        embedding=store(weights.embedding),
        norms=torch.stack([norm.weight for norm in [*norms, weights.norm]]).numpy(),
        biases=np.stack([_bias_of(layer.query_key_value) for layer in layers]),
        head=aligned_stack([lay_out(store(weights.head))])[0],
        cosines=cosines,
        sines=sines,
        **{name: aligned_stack([lay_out(store(matrix)) for matrix in group]) for name, group in matrices.items()},
    )


def _bias_of(projection: Linear) -> np.ndarray:
    """Return the bias of a product, 0 where there is none and behind it up to the last column."""
    num_outputs, bias = len(projection.weight), projection.bias
    numbers = np.zeros(num_outputs, np.float32) if bias is None else bias.numpy()
    return np.pad(numbers, (0, padded(num_outputs) - num_outputs))


def _storage_for(matrices: Sequence[torch.Tensor]):
    """Return a function that stores a matrix: in 16 bits when these hold every number of all `matrices` exactly."""
    for half, tag in ((torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)):
        if all(torch.equal(matrix.to(half).float(), matrix) for matrix in matrices):
            return lambda matrix, half=half, tag=tag: matrix.to(half).view(torch.int16).numpy().view(tag)
    return lambda matrix: matrix.numpy().copy()
