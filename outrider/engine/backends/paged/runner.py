"""Runs forward passes on paged caches. Small passes are padded to buckets and replayed as CUDA graphs.

All inputs of a pass but weights and caches (token ids, positions, slots, lengths, block tables) are written into one
pinned buffer and go to the device in one copy.

Shapes: T tokens in the packed row, N sequences, B blocks that one sequence can have, R rows read, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from outrider.engine.backends.batch import Batch, Feed
from outrider.engine.backends.paged.attention import PagedBatch, VarlenAttention
from outrider.engine.backends.paged.cache import SCRATCH_BLOCK, BlockPool, PagedCache
from outrider.engine.backends.paged.graphs import Buckets, GraphKey, GraphRunner, Replay
from outrider.engine.backends.runner import ForwardPass
from outrider.sampling.transfers import wait_for

ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for pointers that are not aligned to it


class StagedInputs:
    """The inputs of passes of one size: a pinned buffer, its copy on the device, and the arrays in both."""

    def __init__(self, num_sequences: int, num_tokens: int, max_blocks: int, device: torch.device):
        long_sizes = {"token_ids": num_tokens, "positions": num_tokens, "slots": num_tokens, "rows": num_tokens}
        int_sizes = {
            "cu_seq_q": num_sequences + 1,
            "seqused_k": num_sequences,
            "block_table": num_sequences * max_blocks,
        }
        sizes = {name: (torch.int64, size) for name, size in long_sizes.items()}
        sizes |= {name: (torch.int32, size) for name, size in int_sizes.items()}
        num_bytes = sum(_padded_bytes(*kind_and_size) for kind_and_size in sizes.values())
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._arrays = {name: part.numpy() for name, part in _parts(self._host, sizes).items()}
        self._tensors = _parts(self._device, sizes)
        self._table_shape = (num_sequences, max_blocks)

    def send(self, feeds: Sequence[Feed], slots: Sequence[np.ndarray]) -> int:
        """Write the inputs for `feeds`, whose tokens go to `slots`, and copy them; return how many rows are read.

        The rest of the arrays is padding: tokens that write to the scratch block, and sequences that read only it.
        """
        batch = Batch.of(feeds)
        self._fill(batch, [feed.cache.block_table for feed in feeds], slots)
        self._device.copy_(self._host, non_blocking=True)  # the runner waits for the pass behind it
        return len(batch.rows)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return an array on the device; always the same tensor."""
        tensor = self._tensors[name]
        return tensor.view(self._table_shape) if name == "block_table" else tensor

    def _fill(self, batch: Batch, block_tables: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> None:
        host, num_tokens, num_sequences = self._arrays, len(batch.token_ids), len(batch.lengths)
        host["token_ids"][:num_tokens] = batch.token_ids
        host["positions"][:num_tokens] = batch.positions
        host["slots"][:num_tokens] = np.concatenate(slots) if slots else 0
        for name in ("token_ids", "positions", "slots"):
            host[name][num_tokens:] = 0  # slot 0 is in the scratch block
        host["rows"][: len(batch.rows)] = batch.rows
        host["cu_seq_q"][: num_sequences + 1] = batch.starts
        host["seqused_k"][:num_sequences] = batch.lengths + np.diff(batch.starts)
        for index, block_table in enumerate(block_tables):
            host["block_table"].reshape(self._table_shape)[index] = block_table
        self._fill_sequences(num_sequences, num_tokens)

    def _fill_sequences(self, num_fed: int, num_tokens: int) -> None:
        """Pad the sequences: with one token each where every sequence has one, as kernels require, else with none."""
        host, (num_sequences, _) = self._arrays, self._table_shape
        num_padding = num_sequences - num_fed
        each_has_one = len(host["token_ids"]) == num_sequences
        host["cu_seq_q"][num_fed + 1 :] = num_tokens + (np.arange(1, num_padding + 1) if each_has_one else 0)
        host["seqused_k"][num_fed:] = 1
        host["block_table"].reshape(self._table_shape)[num_fed:] = SCRATCH_BLOCK


def _padded_bytes(dtype: torch.dtype, size: int) -> int:
    return -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _parts(storage: torch.Tensor, sizes: dict[str, tuple[torch.dtype, int]]) -> dict[str, torch.Tensor]:
    """Return views of `storage`, each aligned."""
    parts, start = {}, 0
    for name, (dtype, size) in sizes.items():
        parts[name] = storage[start : start + size * dtype.itemsize].view(dtype)
        start += _padded_bytes(dtype, size)
    return parts


@dataclass(frozen=True)
class _Graph:
    """A recorded pass, and what it reads."""

    inputs: StagedInputs
    replay: Replay


class PagedRunner:
    """Runs a forward pass on paged caches. See runner.Runner.

    Passes that fit a bucket are replayed; others run unpadded. The rows returned are copies.
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        pool: BlockPool,
        context_length: int,
        varlen_attn: VarlenAttention,
        graphs: GraphRunner | None,
        buckets: Buckets | None = None,
    ):
        """Without `graphs` every pass runs unpadded."""
        self._forward_pass, self._pool, self._context_length = forward_pass, pool, context_length
        self._varlen_attn, self._graph_runner = varlen_attn, graphs
        self._buckets = buckets or Buckets()
        self._graphs: dict[GraphKey, _Graph] = {}
        self._logits: torch.Tensor | None = None  # [rows of the largest bucket, V], which every graph writes
        self._every_row = torch.arange(self._buckets.max_tokens, device=self.device)

    @property
    def device(self) -> torch.device:
        return self._forward_pass.device

    def new_cache(self) -> PagedCache:
        return PagedCache(self._pool, self._context_length)

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        self.forward_with(feeds, found.append)
        return found[0]

    @torch.inference_mode()
    def forward_with(self, feeds: Sequence[Feed], then: Callable[[torch.Tensor], None]) -> None:
        with self._growing(feeds) as slots:
            then(self._run(feeds, slots))

    @contextmanager
    def _growing(self, feeds: Sequence[Feed], num_more: int = 0) -> Iterator[list[np.ndarray]]:
        """Reserve slots for `feeds` and `num_more` tokens behind each; then wait for the device and grow the caches.

        If anything fails, the caches stay as they were.
        """
        try:
            slots = [feed.cache.reserve(len(feed.token_ids) + num_more) for feed in feeds]
            with self._on_device():
                try:
                    yield slots
                finally:
                    wait_for(self.device)  # after a failure too: buffers and blocks are in use until then
        except BaseException:
            for feed in feeds:
                feed.cache.truncate(feed.cache.length)  # frees what was reserved
            raise
        for feed in feeds:
            feed.cache.advance(len(feed.token_ids) + num_more)

    @torch.inference_mode()
    def record_all(self) -> None:
        """Record every bucket, so that no session has to wait for it."""
        if self._graph_runner:
            with self._on_device():
                for key in self._buckets.all():
                    self._graph_of(key, self._graph_runner)

    def _run(self, feeds: Sequence[Feed], slots: Sequence[np.ndarray]) -> torch.Tensor:
        key = self._buckets.key_for([len(feed.token_ids) for feed in feeds])
        if self._graph_runner is None or key is None:
            return self._run_unpadded(feeds, slots)
        graph = self._graph_of(key, self._graph_runner)
        num_rows = graph.inputs.send(feeds, slots)
        graph.replay()
        assert self._logits is not None
        return self._logits.index_select(0, graph.inputs["rows"][:num_rows])

    def _run_unpadded(self, feeds: Sequence[Feed], slots: Sequence[np.ndarray]) -> torch.Tensor:
        sizes = [len(feed.token_ids) for feed in feeds]
        inputs = self._inputs(len(feeds), sum(sizes))
        rows = inputs["rows"][: inputs.send(feeds, slots)]
        longest = max(feed.cache.length + size for feed, size in zip(feeds, sizes, strict=True))
        return self._call(inputs, rows, max(sizes), longest)

    def _graph_of(self, key: GraphKey, runner: GraphRunner) -> _Graph:
        """Return the recorded pass for `key`, recorded on first use with inputs of padding only."""
        if key not in self._graphs:
            inputs = self._inputs(key.num_sequences, key.num_tokens)
            inputs.send([], [])
            rows = self._every_row[: key.num_tokens]

            def run() -> None:
                logits = self._call(inputs, rows, key.tokens_per_sequence, self._context_length)
                if self._logits is None:
                    self._logits = logits.new_empty(self._buckets.max_tokens, logits.shape[-1])
                self._logits[: key.num_tokens] = logits

            self._graphs[key] = _Graph(inputs, runner.capture(run))
        return self._graphs[key]

    def _inputs(self, num_sequences: int, num_tokens: int) -> StagedInputs:
        return StagedInputs(num_sequences, num_tokens, self._pool.num_blocks_for(self._context_length), self.device)

    def _call(self, inputs: StagedInputs, rows: torch.Tensor, max_q: int, max_length: int) -> torch.Tensor:
        batch = PagedBatch(
            layers=self._pool.layers,
            varlen_attn=self._varlen_attn,
            slots=inputs["slots"],
            cu_seq_q=inputs["cu_seq_q"],
            seqused_k=inputs["seqused_k"],
            block_table=inputs["block_table"],
            max_q=max_q,
            max_length=max_length,
        )
        return self._forward_pass(inputs["token_ids"], inputs["positions"], rows, batch)

    def _on_device(self) -> AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
