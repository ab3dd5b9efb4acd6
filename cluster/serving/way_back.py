"""The way of an answer from its replica to the client, also if the replica is gone before the answer is complete."""

import msgspec
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import Message, Send

from runtime.server.converters.messages_output import error_of
from runtime.server.http.event_stream import event_of
from runtime.server.http.failures import RequestFailure, too_busy, unavailable

# seconds after which a client may ask again
LOST_RETRY, FULL_RETRY, UNUSABLE_RETRY = 1, 2, 30


class ResponsesError(msgspec.Struct, frozen=True, tag="error"):
    """The `error` event of OpenAI's Responses API."""

    message: str
    code: str | None
    sequence_number: int
    param: str | None = None


class WayBack:
    """Sends what a replica answers, and knows how far the answer has come."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._streamed = False
        self._events = 0

    async def send(self, messages: list[Message]) -> None:
        """Send more of the answer."""
        for message in messages:
            if message["type"] == "http.response.start":
                self._streamed = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            else:
                self._events += message.get("body", b"").count(b"\n\n")
            await self._send(message)

    async def fail(self, failure: RequestFailure) -> None:
        """End a stream with an error event; raises the failure if none has begun.

        It is not asked of another replica: what ended this one might end that one too.
        """
        if not self._streamed:
            raise failure
        last = last_event(self._path, self._events, failure)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def failure_of(error: Exception, name: str) -> RequestFailure:
    """What a client of a model is told of an error on the way of its answer, which may be Ray's, gRPC's or any other.

    The error itself is for the log: it names addresses and files of the cluster.
    """
    if isinstance(error, BackPressureError):
        return too_busy(f"every replica of {name!r} is full; try again later", FULL_RETRY)
    if isinstance(error, TimeoutError):
        message = f"no replica of {name!r} has answered in time; try again later"
        return unavailable(message, code="timeout", retry_after=FULL_RETRY)
    if isinstance(error, DeploymentUnavailableError):
        message = f"no replica of {name!r} can be started; the cluster's log tells why"
        return unavailable(message, code="model_unavailable", retry_after=UNUSABLE_RETRY)
    message = f"the replica of {name!r} that answered is gone; ask again"
    return unavailable(message, code="replica_lost", retry_after=LOST_RETRY)


def last_event(path: str, events: int, failure: RequestFailure) -> bytes:
    """The last event of a stream at `path` of which `events` have been sent, in the form of its API."""
    if path.startswith("/v1/messages"):
        return event_of(error_of(failure), "error")
    if path.startswith("/v1/responses"):
        error = failure.body.error
        return event_of(ResponsesError(error.message, error.code, events), "error")
    return event_of(failure.body)
