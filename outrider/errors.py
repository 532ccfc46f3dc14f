"""Errors that a service reports to its caller.

    ServiceError
    ├── InvalidArgumentError      a field of the request is wrong; the message names it and the remedy
    ├── FailedPreconditionError   the request does not fit what the service holds: open a new session
    ├── ResourceExhaustedError    a limit is reached; `retry_delay_s` says when to come again
    ├── NotFoundError             the service has no such thing
    ├── UnavailableError          still loading, or shutting down
    └── InternalError             the model failed on this request

They know nothing of gRPC; `outrider.server` maps each to its status code.
"""

from __future__ import annotations

from collections.abc import Iterable


class ServiceError(Exception):
    """Base of the errors whose message may be shown to the caller."""


class InvalidArgumentError(ServiceError):
    """A field of the request is wrong."""


class FailedPreconditionError(ServiceError):
    """The request does not fit the session's state; the caller opens a new session and sends everything."""


class ResourceExhaustedError(ServiceError):
    """A limit is reached."""

    def __init__(self, message: str, retry_delay_s: float):
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class NotFoundError(ServiceError):
    """The service has no such thing."""


class UnavailableError(ServiceError):
    """The service cannot answer yet, or no longer."""


class InternalError(ServiceError):
    """The model failed on this request alone."""


def raise_errors_in(answers: Iterable[object]) -> None:
    """Raise the first ServiceError among some answers, if there is one."""
    for answer in answers:
        if isinstance(answer, ServiceError):
            raise answer
