"""How errors are reported to callers: OpenAI's error object, and headers that say whether to come again."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from outrider_client.errors import (
    ClientClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OutriderError,
    ServiceUnavailableError,
)

RETRY_S = 1.0  # jittered, so that those who were refused together do not come together
_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
_API_NAMES = {"max_new_tokens": "max_tokens", "num_speculative_tokens": "speculation", "rule": "speculation"}


class HttpError(Exception):
    """An answer other than 200. `param` names the field that is wrong, `code` is for programs."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return what tells OpenAI's clients whether to retry, and when."""
        if self.status == 401:
            return {"www-authenticate": "Bearer", "x-should-retry": "false"}
        if self.status not in (429, 503):
            return {"x-should-retry": "false"}
        wait_s = RETRY_S * (0.5 + random.random())
        return {
            "retry-after-ms": str(round(wait_s * 1000)),
            "retry-after": str(max(1, round(wait_s))),
            "x-should-retry": "true",
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    return HttpError(400, message, code, param)


def error_of(error: OutriderError, fields: Mapping[str, Any] | frozenset[str] = frozenset()) -> HttpError:
    """Return how the client's error is reported; `fields` are the names that a request may have."""
    message = str(error)
    match error:
        case InvalidRequestError():
            return _refusal(message, fields)
        case DeadlineExceededError():
            return HttpError(408, "the request took longer than this gateway's time limit", "timeout")
        case ServiceUnavailableError():
            return HttpError(503, message, "target_unavailable")
        case ModelChangedError():
            return HttpError(503, message, "model_changed")
        case ClientClosedError():
            return HttpError(503, "the gateway is shutting down", "shutting_down")
        case _:
            return HttpError(500, message, "service_failed")


def _refusal(message: str, fields: Mapping[str, Any] | frozenset[str]) -> HttpError:
    """Return a 400 whose sentence and `param` name the field as the API does; the client's begin with its name."""
    first, space, rest = message.partition(" ")
    name = _API_NAMES.get(first, first)
    root = re.split(r"[.\[]", name)[0]
    param = root if root in fields else None
    return invalid(f"{name}{space}{rest}" if param else message, param)
