"""The client's exceptions.

OutriderError                  base; `partial` holds the text so far, or None
├── InvalidRequestError        an argument is wrong, or a service refused a field; also a ValueError
├── IncompatiblePairError      draft and target have different tokenizers, under the method `draft`
├── ModelChangedError          a service changed its model in the middle of the text
├── ServiceUnavailableError    nothing listens at the address, or the target did not answer within the retry time
├── DeadlineExceededError      the call's own timeout passed; also a TimeoutError
├── ClientClosedError          the client was closed before or during the call
└── ServiceFailedError         a service failed on this request, or broke the protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outrider_client.results import GenerationResult


class OutriderError(Exception):
    """Base of all errors that the client raises on purpose."""

    def __init__(self, message: str, partial: GenerationResult | None = None):
        super().__init__(message)
        self.partial = partial


class InvalidRequestError(OutriderError, ValueError):
    """An argument is wrong, or a service refused a field of the request."""


class IncompatiblePairError(OutriderError):
    """Draft and target do not have the same tokenizer."""


class ModelChangedError(OutriderError):
    """A service has another model than when the text began; ask again for a text of the new model."""


class ServiceUnavailableError(OutriderError):
    """The target service did not answer within the retry time."""


class DeadlineExceededError(OutriderError, TimeoutError):
    """The timeout that the caller set passed."""


class ClientClosedError(OutriderError):
    """The client was closed before the call, or while it ran."""


class ServiceFailedError(OutriderError):
    """A service failed on this request, or broke the protocol."""


class CacheMismatchError(Exception):
    """A service's cache does not match the client's tokens. The session is reopened; callers never see this."""
