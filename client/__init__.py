"""Speculative decoding across two machines: the client library. Imports no torch.

Names are imported when they are first used, so that the command line can set up gRPC's logging before gRPC is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.aio import AsyncGenerationStream, AsyncSpeculativeClient
    from client.conversation import Patience
    from client.errors import (
        ClientClosedError,
        DeadlineExceededError,
        IncompatiblePairError,
        InvalidRequestError,
        ModelChangedError,
        OutriderError,
        ServiceFailedError,
        ServiceUnavailableError,
    )
    from client.pair import PairInfo
    from client.params import SamplingParams, SpeculationParams
    from client.results import Chunk, GenerationResult, GenerationStats, Segment
    from client.sync import GenerationStream, SpeculativeClient

__all__ = [
    "AsyncGenerationStream",
    "AsyncSpeculativeClient",
    "Chunk",
    "ClientClosedError",
    "DeadlineExceededError",
    "GenerationResult",
    "GenerationStats",
    "GenerationStream",
    "IncompatiblePairError",
    "InvalidRequestError",
    "ModelChangedError",
    "OutriderError",
    "PairInfo",
    "Patience",
    "SamplingParams",
    "Segment",
    "ServiceFailedError",
    "ServiceUnavailableError",
    "SpeculationParams",
    "SpeculativeClient",
]
_MODULES = ("params", "errors", "results", "conversation", "pair", "sync", "aio")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"client.{module}" for module in _MODULES)):
            if name in vars(module):
                globals()[name] = vars(module)[name]
                return globals()[name]
    raise AttributeError(f"module 'client' has no attribute {name!r}")
