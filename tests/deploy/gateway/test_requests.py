"""Requests through the gateway to two servers: which one answers, what passes, and what is refused."""

import http.server
import json
import threading
from contextlib import contextmanager

import openai
import pytest

from runtime.server.settings import ServerSettings
from tests.helpers.gateway import gateway
from tests.helpers.scripted_process import free_port
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running, until
from tests.runtime.server.test_limits import Gate, in_threads

HELLO = [{"role": "user", "content": "Hello"}]
REPLIES = 60  # more than any test asks for
SESSIONS = [f"session-{number}" for number in range(11)]


@pytest.fixture
def behind(tmp_path):
    """Makes a gateway in front of two servers, which say different words."""

    @contextmanager
    def started(settings=None, words=("alpha", "beta"), **engine):
        first, second = (scripted(*[word] * REPLIES, **engine) for word in words)
        with (
            running(first, settings) as one,
            running(second, settings) as other,
            gateway(one.port, other.port, tmp_path / "gateway.log") as front,
        ):
            yield front, one, other

    return started


def answer(front, session=None):
    """The word of the server that answered."""
    headers = {} if session is None else {"X-Session-Id": session}
    found = front.ask("/v1/chat/completions", {"model": NAME, "messages": HELLO}, headers=headers)
    assert found.status == 200, found.body
    return found.json["choices"][0]["message"]["content"]


def test_requests_go_to_both_servers(behind):
    with behind() as (front, *_):
        assert {answer(front) for _ in range(6)} == {"alpha", "beta"}
        counts = front.counts()
        assert counts["first"] == counts["second"] == 3


def test_the_least_busy_server_is_asked(behind):
    gate = Gate()
    with behind(on_step=gate, slots=4) as (front, one, other):
        threads, _ = in_threads(front, 4)
        until(lambda: one.service.running == other.service.running == 2)
        gate.opened.set()
        for thread in threads:
            thread.join()


def test_a_session_stays_with_its_server_until_that_ends(behind):
    with behind() as (front, one, _):
        before = {session: answer(front, session) for session in SESSIONS}
        assert set(before.values()) == {"alpha", "beta"}
        assert {session: answer(front, session) for session in SESSIONS} == before
        one.end()
        front.wait_for(first="DOWN")
        assert {answer(front, session) for session in SESSIONS} == {"beta"}


def test_a_session_gives_way_when_its_server_has_more_than_its_share(behind):
    gate = Gate()
    with behind(on_step=gate, slots=4) as (front, one, other):
        body = {"model": NAME, "messages": HELLO}
        ask = lambda: front.ask("/v1/chat/completions", body, headers={"X-Session-Id": "one"})  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: one.service.running + other.service.running == 4)
        assert one.service.running
        assert other.service.running
        gate.opened.set()
        for thread in threads:
            thread.join()


def test_tokens_arrive_one_by_one(behind):
    """The model waits before each step until the client has read the text of the last one."""
    permits = threading.Semaphore(0)
    count = 20
    long = " ".join(["word"] * count)
    with behind(words=(long, long), on_step=lambda _number: permits.acquire(timeout=20)) as (front, *_):
        connection = front.connect()
        body = {"model": NAME, "messages": HELLO, "stream": True}
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}  # nothing compresses it
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        for _ in range(count):
            while not (line := response.readline()).startswith(b'data: {"id"') or b'"content":""' in line:
                assert line
            permits.release()
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_the_official_client_works_through_it(behind):
    with behind() as (front, *_), openai.OpenAI(base_url=f"{front.address}/v1", api_key="unused") as client:
        whole = client.chat.completions.create(model=NAME, messages=HELLO)
        pieces = list(client.chat.completions.create(model=NAME, messages=HELLO, stream=True))
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert {whole.choices[0].message.content, streamed} == {"alpha", "beta"}
        with pytest.raises(openai.NotFoundError, match="'other' is not here"):
            client.chat.completions.create(model="other", messages=HELLO)


def test_a_request_ends_with_its_client(behind):
    gate = Gate()
    with behind(on_step=gate) as (front, one, other):
        connection = front.connect()
        body = json.dumps({"model": NAME, "messages": HELLO})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert gate.reached.wait(20)
        connection.sock.close()
        connection.close()
        (generation,) = [each for server in (one, other) for each in server.service.generations._running.values()]
        until(lambda: not generation._open)
        gate.opened.set()


