"""Failures that an answer tells its client about: a status and OpenAI's error object."""

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

LONGEST_MESSAGE = 1000  # characters; some messages quote what the request says
FailureKind = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "unavailable_error", "server_error"
]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in one sentence; `param` names the field of the request, `code` is for programs."""

    message: str
    type: FailureKind
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorDetail


class RequestFailure(Exception):
    """A request that is answered with an error; `retry_after` is in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: FailureKind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}..."
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorDetail(message, kind, param, code))
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def about(self, param: str | None) -> "RequestFailure":
        """The same failure of another field."""
        error = self.body.error
        return RequestFailure(
            self.status, error.message, kind=error.type, param=param, code=error.code, headers=self.headers
        )


def refused(message: str, *, param: str | None = None, code: str | None = None) -> RequestFailure:
    """A request that is wrong in itself: status 400."""
    return RequestFailure(400, message, param=param, code=code)


def no_such_address(path: str) -> RequestFailure:
    """A path that nothing answers: status 404."""
    return RequestFailure(404, f"{path} is not an address here; /openapi.json lists those that are")


def wrong_method(path: str, method: str, allowed: Iterable[str]) -> RequestFailure:
    """A path that answers other methods: status 405."""
    names = ", ".join(allowed)
    return RequestFailure(405, f"{path} is not for {method}, expected {names}", headers={"Allow": names})


def too_busy(message: str, retry_after: int) -> RequestFailure:
    """A request for which there is no place now: status 429."""
    return RequestFailure(429, message, kind="rate_limit_error", code="queue_full", retry_after=retry_after)


def unavailable(message: str, *, code: str, retry_after: int) -> RequestFailure:
    """A server that takes no requests now: status 503."""
    return RequestFailure(503, message, kind="unavailable_error", code=code, retry_after=retry_after)


def broken(message: str, *, status: int = 500, code: str | None = None) -> RequestFailure:
    """A request that was right, and failed here."""
    return RequestFailure(status, message, kind="server_error", code=code)
