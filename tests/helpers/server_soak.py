"""Random clients of a server: they leave early, read slowly, send bad bodies, and check whole answers against others.

Every request has a seed of its own, so its answer is the same whatever else runs. What a client got while the others
did their worst is compared with the same request alone, afterwards.
"""

import json
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection

from tests.helpers.serving import events_of

TIMEOUT = 60
SLOW_READ = 0.02  # seconds between two small reads of a slow reader
SLOW_BYTES = 64
BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b'{"model": 3}',
    b"\xff\xfe",
    b'{"model": "MODEL", "messages": [], "unknown": 1}',
    b'{"model": "MODEL", "messages": [{"role": "user", "content": "a"}], "max_tokens": 0}',
    b'{"model": "other", "prompt": "a"}',
    b"[" * 20_000,
)
WORDS = ("sea", "night", "Bonjour", "7", "été", "\n", "house of cards", "🌊", "def f(x):", "и")


@dataclass
class Asked:
    """A request whose whole answer came."""

    path: str
    body: dict
    answer: list  # text and finish reason of each choice


@dataclass
class Soak:
    """What all clients share; `failures` are sentences of what was wrong."""

    port: int
    model: str
    longest: int  # tokens that a sequence holds
    end: float
    complete: list = field(default_factory=list)
    failures: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fail(self, sentence):
        with self.lock:
            self.failures.append(sentence)


def random_request(soak, rng):
    """A chat or a completion, with a seed."""
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
    text = text.encode()[: soak.longest // 3].decode(errors="ignore")  # a tiny model's tokens are bytes
    body = {"model": soak.model, "seed": rng.randrange(2**31), "max_tokens": rng.randint(1, 24)}
    body["temperature"] = rng.choice((0, 0.8, 1.5))
    if rng.random() < 0.3:
        body["stop"] = rng.sample(("e", " ", "a", "th", "\n"), rng.randint(1, 2))
    if rng.random() < 0.25:
        body["n"] = rng.randint(2, 4)
    if rng.random() < 0.2:
        body["presence_penalty"] = 1.0
    if rng.random() < 0.5:
        body["stream"] = True
    if rng.random() < 0.5:
        return "/v1/completions", {**body, "prompt": text}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


def connected(soak):
    connection = HTTPConnection("127.0.0.1", soak.port, timeout=TIMEOUT)
    connection.connect()
    return connection


def send(connection, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})


def choices_of(path, body, data):
    """Text and finish reason of each choice of a whole answer or a stream."""
    if not body.get("stream"):
        choices = json.loads(data)["choices"]
        texts = [each["text"] if "text" in each else each["message"]["content"] for each in choices]
        return [[text, each["finish_reason"]] for text, each in zip(texts, choices, strict=True)]
    found = [["", None] for _ in range(body.get("n", 1))]
    events = events_of(data)
    assert events[-1] == "[DONE]", events[-1]
    for event in events[:-1]:
        assert "error" not in event, event
        for choice in event["choices"]:
            own = found[choice["index"]]
            own[0] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            own[1] = choice["finish_reason"] or own[1]
    return found


def ask(soak, path, body):
    """The whole answer; None if the queue is full."""
    connection = connected(soak)
    try:
        send(connection, path, body)
        response = connection.getresponse()
        data = response.read()
        if response.status == 429:
            assert response.headers["Retry-After"]
            return None
        assert response.status == 200, f"{path} gave {response.status}: {data[:300]!r}"
        return choices_of(path, body, data)
    finally:
        connection.close()


def complete(soak, rng):
    path, body = random_request(soak, rng)
    answer = ask(soak, path, body)
    if answer is not None:
        with soak.lock:
            soak.complete.append(Asked(path, body, answer))


def leave_early(soak, rng):
    """Close, or reset, before the first byte or in the middle of an answer."""
    path, body = random_request(soak, rng)
    connection = connected(soak)
    send(connection, path, {**body, "max_tokens": 512, "ignore_eos": True})
    time.sleep(rng.choice((0, 0.001, 0.01, 0.1)))
    if body.get("stream") and rng.random() < 0.5:
        connection.sock.recv(rng.choice((1, 100, 1000)))
    if rng.random() < 0.5:  # a reset in place of a close
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sock.close()


