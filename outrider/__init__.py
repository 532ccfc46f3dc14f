"""Speculative decoding across two machines: `from outrider import SpeculativeClient, SamplingParams`.

The public names live in `outrider_client` and are imported on first use, so importing this package loads neither torch
nor gRPC. Beneath it lies what the services and the client share: `protocol`, `sampling`, `engine`, `serving`, `common`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider_client.aio import AsyncGenerationStream, AsyncSpeculativeClient
    from outrider_client.conversation.patience import Patience
    from outrider_client.errors import (
        ClientClosedError,
        DeadlineExceededError,
        IncompatiblePairError,
        InvalidRequestError,
        ModelChangedError,
        OutriderError,
        ServiceFailedError,
        ServiceUnavailableError,
    )
    from outrider_client.local_pair import PairAddresses, local_pair
    from outrider_client.pair import PairInfo
    from outrider_client.params import SamplingParams, SpeculationParams, StructuredOutputs
    from outrider_client.results import Chunk, GenerationResult, GenerationStats, Segment
    from outrider_client.sync import GenerationStream, SpeculativeClient

    __version__: str

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
    "PairAddresses",
    "PairInfo",
    "Patience",
    "SamplingParams",
    "Segment",
    "ServiceFailedError",
    "ServiceUnavailableError",
    "SpeculationParams",
    "SpeculativeClient",
    "StructuredOutputs",
    "__version__",
    "local_pair",
]

_MODULES = {
    "AsyncGenerationStream": "aio",
    "AsyncSpeculativeClient": "aio",
    "Chunk": "results",
    "GenerationResult": "results",
    "GenerationStats": "results",
    "GenerationStream": "sync",
    "PairAddresses": "local_pair",
    "PairInfo": "pair",
    "Patience": "conversation.patience",
    "SamplingParams": "params",
    "Segment": "results",
    "SpeculationParams": "params",
    "SpeculativeClient": "sync",
    "StructuredOutputs": "params",
    "local_pair": "local_pair",
}  # of outrider_client; the others are its errors

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'outrider' has no attribute {name!r}")
        if name == "__version__":
            from importlib.metadata import version

            value = version("outrider")
        else:
            from importlib import import_module

            value = getattr(import_module(f"outrider_client.{_MODULES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
