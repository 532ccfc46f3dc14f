"""Runs a model with Llama's layers by compiled code; see kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from outrider.engine.backends.batch import Batch, Feed
from outrider.engine.backends.compiled import drafting, kernels
from outrider.engine.backends.compiled.cache import PanelCache, PanelShape
from outrider.engine.backends.compiled.drafting import Sampling
from outrider.engine.backends.compiled.kernels import Caches, Scratch, Sizes, Weights
from outrider.engine.backends.compiled.memory import Arena, aligned_empty, aligned_zeros
from outrider.engine.backends.compiled.panels import BFLOAT16, FLOAT16, FLOAT32, attention_width
from outrider.engine.backends.compiled.products import StoredMatrix
from outrider.engine.backends.compiled.storage import LANES, PANEL
from outrider.engine.backends.compiled.team import Team
from outrider.engine.backends.llama import why_not as why_not_llama
from outrider.engine.models.matrix import Matrix, TensorMatrix
from outrider.engine.models.spec import DecoderSpec, DecoderWeights, Linear
from outrider.sampling.draws import MIN_SUPPORT_PROB, Draft, Draws, drafts_of

_NUM_TOKENS, _NUM_POSITIONS = 64, 1024  # that there is memory for at first
_NO_WINDOW = np.iinfo(np.int64).max
CACHE_TYPES: dict[torch.dtype, np.dtype] = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


def why_not(spec: DecoderSpec) -> str | None:
    """Return why `CompiledLlamaRunner` cannot run the model."""
    reason = why_not_llama(spec)
    if reason is None and spec.dtype != torch.float32:
        return "it takes float32"
    if reason is None and spec.kv_shape and spec.kv_shape.head_dim % LANES:
        return f"it takes heads of multiples of {LANES}, not of {spec.kv_shape.head_dim}"
    return reason


class CompiledLlamaRunner:
    """Holds the weights in a form of its own, and runs passes on a team of threads. See Runner."""

    device = torch.device("cpu")

    def __init__(self, spec: DecoderSpec, num_threads: int = 1, kv_dtype: torch.dtype = torch.float32):
        """Read the numbers of a model to which `why_not` has no objection; keep caches in float32 or 16 bits."""
        weights, entries = spec.weights, spec.kv_shape
        assert weights
        assert weights.rotary
        assert entries
        self._sizes = Sizes(
            num_layers=len(weights.layers),
            num_query_heads=spec.num_query_heads,
            num_kv_heads=entries.num_kv_heads,
            head_dim=entries.head_dim,
            feed_forward=weights.layers[0].down.matrices[0].shape[1],
            sliding_windows=np.array([it.visible.sliding_window or _NO_WINDOW for it in weights.layers], np.int64),
            scaling=weights.layers[0].scaling,
            eps=weights.norm.eps,
        )
        width, cache_type = attention_width(entries.head_dim), CACHE_TYPES[kv_dtype]
        self._cache_shape = PanelShape(len(weights.layers), entries.num_kv_heads, entries.head_dim, width, cache_type)
        self._rotary, self._team = weights.rotary, Team(num_threads)
        self._vocab_size = weights.head_layer.matrices[0].shape[0]  # as many as a product writes
        self._arena = Arena()
        self._matrices: list[StoredMatrix] = []  # which descriptors point to
        self._stored: dict[Matrix, StoredMatrix] = {}  # of those that take no memory themselves
        self._weights = self._weights_of(spec, weights)
        self._scratch = self._scratch_for(_NUM_TOKENS, _NUM_POSITIONS)

    def product_of(self, matrix: Matrix) -> StoredMatrix:
        """Return what multiplies with a matrix; it is read and stored when it is first asked for."""
        found = self._stored.get(matrix)
        if found is None:
            found = StoredMatrix(matrix, self._arena)
            self._matrices.append(found)
            if not isinstance(matrix, TensorMatrix):
                self._stored[matrix] = found
        return found

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Formats of the matrices, most bytes first."""
        sizes = Counter[str]()
        for matrix in self._matrices:
            sizes[matrix.kind] += matrix.num_bytes
        return tuple(name for name, _ in sizes.most_common())

    def new_cache(self) -> PanelCache:
        """See Runner."""
        return PanelCache(self._cache_shape)

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        batch, caches = self._batch_of(feeds)
        logits = aligned_empty((len(batch.rows), self._vocab_size), np.float32)
        self._team.run(kernels.forward, batch, caches, self._sizes, self._weights, self._scratch, logits)
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids))
        return torch.from_numpy(logits)

    def can_draft(self, sizes: Sequence[int], draws: Draws) -> bool:
        """See DraftingRunner."""
        return True

    def prepare_drafting(self) -> None:
        """See DraftingRunner: the code is compiled when drafts of one kind are first made."""

    def draft(self, feeds: Sequence[Feed], draws: Draws) -> list[Draft | None]:
        """See DraftingRunner."""
        num_draws = len(draws.uniforms)
        sampling = Sampling(
            draws.vocab_sizes,
            draws.temperatures,
            (draws.top_ks, draws.top_ps, draws.min_ps),
            MIN_SUPPORT_PROB,
            draws.max_supports,
            draws.uniforms,
            draws.noises,
            draws.num_others,
        )
        batch, caches = self._batch_of(feeds, num_draws - 1)
        logits, drawn = aligned_empty((len(feeds), self._vocab_size), np.float32), np.empty(len(feeds), np.int64)
        model = self._sizes, self._weights, self._scratch
        parts = self._team.run(drafting.draft, batch, caches, *model, sampling, logits, drawn)
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
        kind = np.empty(0, self._cache_shape.dtype)
        return Batch.of(feeds), Caches(numbers[: len(feeds)], numbers[len(feeds) :], kind)

    def _make_room(self, num_tokens: int, longest: int) -> None:
        if longest > len(self._weights.cosines):
            cosines, sines = self._angles_up_to(max(longest, 2 * len(self._weights.cosines)))
            self._weights = self._weights._replace(cosines=cosines, sines=sines)
        has_tokens, has_positions = len(self._scratch.mixed), self._scratch.scores.shape[2]
        if num_tokens > has_tokens or longest > has_positions:
            self._scratch = self._scratch_for(max(num_tokens, has_tokens), max(longest, has_positions))

    def _scratch_for(self, num_tokens: int, longest: int) -> Scratch:
        weights, sizes = self._weights, self._sizes

        def memory(num_columns: int) -> np.ndarray:
            return aligned_zeros((num_tokens, num_columns), np.float32)

        return Scratch(
            hidden=memory(weights.norms.shape[1]),
            normed=memory(weights.norms.shape[1]),
            projected=memory(weights.biases.shape[1]),
            mixed=memory(sizes.num_query_heads * sizes.head_dim),
            gates=memory(2 * sizes.feed_forward),
            scores=aligned_zeros((self._team.num_threads, kernels.CHUNK, -(-longest // PANEL) * PANEL), np.float32),
        )

    def _angles_up_to(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines `[length, D / 2]` of rotary embedding."""
        cosines, sines = self._rotary.angles(length)
        return cosines.numpy(), sines.numpy()

    def _weights_of(self, spec: DecoderSpec, weights: DecoderWeights) -> Weights:
        """Return the model's numbers as the kernels read them."""
        layers, (cosines, sines) = weights.layers, self._angles_up_to(_NUM_POSITIONS)
        norms = [norm for layer in layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
        is_tied = weights.head_layer.matrices == weights.embedding_layer.matrices
        embedding = self._descriptor(weights.embedding_layer)
        return Weights(
            embedding=embedding,
            norms=torch.stack([norm.weight for norm in [*norms, weights.norm]]).numpy(),
            biases=np.stack([_bias_of(layer.query_key_value) for layer in layers]),
            query_key_value=np.stack([self._taken(spec, layer.query_key_value) for layer in layers]),
            output=np.stack([self._taken(spec, layer.output)[0] for layer in layers]),
            gate_up=np.stack([self._taken(spec, layer.up) for layer in layers]),
            down=np.stack([self._taken(spec, layer.down)[0] for layer in layers]),
            head=embedding if is_tied else self._descriptor(weights.head_layer),
            cosines=cosines,
            sines=sines,
        )

    def _descriptor(self, product: Linear) -> np.ndarray:
        (matrix,) = product.matrices
        return np.array(self.product_of(matrix).descriptor)

    def _taken(self, spec: DecoderSpec, product: Linear) -> np.ndarray:
        """Return descriptors `[matrices, 7]`; the model lets go of weights in memory that can be read again."""
        matrices = product.matrices
        descriptors = np.array([self.product_of(matrix).descriptor for matrix in matrices])
        if spec.reread and isinstance(matrices[0], TensorMatrix):
            product.release()
        return descriptors


def _bias_of(projection: Linear) -> np.ndarray:
    """Return the bias of a product, 0 where there is none."""
    if projection.bias is not None:
        return projection.bias.numpy()
    return np.zeros(sum(matrix.shape[0] for matrix in projection.matrices), np.float32)
