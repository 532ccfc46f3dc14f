"""Runs a Llama-family model by compiled code; see kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from outrider.engine.backends.compiled import drafting, kernels, tiles
from outrider.engine.backends.compiled.cache import PanelCache
from outrider.engine.backends.compiled.kernels import PANEL, Batch, Scratch, Sizes, Weights
from outrider.engine.backends.compiled.memory import aligned_empty, aligned_stack, aligned_zeros
from outrider.engine.backends.llama import LlamaForward, head_dim_of, sliding_window
from outrider.engine.backends.runner import Feed
from outrider.sampling.probs import MIN_SUPPORT_PROB, Draft, PlainSampling, drafts_of

TILES_FROM = 30_000_000  # numbers; a pass of fewer takes a few milliseconds, waking the tiles up to 0.3

_NUM_TOKENS, _NUM_POSITIONS = 64, 1024  # that there is room for at first


class CompiledLlamaRunner:
    """Holds its own copy of the weights, and runs passes on one thread. See Runner."""

    device = torch.device("cpu")

    def __init__(self, model: PreTrainedModel, tiles_from: int = TILES_FROM):
        """Copy the numbers of `model`, which must be one that `can_run` accepts.

        Args:
            tiles_from: how many numbers the matrices of a model's products have at least for which `tiles` pay.
        """
        config: Any = model.config
        decoder: Any = model.model
        head_dim = head_dim_of(config)
        windows = [sliding_window(layer.self_attn, config) or 0 for layer in decoder.layers]
        self._sizes = Sizes(
            num_layers=len(decoder.layers),
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            feed_forward=config.intermediate_size,
            sliding_windows=np.array(windows, dtype=np.int64),
            scaling=decoder.layers[0].self_attn.scaling,
            eps=config.rms_norm_eps,
        )
        self._rotary = decoder.rotary_emb
        self._weights = _weights_of(model, *self._angles_up_to(_NUM_POSITIONS), tiles_from)
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        self._width = kernels.attention_width(head_dim)
        self._scratch = self._scratch_for(_NUM_TOKENS, _NUM_POSITIONS)

    @staticmethod
    def can_run(model: PreTrainedModel) -> bool:
        """Return whether the model is float32, on a CPU, of the family, and cut into heads that panels fit."""
        if not LlamaForward.can_run(model) or model.dtype != torch.float32 or model.device.type != "cpu":
            return False
        return head_dim_of(model.config) % kernels.LANES == 0

    def new_cache(self) -> PanelCache:
        """See Runner."""
        sizes = self._sizes
        return PanelCache(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, self._width)

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        batch = self._batch_of(feeds)
        num_rows = len(batch.rows)
        room = aligned_empty((tiles.num_rows_written(num_rows), self._weights.head.shape[0] * PANEL), np.float32)
        kernels.forward(batch, self._sizes, self._weights, self._scratch, room)
        logits = room[:num_rows]
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids))
        rows = torch.from_numpy(logits)
        return rows if logits.shape[1] == self._vocab_size else rows[:, : self._vocab_size].contiguous()

    def can_draft(self, sizes: Sequence[int], sampling: PlainSampling) -> bool:
        """See DraftingRunner."""
        return True

    def prepare_drafting(self) -> None:
        """See DraftingRunner: the code is compiled when drafts of one kind are first made."""

    def draft(self, feeds: Sequence[Feed], sampling: PlainSampling) -> list[Draft | None]:
        """See DraftingRunner."""
        num_draws = len(sampling.uniforms)
        parts = drafting.draft(
            self._batch_of(feeds, num_draws - 1),
            self._sizes,
            self._weights,
            self._scratch,
            sampling.vocab_sizes,
            sampling.temperatures,
            MIN_SUPPORT_PROB,
            sampling.max_supports,
            sampling.uniforms,
            sampling.noises,
            sampling.num_others,
        )
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids) + num_draws - 1)
        return drafts_of(parts, sampling.noises[..., 0].ravel())

    def _batch_of(self, feeds: Sequence[Feed], num_more: int = 0) -> Batch:
        """Return the arrays for `feeds`, with room for them and for `num_more` tokens behind each."""
        lengths = [feed.cache.length + len(feed.token_ids) + num_more for feed in feeds]
        self._make_room(sum(len(feed.token_ids) for feed in feeds), max(lengths))
        for feed, length in zip(feeds, lengths, strict=True):
            feed.cache.reserve(length)
        return _batch_of(feeds)

    def _make_room(self, num_tokens: int, longest: int) -> None:
        if longest > len(self._weights.cosines):
            cosines, sines = self._angles_up_to(max(longest, 2 * len(self._weights.cosines)))
            self._weights = self._weights._replace(cosines=cosines, sines=sines)
        has_tokens, has_positions = len(self._scratch.mixed), self._scratch.scores.shape[1]
        if num_tokens > has_tokens or longest > has_positions:
            self._scratch = self._scratch_for(max(num_tokens, has_tokens), max(longest, has_positions))

    def _scratch_for(self, num_tokens: int, longest: int) -> Scratch:
        weights, sizes = self._weights, self._sizes
        num_rows = tiles.num_rows_written(num_tokens)

        def room(num_columns: int) -> np.ndarray:
            return aligned_zeros((num_rows, _padded(num_columns)), np.float32)

        hidden_size, mixed_size = weights.norms.shape[1], sizes.num_query_heads * sizes.head_dim
        most_inputs, has_tiles = max(hidden_size, mixed_size, sizes.feed_forward), weights.head.ndim == 4
        return Scratch(
            hidden=room(hidden_size),
            normed=room(hidden_size),
            projected=room(weights.biases.shape[1]),
            mixed=aligned_zeros((num_tokens, mixed_size), np.float32),
            gates=room(2 * sizes.feed_forward),
            scores=aligned_zeros((kernels.CHUNK, _padded(longest)), np.float32),
            parts=aligned_zeros((tiles.parts_room(num_tokens, most_inputs) if has_tiles else 0,), np.uint16),
        )

    def _angles_up_to(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines `[length, D / 2]` of rotary embedding."""
        parts = self._rotary(torch.empty(0), torch.arange(length)[None])
        cosines, sines = (part[0, :, : part.shape[-1] // 2].contiguous().numpy() for part in parts)
        return cosines, sines


def _batch_of(feeds: Sequence[Feed]) -> Batch:
    token_ids: list[int] = []
    starts = [0]
    rows: list[int] = []
    caches: list[tuple[int, int, int]] = []
    for feed in feeds:
        cache = feed.cache
        token_ids.extend(feed.token_ids)
        starts.append(len(token_ids))
        rows.extend(range(len(token_ids) - feed.num_rows, len(token_ids)))
        caches.append((cache.length, cache.address, cache.capacity))
    parts = [token_ids, starts, *zip(*caches, strict=True), rows]
    numbers = np.array(list(chain.from_iterable(parts)), dtype=np.int64)  # one array: each costs as much as its numbers
    ends = list(accumulate(map(len, parts)))
    return Batch(*(numbers[start:end] for start, end in pairwise([0, *ends])))


def _weights_of(model: PreTrainedModel, cosines: np.ndarray, sines: np.ndarray, tiles_from: int) -> Weights:
    """Return the model's numbers as the kernels read them."""
    decoder: Any = model.model
    layers = list(decoder.layers)
    embedding = decoder.embed_tokens.weight.detach()
    head = model.get_output_embeddings().weight.detach()
    projections = [[getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")] for layer in layers]
    matrices = {
        "query_key_value": [torch.cat([part.weight.detach() for part in parts]) for parts in projections],
        "output": [layer.self_attn.o_proj.weight.detach() for layer in layers],
        "gate_up": [torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).detach() for layer in layers],
        "down": [layer.mlp.down_proj.weight.detach() for layer in layers],
    }
    products = [head, *chain.from_iterable(matrices.values())]
    store = _storage_for([embedding, *products])
    panels_of = _layout_for(store(head).dtype, products, tiles_from)
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return Weights(
        embedding=store(embedding),
        norms=torch.stack([norm.weight.detach() for norm in [*norms, decoder.norm]]).numpy().copy(),
        biases=np.stack([_bias_of(parts) for parts in projections]),
        head=aligned_stack([panels_of(store(head))])[0],
        cosines=cosines,
        sines=sines,
        **{name: aligned_stack([panels_of(store(matrix)) for matrix in group]) for name, group in matrices.items()},
    )


def _bias_of(parts: list[Any]) -> np.ndarray:
    """Return the joined bias of projections, 0 where there is none and behind them up to the panels' end."""
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias.detach() for part in parts]
    joined = torch.cat(biases).numpy()
    return np.pad(joined, (0, _padded(len(joined)) - len(joined)))


def _storage_for(matrices: Sequence[torch.Tensor]):
    """Return a function that stores a matrix: in 16 bits when these hold every number of all `matrices` exactly."""
    for half, tag in ((torch.bfloat16, kernels.BFLOAT16), (torch.float16, kernels.FLOAT16)):
        if all(torch.equal(matrix.to(half).float(), matrix) for matrix in matrices):
            return lambda matrix, half=half, tag=tag: matrix.to(half).view(torch.int16).numpy().view(tag)
    return lambda matrix: matrix.numpy().copy()


def _layout_for(storage: np.dtype, matrices: Sequence[torch.Tensor], tiles_from: int):
    """Return a function that puts a stored matrix `[O, I]` into panels, with zeros behind the last output."""
    fit_tiles = storage == kernels.BFLOAT16 and all(matrix.shape[1] % tiles.STEP == 0 for matrix in matrices)
    is_large = sum(matrix.numel() for matrix in matrices) >= tiles_from
    lay_out = tiles.tiles_of if fit_tiles and is_large and tiles.have_tiles() else _panels_of
    assert PANEL == tiles.WIDTH or lay_out is _panels_of
    return lambda matrix: lay_out(np.pad(matrix, ((0, _padded(len(matrix)) - len(matrix)), (0, 0))))


def _panels_of(matrix: np.ndarray) -> np.ndarray:
    """Return `matrix` `[O, I]` as panels `[O / PANEL, I, PANEL]`."""
    return np.ascontiguousarray(matrix.reshape(-1, PANEL, matrix.shape[1]).transpose(0, 2, 1))


def _padded(size: int) -> int:
    return -(-size // PANEL) * PANEL
