"""Forward passes of fixed sizes, recorded once and replayed.

A pass of a few tokens costs the CPU more to launch than the GPU to compute. A recorded pass is launched in one call,
but its sizes and addresses are fixed. So passes are padded to a bucket, and use buffers that do not move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Replay = Callable[[], None]
_NUM_WARM_UP_RUNS = 2  # libraries choose their kernels and allocate their workspaces in the first


@dataclass(frozen=True)
class GraphKey:
    """The sizes of one recorded pass."""

    num_sequences: int
    tokens_per_sequence: int  # the most that one sequence may feed

    @property
    def num_tokens(self) -> int:
        """Capacity of the packed row, which the sequences share in any way."""
        return self.num_sequences * self.tokens_per_sequence


@dataclass(frozen=True)
class Buckets:
    """The sizes that passes are padded to: powers of two, of sequences and of tokens."""

    max_sequences: int = 64
    max_tokens_per_sequence: int = 16
    max_tokens: int = 128  # beyond, a pass takes so long that launching it does not matter

    def key_for(self, sizes: Sequence[int]) -> GraphKey | None:
        """Return the smallest bucket for sequences that feed `sizes` tokens; None if none is large enough.

        A bucket of one token per sequence is only for passes where each sequence feeds exactly one.
        """
        num_sequences = _power_of_two(len(sizes))
        tokens_per_sequence = _power_of_two(max(*sizes, -(-sum(sizes) // num_sequences)))
        key = GraphKey(num_sequences, tokens_per_sequence)
        return key if self._has(key) else None

    def all(self) -> list[GraphKey]:
        """Return all buckets, largest first, so that later recordings reuse the memory of earlier ones."""
        counts = [1 << bit for bit in range(max(self.max_sequences, self.max_tokens_per_sequence).bit_length())]
        keys = (GraphKey(sequences, tokens) for sequences in counts for tokens in counts)
        return sorted(filter(self._has, keys), key=lambda key: key.num_tokens, reverse=True)

    def _has(self, key: GraphKey) -> bool:
        return (
            key.num_sequences <= self.max_sequences
            and key.tokens_per_sequence <= self.max_tokens_per_sequence
            and key.num_tokens <= self.max_tokens
        )


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class GraphRunner(Protocol):
    """Records functions whose tensors keep their addresses."""

    def capture(self, function: Callable[[], None]) -> Replay:
        """Return a call that does what `function` does on its tensors' current contents; may run `function`."""


class EagerRunner:
    """Records nothing: every replay runs the function. For devices without CUDA graphs."""

    def capture(self, function: Callable[[], None]) -> Replay:
        return function


class CudaGraphRunner:
    """CUDA graphs; they share one memory pool, since no two run at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Replay:
        with torch.cuda.device(self._device):
            self._warm_up(function)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                function()
        return graph.replay

    def _warm_up(self, function: Callable[[], None]) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UP_RUNS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
