"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

Item = TypeVar("Item")


async def merged(sources: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """The items of all sources as they come; the first source that raises ends them all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    arrived: asyncio.Queue[Item | None] = asyncio.Queue()

    async def drain(source: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(source) as items:
                async for item in items:
                    arrived.put_nowait(item)
        finally:
            arrived.put_nowait(None)  # the end of one

    tasks = [asyncio.ensure_future(drain(source)) for source in sources]
    left = len(tasks)
    try:
        while left:
            arriving = await arrived.get()
            if arriving is not None:
                yield arriving
                continue
            left -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