def half_a_request(soak, rng):
    """Send the head, and leave before the body is complete."""
    connection = connected(soak)
    connection.sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    time.sleep(rng.choice((0, 0.05)))
    connection.sock.close()


def bad_body(soak, rng):
    connection = connected(soak)
    send(connection, rng.choice(("/v1/chat/completions", "/v1/completions")), rng.choice(BAD_BODIES))
    response = connection.getresponse()
    data = response.read()
    assert response.status in (400, 404), f"a bad body gave {response.status}: {data[:300]!r}"
    assert json.loads(data)["error"]["message"]
    connection.close()


def too_long(soak, rng):
    connection = connected(soak)
    ids = [5] * (soak.longest + rng.randint(1, 1000))
    send(connection, "/v1/completions", {"model": soak.model, "prompt": ids})
    response = connection.getresponse()
    assert response.status in (400, 429), response.status
    response.read()
    connection.close()


def long_prompt(soak, rng):
    """As long as a sequence may be, never the same, so that no cache helps."""
    ids = [rng.randint(5, 250) for _ in range(soak.longest - 2)]
    ask(soak, "/v1/completions", {"model": soak.model, "prompt": ids, "max_tokens": 2, "temperature": 0})


def slow_reader(soak, rng):
    path, body = random_request(soak, rng)
    body["stream"] = True
    connection = connected(soak)
    send(connection, path, body)
    response = connection.getresponse()
    data = b""
    while piece := response.read1(SLOW_BYTES):
        data += piece
        time.sleep(SLOW_READ)
    connection.close()
    if response.status == 200:
        with soak.lock:
            soak.complete.append(Asked(path, body, choices_of(path, body, data)))


ACTS = (
    complete,
    complete,
    complete,
    leave_early,
    leave_early,
    half_a_request,
    bad_body,
    too_long,
    long_prompt,
    slow_reader,
)


def client(soak, seed):
    """One client: random acts until the end."""
    rng = random.Random(seed)
    while time.monotonic() < soak.end:
        act = rng.choice(ACTS)
        try:
            act(soak, rng)
        except Exception as error:
            soak.fail(f"{act.__name__}: {type(error).__name__}: {error}")
        soak.count(act.__name__)


def get(soak, path):
    connection = connected(soak)
    connection.request("GET", path)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


def watch(soak, each_second):
    """Ask /health each second until the end; `each_second` is called then."""
    while time.monotonic() < soak.end:
        status, data = get(soak, "/health")
        if status != 200:
            soak.fail(f"/health gave {status}: {data!r}")
        each_second()
        time.sleep(min(1.0, max(0.0, soak.end - time.monotonic())))


def run_clients(soak, clients, seed, each_second=lambda: None):
    """Let all clients run to the end."""
    threads = [threading.Thread(target=client, args=(soak, seed * 1000 + i)) for i in range(clients)]
    for thread in threads:
        thread.start()
    watch(soak, each_second)
    for thread in threads:
        thread.join(TIMEOUT * 2)
        if thread.is_alive():
            soak.fail("a client has not ended")


def check_idle(soak, seconds=10):
    """All slots are idle and nothing waits, at most so long after the last client has left."""
    deadline = time.monotonic() + seconds
    while True:
        state = json.loads(get(soak, "/slots")[1])
        idle = all(slot["state"] == "idle" and slot["request_id"] is None for slot in state["slots"])
        if idle and not (state["waiting"] or state["queued_tokens"] or state["requests"]["running"]):
            return
        if time.monotonic() > deadline:
            soak.fail(f"not idle after {seconds} s: {state}")
            return
        time.sleep(0.1)


def check_answers(soak, most, rng):
    """The answers of at most so many requests are the same when each is asked alone."""
    for asked in rng.sample(soak.complete, min(most, len(soak.complete))):
        alone = ask(soak, asked.path, asked.body)
        if alone != asked.answer:
            soak.fail(f"{asked.path} {json.dumps(asked.body)} gave {asked.answer}, and alone {alone}")
