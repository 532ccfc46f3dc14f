"""Speculative decoding across two machines: the client library. Imports no torch."""

from client.aio import AsyncGenerationStream, AsyncSpeculativeClient
from client.conversation import Patience
from client.errors import (
    DeadlineExceededError,
    IncompatiblePairError,
    InvalidRequestError,
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
    "DeadlineExceededError",
    "GenerationResult",
    "GenerationStats",
    "GenerationStream",
    "IncompatiblePairError",
    "InvalidRequestError",
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
