"""A request on its way from the process that took it to the replica that answers it, and the answer's way back."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

END_SECONDS = 5.0  # that an application has to end once its client has left


@dataclass(frozen=True)
class RelayedRequest:
    """A request whose body has come in whole. `affinity` is a key of the prompt's beginning, empty without one.

    `headers` are without Host, which was checked where the request came in.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    affinity: str

    def scope(self) -> Scope:
        """The request as ASGI describes it: https://asgi.readthedocs.io/en/latest/specs/www.html."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


async def answered(app: ASGIApp, request: RelayedRequest) -> AsyncGenerator[list[Message]]:
    """The messages with which an application answers, each time all that have come since the last.

    If the generator is closed before the answer is complete, the application is told that its client has left.
    """
    arrived: list[Message] = []
    something, left = asyncio.Event(), asyncio.Event()
    bodies = iter((request.body,))

    async def receive() -> Message:
        for body in bodies:
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        arrived.append(message)
        something.set()

    answering = asyncio.ensure_future(app(request.scope(), receive, send))
    answering.add_done_callback(lambda _: something.set())
    try:
        while not answering.done():
            await something.wait()
            something.clear()
            if arrived:
                yield _taken(arrived)
        await answering
        if arrived:
            yield _taken(arrived)
    finally:
        left.set()
        await _end(answering)


def _taken(messages: list[Message]) -> list[Message]:
    taken = messages.copy()
    messages.clear()
    return taken


async def _end(answering: "asyncio.Future[None]") -> None:
    """Let an application end by itself, as it does when its client leaves; one that does not is cancelled."""
    with suppress(asyncio.CancelledError, Exception):
        await asyncio.wait_for(answering, END_SECONDS)
