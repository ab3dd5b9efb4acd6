"""A chat's answer in the form of another API, whole or as a stream."""

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Protocol, TypeVar

from runtime.server.api.chat import ChunkChoice
from runtime.server.api.common import Usage
from runtime.server.endpoints.chat import Chat

Event = TypeVar("Event", covariant=True)


class Writer(Protocol[Event]):
    """Turns the pieces of a chat's answer into the events of another API."""

    def begin(self) -> Iterable[Event]:
        """The events before the first piece."""

    def push(self, piece: ChunkChoice) -> Iterable[Event]:
        """The events of a piece."""

    def end(self, usage: Usage) -> Iterable[Event]:
        """The events after the last piece."""


async def write_all(begun: Chat, writer: Writer[object]) -> Usage:
    """Give a writer the whole answer; returns what it took."""
    async with begun.answering() as pieces:
        async for piece in pieces:
            writer.push(piece)
    return begun.usage()


async def written(begun: Chat, writer: Writer[Event], encode: Callable[[Event], bytes]) -> AsyncGenerator[bytes]:
    """The events of an answer as it comes, encoded."""
    async with begun.answering() as pieces:
        for event in writer.begin():
            yield encode(event)
        async for piece in pieces:
            for event in writer.push(piece):
                yield encode(event)
    for event in writer.end(begun.usage()):
        yield encode(event)
