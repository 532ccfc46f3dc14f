"""Errors that a service reports to its caller.

    ServiceError
    ├── InvalidArgumentError      a field of the request is wrong; the message names it and the remedy
    ├── FailedPreconditionError   the request does not fit what the service holds: open a new session
    │   ├── ModelChangedError     the session expects another model than the service has
    │   └── SessionIdleError      the session has said nothing for too long
    ├── ResourceExhaustedError    a limit is reached; `retry_delay_s` says when to come again
    ├── UnauthenticatedError      the caller shows no key that is known here
    ├── NotFoundError             the service has no such thing
    ├── UnavailableError          still loading, or shutting down
    └── InternalError             the model failed on this request

They know nothing of gRPC; `outrider.serving.server` maps each to its status code.
"""

from __future__ import annotations

from collections.abc import Iterable

ERROR_DOMAIN = "outrider"  # of the google.rpc.ErrorInfo by which a service marks its own errors


class ServiceError(Exception):
    """Base of the errors whose message may be shown to the caller; `reason` is for programs."""

    reason = "UNSPECIFIED"


class InvalidArgumentError(ServiceError):
    """A field of the request is wrong."""

    reason = "INVALID_FIELD"


class FailedPreconditionError(ServiceError):
    """The request does not fit the session's state; the caller opens a new session and sends everything."""

    reason = "OUT_OF_STEP"


class ModelChangedError(FailedPreconditionError):
    """The session expects another model than the service has."""

    reason = "MODEL_CHANGED"


class SessionIdleError(FailedPreconditionError):
    """The session has said nothing for too long; the caller opens a new one when it goes on."""

    reason = "SESSION_IDLE"


class ResourceExhaustedError(ServiceError):
    """A limit is reached."""

    reason = "FULL"

    def __init__(self, message: str, retry_delay_s: float):
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class UnauthenticatedError(ServiceError):
    """The caller shows no key that is known here."""

    reason = "NO_KEY"


class NotFoundError(ServiceError):
    """The service has no such thing."""

    reason = "NOT_HERE"


class UnavailableError(ServiceError):
    """The service cannot answer yet, or no longer."""

    reason = "NOT_READY"


class InternalError(ServiceError):
    """The model failed on this request only."""

    reason = "MODEL_FAILED"


def raise_errors_in(answers: Iterable[object]) -> None:
    """Raise the first ServiceError among some answers, if there is one."""
    for answer in answers:
        if isinstance(answer, ServiceError):
            raise answer
