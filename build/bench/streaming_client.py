"""A small client of streams that notes when each event arrives; it costs less of the processor than a library does."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from build.bench.served_process import Served
from runtime.errors import UserError

DATA, DONE = b"data: ", b"[DONE]"
LONGEST_LINE = 2**20  # bytes


@dataclass
class Stream:
    """When things happened to one stream, in seconds of `time.perf_counter`.

    first_byte: the status line; the server sends it once the request is admitted.
    tokens: the arrival of each event; a token that completes no character has none of its own.
    count: how many tokens there were.
    """

    sent: float
    first_byte: float = 0.0
    tokens: list[float] = field(default_factory=list)
    count: int = 0

    @property
    def tokens_an_event(self) -> float:
        """How many tokens an event stands for, about one."""
        return self.count / len(self.tokens)

    @property
    def ttft(self) -> float:
        """Seconds from the request to its first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def completion_body(model: str, prompt: Sequence[int], tokens: int) -> bytes:
    """A request for a greedy stream of exactly so many tokens."""
    fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return msgspec.json.encode({"model": model, **fields})


async def stream(served: Served, body: bytes, tokens: int, path: str = "/v1/completions") -> Stream:
    """Send a request for so many tokens and read its stream to the end; raises `UserError` for any other answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=LONGEST_LINE)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    found = Stream(time.perf_counter(), count=tokens)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        found.first_byte = time.perf_counter()
        if b" 200 " not in status:
            raise UserError(f"the server answered {(status + await reader.read(2000)).decode(errors='replace')}")
        while line := await reader.readline():
            if line.startswith(DATA):
                if line.startswith(DONE, len(DATA)):
                    return found
                found.tokens.append(time.perf_counter())
        raise UserError("the server closed a stream before its end")
    finally:
        writer.close()
