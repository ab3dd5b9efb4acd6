"""Answers that are sent piece by piece, and what follows when the client goes away.

Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.server.http.failures import RequestFailure, broken
from runtime.server.http.request_ids import current_request_id

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter keeps nginx from collecting pieces
Result = TypeVar("Result")


class ClientLeftError(Exception):
    """The client has closed the connection."""


def event_of(data: object, name: str | None = None) -> bytes:
    """One event with JSON data."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


async def _left(receive: Receive) -> None:
    """Return once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client goes away; that raises `ClientLeftError`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return await working
    finally:
        await _end(working, watching)


class EventStream(Response):
    """Sends the events that `source` yields, and `ping` after a silence; an error becomes the last event.

    `failed` writes that event. `source` is closed as soon as the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes],
        ping_seconds: float,
        *,
        ping: bytes = PING,
        failed: Callable[[RequestFailure], bytes] = lambda failure: event_of(failure.body),
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._source = source
        self._ping_seconds = ping_seconds
        self._ping = ping
        self._failed = failed

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last_sent = time.monotonic()

        async def send_piece(piece: bytes, *, more: bool = True) -> None:
            nonlocal last_sent
            last_sent = time.monotonic()
            await send({"type": "http.response.body", "body": piece, "more_body": more})

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(last_sent + self._ping_seconds - time.monotonic(), 0))
                if time.monotonic() - last_sent >= self._ping_seconds:
                    await send_piece(self._ping)

        sending = asyncio.ensure_future(self._send_all(send_piece))
        others = [asyncio.ensure_future(_left(receive)), asyncio.ensure_future(ping())]
        try:
            await asyncio.wait((sending, others[0]), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientLeftError
            await sending
        finally:
            await _end(sending, *others)

    async def _send_all(self, send_piece: Callable[..., Awaitable[None]]) -> None:
        async with aclosing(self._source):
            try:
                async for piece in self._source:
                    await send_piece(piece)
            except RequestFailure as failure:
                await send_piece(self._failed(failure))
            except Exception:
                sentence = f"an error in the server ended the answer (request {current_request_id.get()})"
                await send_piece(self._failed(broken(sentence)), more=False)
                raise
        await send_piece(b"", more=False)


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
