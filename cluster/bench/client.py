"""Clients of a cluster, which tell what became of each request."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

LONGEST_LINE = 2**20  # bytes
HEADERS_END = (b"\r\n", b"")
DATA, DONE = b"data: ", b"data: [DONE]"
Kind = Literal["complete", "refused", "error event", "cut off"]


@dataclass(frozen=True)
class Outcome:
    """What became of a streamed request.

    kind: "complete" to its [DONE]; "refused" with a status and OpenAI's error object before it began; an "error event"
    as its last; or "cut off", which a client cannot tell from a lost connection.
    code: the error's. seconds: until its end. request: the body that was sent. retry_after: the header.
    """

    kind: Kind
    status: int
    replica: str
    text: str
    code: str | None
    cached_tokens: int
    seconds: float
    request: bytes
    retry_after: str = ""


def chat_body(model: str, messages: Sequence[Mapping[str, str]], tokens: int) -> bytes:
    """A greedy streamed answer of exactly so many tokens."""
    fields = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    return msgspec.json.encode({"model": model, "messages": messages, **fields, **options})


async def ask(port: int, body: bytes, path: str = "/v1/chat/completions") -> Outcome:
    """Send a request, and read its answer to the end, whatever it is."""
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LONGEST_LINE)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := await reader.readline()) not in HEADERS_END:
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        lines = (await reader.read()).split(b"\n")
        found = _outcome(body, status, headers.get("x-replica", ""), lines, time.perf_counter() - sent)
        return replace(found, retry_after=headers.get("retry-after", ""))
    except (OSError, IndexError) as error:
        return Outcome("cut off", 0, "", "", str(error), 0, time.perf_counter() - sent, body)
    finally:
        writer.close()


def _outcome(request: bytes, status: int, replica: str, lines: list[bytes], seconds: float) -> Outcome:
    def outcome(kind: Kind, code: str | None = None) -> Outcome:
        return Outcome(kind, status, replica, text, code, cached, seconds, request)

    text, cached = "", 0
    if status != 200:
        error = next((msgspec.json.decode(line)["error"] for line in lines if line.startswith(b'{"error"')), None)
        return outcome("cut off") if error is None else outcome("refused", error["code"])
    events = [msgspec.json.decode(line[len(DATA) :]) for line in lines if line.startswith(DATA + b"{")]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ()))
    usages = [event["usage"] for event in events if event.get("usage")]
    cached = usages[-1]["prompt_tokens_details"]["cached_tokens"] if usages else 0
    if any(line.startswith(DONE) for line in lines):
        return outcome("complete")
    errors = [event["error"] for event in events if "error" in event]
    return outcome("error event", errors[-1]["code"]) if errors else outcome("cut off")


async def ask_all(
    port: int, clients: int, bodies: list[bytes], after: Callable[[int], object] = lambda _: None
) -> list[Outcome]:
    """Let clients send the requests one after another, all at the same time.

    `after` is told how many answers have come, after each.
    """
    waiting = iter(bodies)
    found: list[Outcome] = []

    async def client() -> None:
        for body in waiting:
            found.append(await ask(port, body))
            after(len(found))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found
