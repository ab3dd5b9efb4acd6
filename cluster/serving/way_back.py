"""The way of an answer from its replica to the client, also if the replica is gone before the answer is complete."""

import msgspec
from starlette.types import Message, Send

from runtime.server.converters.messages_output import error_of
from runtime.server.http.event_stream import event_of
from runtime.server.http.failures import RequestFailure, unavailable

LOST_RETRY = 1  # seconds


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
        self._begun = self._streamed = False
        self._events = 0

    async def send(self, messages: list[Message]) -> None:
        """Send more of the answer."""
        for message in messages:
            if message["type"] == "http.response.start":
                self._begun = True
                self._streamed = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            else:
                self._events += message.get("body", b"").count(b"\n\n")
            await self._send(message)

    async def lost(self, name: str) -> None:
        """End an answer whose replica is gone; raises `RequestFailure` for one that had not begun.

        It is not asked of another replica: what ended this one might end that one too.
        """
        failure = unavailable(
            f"the replica of {name!r} that answered is gone; ask again", code="replica_lost", retry_after=LOST_RETRY
        )
        if not self._begun or not self._streamed:
            raise failure
        last = lost_event(self._path, self._events, failure)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def lost_event(path: str, events: int, failure: RequestFailure) -> bytes:
    """The last event of a stream at `path` of which `events` have been sent, in the form of its API."""
    if path.startswith("/v1/messages"):
        return event_of(error_of(failure), "error")
    if path.startswith("/v1/responses"):
        error = failure.body.error
        return event_of(ResponsesError(error.message, error.code, events), "error")
    return event_of(failure.body)
