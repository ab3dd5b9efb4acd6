"""Servers that end, start again or are killed behind the gateway, while requests come without a pause."""

import json
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead

from tests.helpers.gateway import gateway
from tests.helpers.scripted_process import ScriptedProcess, scripted_processes
from tests.helpers.serving import NAME, events_of, until

HELLO = [{"role": "user", "content": "Hello"}]
UNREADY_SECONDS = 3.0  # twice the time in which the gateway notices
CLIENTS = 3
WORDS = ("north", "south")  # of the two servers; each is one token
MOST = 3000  # requests of a client


@dataclass
class Asked:
    """One request: when it began, the word of the server that answered, or what went wrong."""

    began: float
    word: str = ""
    lost: str = ""


def ask(front, number, tokens=4):
    """An answer, whole or as a stream in turns."""
    asked = Asked(time.monotonic())
    body = {"model": NAME, "messages": HELLO, "max_tokens": tokens, "stream": bool(number % 2)}
    try:
        answer = front.ask("/v1/chat/completions", body)
        if answer.status != 200:
            asked.lost = f"{answer.status} {answer.body}"
        elif number % 2:
            asked.word, complete = text_of(answer.body)
            asked.lost = "" if complete else f"incomplete: {answer.body}"
        else:
            asked.word = answer.json["choices"][0]["message"]["content"].split()[0]
    except (OSError, HTTPException) as error:
        asked.lost = repr(error)
    return asked


def text_of(body):
    """The first word of a stream, and whether the stream is complete."""
    events = events_of(body)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if "choices" in event]
    return "".join(pieces).split()[0], events[-1] == "[DONE]"


@contextmanager
def load(front):
    """Clients that ask one request after the other; gives the list of what came of them so far."""
    done, over = [], threading.Event()

    def client():
        for number in range(MOST):
            if over.is_set():
                return
            done.append(ask(front, number))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


class Stream(threading.Thread):
    """A long stream, read in a thread: its server's word once there is one, whether it is complete, and its end."""

    def __init__(self, front, tokens):
        super().__init__()
        self.front, self.tokens = front, tokens
        self.word, self.complete, self.error = "", False, None

    def run(self):
        connection = self.front.connect()
        body = {"model": NAME, "messages": HELLO, "max_tokens": self.tokens, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        read = b""
        try:
            response = connection.getresponse()
            while piece := response.read1():
                read += piece
                if not self.word:
                    self.word = next((word for word in WORDS if word.encode() in read), "")
            self.complete = text_of(read)[1]
        except (OSError, HTTPException) as error:
            self.error = error
        connection.close()


def begin_streams(front, count, tokens):
    streams = [Stream(front, tokens) for _ in range(count)]
    for stream in streams:
        stream.start()
    until(lambda: all(stream.word for stream in streams))
    assert {stream.word for stream in streams} == set(WORDS)
    return streams


def servers(folder, **settings):
    return tuple(ScriptedProcess(word, folder, **settings) for word in WORDS)


def test_no_request_is_lost_while_servers_start_again_one_by_one(tmp_path):
    pair = servers(tmp_path, unready_seconds=UNREADY_SECONDS)
    with scripted_processes(*pair), gateway(*(each.port for each in pair), tmp_path / "gateway.log") as front:
        streams = begin_streams(front, 2, tokens=300)
        with load(front) as done:
            for name, server in zip(("first", "second"), pair, strict=True):
                until(lambda word=server.word: word in {asked.word for asked in done[-20:]})
                server.process.send_signal(signal.SIGTERM)
                front.wait_for(**{name: "DOWN"})
                assert server.process.poll() is None  # it still takes requests when the gateway knows
                assert any(stream.is_alive() for stream in streams) or server is pair[1]
                assert server.end() == 0
                server.start()
                front.wait_for(**{name: "UP"})
        for stream in streams:
            stream.join()
    assert [asked.lost for asked in done if asked.lost] == []
    assert all(stream.complete for stream in streams)
    assert len(done) > 100
    assert not any('"status":503,' in line for each in pair for line in requests_in(each.log))


def requests_in(log):
    """The lines of a server's log that are about requests of clients."""
    return [line for line in log.read_text().splitlines() if '"path":"/v1/' in line]


def test_only_what_a_killed_server_had_begun_is_lost(tmp_path):
    pair = servers(tmp_path)
    with scripted_processes(*pair), gateway(*(each.port for each in pair), tmp_path / "gateway.log") as front:
        streams = begin_streams(front, 4, tokens=200)
        with load(front) as done:
            until(lambda: {asked.word for asked in done} >= set(WORDS))
            pair[0].process.kill()
            pair[0].process.wait()
            killed = time.monotonic()
            front.wait_for(first="DOWN")
            so_far = len(done)
            until(lambda: len(done) > so_far + 10)
        pair[1].process.send_signal(signal.SIGTERM)  # drains: those who were not concerned end whole
        for stream in streams:
            stream.join()
    lost = [asked for asked in done if asked.lost]
    assert len(lost) <= CLIENTS
    assert all(asked.began < killed for asked in lost), lost
    assert all("server_lost" in asked.lost or "IncompleteRead" in asked.lost for asked in lost), lost
    for stream in streams:
        if stream.word == WORDS[0]:
            assert isinstance(stream.error, IncompleteRead | ConnectionResetError)
        else:
            assert stream.complete
