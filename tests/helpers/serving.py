"""A server in a thread of the test's process, on a free port, and the simplest of clients."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection

import msgspec

from runtime.engines.slot_model import capacity_of
from runtime.server.process import Ending, bound_socket, serve
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service
from runtime.server.settings import ServerSettings

NAME = "served"
END_SECONDS = 20


def served(engine, tokenizer, encoder=None):
    """A model of an engine, as `runtime.server.running.served_model.open_served_model` gives it."""
    return ServedModel(engine, tokenizer, encoder, "it has no format", capacity_of(engine))


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


@dataclass
class Running:
    """A server; `asks` it and returns the whole answer."""

    service: Service
    port: int
    log: list = field(default_factory=list)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout=30):
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path, body=None, *, headers=None, method=None):
        """One request; a body that is no bytes is sent as JSON."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method or ("GET" if body is None else "POST"), path, data, {**sent, **(headers or {})})
        response = connection.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return answer

    def chat(self, text="Hello", **fields):
        """An answer to one user message."""
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return self.ask("/v1/chat/completions", {"model": NAME, "messages": messages, **fields})

    def stream(self, body, path="/v1/chat/completions"):
        """The data of each event of a stream, parsed; [DONE] as text."""
        answer = self.ask(path, {"model": NAME, "stream": True, **body})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.body
        return events_of(answer.body)


def until(condition):
    """Wait until a condition holds."""
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def events_of(body):
    """The data of each event, parsed; comments are left out."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = [line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")]
        if lines:
            found.append(lines[0] if lines[0] == "[DONE]" else json.loads("\n".join(lines)))
    return found


@contextmanager
def running(open_model, settings=None, keys=None, name=NAME, *, wait=True, snapshot_megabytes=0):
    """A server of the model that `open_model` opens, ended gently afterwards; scripted models keep no snapshots."""
    settings = msgspec.structs.replace(settings or ServerSettings(), snapshot_megabytes=snapshot_megabytes)
    listening = bound_socket("127.0.0.1", 0)
    begun, told, failures = threading.Event(), threading.Event(), []
    held = {}

    async def main():
        held["loop"], held["ending"] = asyncio.get_running_loop(), Ending()
        held["service"] = Service(name, open_model, settings)
        begun.set()
        await serve(held["service"], keys, listening, told.set, held["ending"])

    def run():
        try:
            asyncio.run(main())
        except Exception as error:  # shown by the test that waits
            failures.append(error)
        finally:
            told.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(END_SECONDS)
        if wait:
            assert told.wait(END_SECONDS)
            assert not failures, failures
        server = Running(held["service"], listening.getsockname()[1])
        server.end = lambda: held["loop"].call_soon_threadsafe(held["ending"].ask)
        server.ended = thread
        yield server
    finally:
        if thread.is_alive():
            held["loop"].call_soon_threadsafe(held["ending"].ask)
        thread.join(END_SECONDS)
        assert not thread.is_alive(), "the server has not ended"
