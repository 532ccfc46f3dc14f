"""Forward passes of fixed sizes, recorded once and replayed: which sizes there are, and who records.

A pass of a few tokens costs the CPU more to launch than the GPU to compute. A recorded pass is launched in one call,
but its sizes and addresses are fixed: so passes are padded to a bucket, and read and write buffers that stay.
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
        """Rows of the packed row, which the sequences may divide as they like."""
        return self.num_sequences * self.tokens_per_sequence


@dataclass(frozen=True)
class Buckets:
    """The sizes that passes are padded to: powers of two in both directions."""

    max_sequences: int = 64
    max_tokens_per_sequence: int = 16
    max_tokens: int = 128  # beyond, a pass takes so long that launching it does not matter

    def key_for(self, sizes: Sequence[int]) -> GraphKey | None:
        """Return the smallest bucket for sequences that feed `sizes` tokens; None where they are beyond the largest.

        A bucket of one token for each sequence is for passes where each feeds exactly one.
        """
        num_sequences = _power_of_two(len(sizes))
        tokens_per_sequence = _power_of_two(max(*sizes, -(-sum(sizes) // num_sequences)))
        key = GraphKey(num_sequences, tokens_per_sequence)
        return key if self._has(key) else None

    def all(self) -> list[GraphKey]:
        """Return all buckets, the largest first, so that the memory of one serves those after it."""
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
    """Return the smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()


class GraphRunner(Protocol):
    """Records functions that read from and write to tensors which stay where they are."""

    def capture(self, function: Callable[[], None]) -> Replay:
        """Return what does as `function` does, on whatever its tensors then hold. `function` may run meanwhile."""


class EagerRunner:
    """Records nothing and runs the function anew: the stand-in where there are no CUDA graphs."""

    def capture(self, function: Callable[[], None]) -> Replay:
        """See GraphRunner."""
        return function


class CudaGraphRunner:
    """CUDA graphs, which share one pool of memory, since no two of them run at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Replay:
        """See GraphRunner."""
        with torch.cuda.device(self._device):
            self._warm_up(function)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with their own work on the device meanwhile.
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