def test_a_full_server_says_when_to_come_back(behind):
    gate = Gate()
    with behind(ServerSettings(max_queued=1), on_step=gate) as (front, one, other):
        threads, answers = in_threads(front, 4)
        until(lambda: one.service.running == other.service.running == 2)
        refused = front.chat()
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert [each.status for each in answers] == [200] * 4


def test_a_server_whose_engine_has_failed_is_left_out(tmp_path):
    """Its errors come at once, so that it is always the least busy one."""

    def fail(_number):
        raise KeyError("broken")

    with (
        running(scripted("alpha", on_step=fail)) as one,
        running(scripted(*["beta"] * REPLIES)) as other,
        gateway(one.port, other.port, tmp_path / "gateway.log") as front,
    ):
        assert {front.chat().status for _ in range(2)} == {200, 503}
        front.wait_for(first="DOWN")
        assert [answer(front) for _ in range(4)] == ["beta"] * 4


@pytest.mark.parametrize("headers", [{}, {"X-Session-Id": "one"}], ids=["without a session", "with a session"])
def test_without_a_server_the_answer_is_an_error_of_the_api(tmp_path, headers):
    with gateway(free_port(), free_port(), tmp_path / "gateway.log", states=("DOWN", "DOWN")) as front:
        body = {"model": NAME, "messages": HELLO}
        refused = front.ask("/v1/chat/completions", body, headers={"X-Request-Id": "mine", **headers})
    assert (refused.status, refused.error["code"]) == (503, "no_server")
    assert refused.error.keys() == {"message", "type", "param", "code"}
    assert refused.headers["content-type"] == "application/json"
    assert refused.headers["retry-after"] == "5"
    assert refused.headers["x-request-id"] == "mine"


def test_a_body_that_is_too_large_is_refused_before_it_comes(behind):
    with behind() as (front, *_):
        connection = front.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", str(ServerSettings().max_body_bytes + 1))
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "body_too_large")
        long = [{"role": "user", "content": "x" * 100_000}]  # several buffers of the gateway
        assert front.chat(messages=long).status == 200
        assert sum(front.counts().values()) == 1


@pytest.mark.parametrize(("allowed", "status"), [((), 421), (("chat.example",), 200)])
def test_the_servers_are_called_by_the_gateways_name(behind, allowed, status):
    with behind(ServerSettings(allowed_hosts=allowed)) as (front, *_):
        assert front.ask("/v1/models", headers={"Host": "chat.example"}).status == status


def test_measurements_are_not_those_of_a_server_drawn_by_lot(behind):
    with behind() as (front, *_):
        assert front.ask("/metrics").status == 404
        front.port = front.statistics
        own = front.ask("/metrics")
        assert own.status == 200
        assert b"haproxy_server_status" in own.body


class Recorder(http.server.BaseHTTPRequestHandler):
    """A server that notes the headers of each request beside those for /ready."""

    def do_GET(self):
        if self.path != "/ready":
            self.server.headers.append(self.headers)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def recorder():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        server.headers = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("no id for a log\u00e9", False), (None, False)])
def test_servers_are_told_who_asks_and_by_which_id(recorder, tmp_path, given, kept):
    log = tmp_path / "gateway.log"
    with gateway(recorder.server_port, recorder.server_port, log) as front:
        said = {"X-Forwarded-For": "10.9.8.7"} | ({} if given is None else {"X-Request-Id": given})
        assert front.ask('/a"path', headers=said).status == 200
        until(lambda: "milliseconds" in log.read_text())
    (passed,) = recorder.headers
    assert passed.get_all("X-Forwarded-For") == ["127.0.0.1"]
    assert passed["X-Forwarded-Proto"] == "http"
    assert passed["Host"] == f"127.0.0.1:{front.port}"
    assert (passed["X-Request-Id"] == given) is kept
    (line,) = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert (line["request_id"], line["client"], line["path"]) == (passed["X-Request-Id"], "127.0.0.1", '/a"path')
