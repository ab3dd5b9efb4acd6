"""A server that answers as ours does over HTTP, but with replies written in the test: delays, errors, split bytes."""

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from runtime.server.http.page import load_page

MODEL = "scripted-model"
CONTEXT = 2048  # tokens that a sequence can hold
LONGEST_HOLD = 60.0  # seconds
IDLE = {
    "model": MODEL,
    "status": "ready",
    "uptime_seconds": 8042.5,
    "slots": [{"id": 0, "state": "idle", "tokens": 0, "request_id": None}],
    "waiting": 0,
    "queued_tokens": 0,
    "generated_tokens_per_second": 0.0,
    "prompt_tokens_per_second": 0.0,
    "ttft_seconds": {"p50": None, "p99": None},
    "prefix_cache": {"queries": 0, "hits": 0},
    "requests": {"running": 0, "finished": 0},
}


@dataclass(frozen=True)
class Reply:
    """What the server sends for one request: pieces of bytes with a pause before each, or an error.

    Where a piece is an event of threads, the server waits until the test sets it.
    """

    pieces: Sequence[bytes | threading.Event] = ()
    pause: float = 0.0  # seconds
    status: int = 200
    error: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def chunk(finish: str | None = None, **delta: object) -> bytes:
    """A chunk of a chat completion as an event, for example `chunk(content="Hello")`."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    """The last chunk, which has no choices, as an event."""
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event({"choices": [], "usage": {**counts, "prompt_tokens_details": details}})


DONE = event(b"[DONE]")


def says(*texts: str | threading.Event, pause: float = 0.0, finish: str = "stop") -> Reply:
    """A whole answer: one chunk for each text, then the reason of the end, the usage and [DONE]."""
    pieces = [chunk(content=text) if isinstance(text, str) else text for text in texts]
    tokens = sum(isinstance(text, str) for text in texts)
    return Reply([chunk(role="assistant"), *pieces, chunk(finish), usage(24, tokens, 16), DONE], pause)


def refuses(status: int, error: str, **headers: str) -> Reply:
    """An error before the stream; an underscore in a header's name stands for a hyphen."""
    return Reply(status=status, error=error, headers={name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedServer:
    """The server's state, which a test changes while the page looks at it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what the last test set."""
        self.replies: deque[Reply] = deque()  # one for each request; without any, the server echoes the question
        self.requests: list[dict] = []  # the bodies that came
        self.cut: list[bool] = []  # of each stream that ended: whether the client had gone before its end
        self.key = ""  # asked of every request if set
        self.live: dict = IDLE  # what /slots answers
        self.asked = 0  # how often /slots was asked

    async def page(self, request: Request) -> Response:
        page = load_page()
        return Response(page.body, headers=dict(page.headers))

    async def models(self, request: Request) -> Response:
        entry = {"id": MODEL, "object": "model", "max_model_len": CONTEXT}
        return self.refused(request) or JSONResponse({"object": "list", "data": [entry]})

    async def slots(self, request: Request) -> Response:
        self.asked += 1
        return self.refused(request) or JSONResponse(self.live)

    async def chat(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        reply = self.replies.popleft() if self.replies else says(f"You said: {body['messages'][-1]['content']}")
        if reply.error:
            return _error(reply.status, reply.error, reply.headers)
        return StreamingResponse(self.stream(reply), media_type="text/event-stream", headers=dict(reply.headers))

    async def stream(self, reply: Reply) -> AsyncIterator[bytes]:
        cut = True
        try:
            for piece in reply.pieces:
                await asyncio.sleep(reply.pause)
                if isinstance(piece, bytes):
                    yield piece
                else:
                    assert await asyncio.to_thread(piece.wait, LONGEST_HOLD)
            cut = False
        finally:
            self.cut.append(cut)

    def refused(self, request: Request) -> Response | None:
        """The answer to a request without the key, if there is one."""
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "The API key is missing or wrong, expected Authorization: Bearer KEY.")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return JSONResponse(body, status, headers=dict(headers or {}))


@contextlib.contextmanager
def serving(server: ScriptedServer) -> Iterator[str]:
    """Serve in a thread on a free port; gives the address."""
    routes = [
        Route("/", server.page),
        Route("/v1/models", server.models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/slots", server.slots),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()
