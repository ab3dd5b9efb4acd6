"""What a server refuses: too many, too large, too slow, and those without a key."""

import asyncio
import json
import socket
import threading

from runtime.scheduling.requests import Request
from runtime.server.http.gate import allowed_hosts
from runtime.server.running.generations import Generations
from runtime.server.settings import LOOPBACK_NAMES, Keys, ServerSettings
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running, until

LONG = " ".join(["word"] * 200)
HELLO = [{"role": "user", "content": "Hello"}]


class Gate:
    """Lets a model's steps through once it is open."""

    def __init__(self):
        self.opened, self.reached, self.steps = threading.Event(), threading.Event(), 0

    def __call__(self, _number):
        self.steps += 1
        self.reached.set()
        assert self.opened.wait(30)


def in_threads(server, count, **fields):
    """So many requests at once, and the list that their answers come into."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.chat(**fields))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def until_queued(server, running, waiting):
    """Wait until so many requests are on their way, so many of which wait, as each does at first, whatever is free."""
    generations = server.service.generations
    until(lambda: (generations.running, generations.waiting) == (running, waiting))


def test_a_full_queue_is_told_at_once():
    gate = Gate()
    with running(scripted(*["fine"] * 4, on_step=gate), ServerSettings(max_queued=2)) as server:
        threads, answers = in_threads(server, 3)
        assert gate.reached.wait(20)
        until_queued(server, 3, 2)
        refused = server.chat()
        assert (refused.status, refused.error["type"], refused.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 3
        assert server.chat().status == 200


def test_queued_tokens_are_limited_and_counted_before_a_text_is_encoded(monkeypatch):
    gate = Gate()
    settings = ServerSettings(max_queued_tokens=300)
    with running(scripted(*["fine"] * 4, on_step=gate), settings) as server:
        threads, _ = in_threads(server, 1)
        assert gate.reached.wait(20)
        more, _ = in_threads(server, 1, text=LONG)  # alone in the queue, it may wait
        until_queued(server, 2, 1)
        assert server.service.generations.queued_tokens > 200
        assert server.chat(LONG).status == 429
        monkeypatch.setattr(type(server.service), "encode", None)
        server.service.settings = settings
        server.service.generations._settings = ServerSettings(max_queued=1)
        assert server.chat(LONG).status == 429  # without a call of `encode`, which would fail
        gate.opened.set()
        for thread in threads + more:
            thread.join()


def test_a_request_is_not_refused_for_its_own_prompts():
    """Alone it may always wait; one that never could is told so, instead of to come back."""
    settings = ServerSettings(max_queued=3, max_queued_tokens=20)
    with running(scripted(*["fine"] * 4), settings) as server:
        body = {"model": NAME, "prompt": ["word " * 10] * 4, "max_tokens": 2}
        assert server.ask("/v1/completions", body).status == 200
        refused = server.ask("/v1/completions", {**body, "n": 2})
        assert (refused.status, refused.error["param"]) == (400, "prompt")
        assert "4 prompts with n = 2 are 8 sequences, expected at most 4" in refused.error["message"]


def test_texts_that_wait_to_be_encoded_are_limited():
    """However many come at once, and though the model itself has nothing to do."""
    gate = Gate()
    with running(scripted(*["fine"] * 3), ServerSettings(max_queued=2)) as server:
        tokenizer = server.service.model().tokenizer
        encode = server.service.encode
        server.service.encode = lambda function: encode(lambda: (gate(0), function())[1])
        threads, answers = in_threads(server, 3)  # one for the slot, and two that wait
        until(lambda: server.service._encoding == 3)
        refused = server.ask("/tokenize", {"prompt": "x"})
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 3
        assert server.ask("/tokenize", {"prompt": "x"}).json["tokens"] == tokenizer.encode("x")


def test_a_large_body_is_refused_before_it_is_read():
    with running(scripted("fine", "fine"), ServerSettings(max_body_bytes=1000)) as server:
        assert server.chat("x" * 1000).status == 413
        connection = server.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
        assert connection.getresponse().status == 413  # though nothing was sent
        connection.close()
        connection = server.connect()
        connection.request("POST", "/v1/chat/completions", iter([b"x" * 600] * 2), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413  # a body in pieces, of a length that nobody has told
        connection.close()
        assert server.chat().status == 200


def test_a_request_that_takes_too_long_ends():
    gate = Gate()
    settings = ServerSettings(request_seconds=0.2)
    with running(scripted("fine fine fine", "fine", "fine", on_step=gate), settings) as server:
        late = server.chat()
        assert (late.status, late.error["code"]) == (504, "timeout")
        gate.opened.set()
        until(lambda: not server.service.generations.running)
        *_, last = server.stream({"messages": HELLO})
        assert last == "[DONE]"
        gate.opened.clear()
        *_, last = server.stream({"messages": HELLO})
        assert last["error"]["code"] == "timeout"  # after the first byte, an event is all that is left
        gate.opened.set()


def test_a_request_that_nobody_reads_ends_in_the_engine_too():
    """As behind a client that takes no more bytes."""
    cancelled = []

    async def wait():
        settings = ServerSettings(request_seconds=0.01)
        generations = Generations(settings, lambda _: None, lambda *each: cancelled.append(each), lambda *_: None)
        generations.submit(Request(1, [1], 1))
        await asyncio.sleep(0.1)

    asyncio.run(wait())
    assert cancelled == [(1, None)]


def test_one_prompt_that_does_not_fit_leaves_the_others_alone():
    gate = Gate()
    with running(scripted("fine", cache_len=64, on_step=gate)) as server:
        threads, answers = in_threads(server, 1)
        assert gate.reached.wait(20)
        refused = server.chat(LONG)
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
        gate.opened.set()
        threads[0].join()
        assert answers[0].json["choices"][0]["message"]["content"] == "fine"


def test_a_model_that_fails_says_so_and_a_sentence_reaches_everybody():
    """An error that no request is to blame for: the thread ends, and /health tells whoever restarts the server."""

    def fail(_number):
        raise KeyError("broken")

    with running(scripted("fine", "fine", on_step=fail)) as server:
        answer = server.chat()
        assert (answer.status, answer.error["code"]) == (503, "engine_failed")
        assert "KeyError" in answer.error["message"]
        assert server.ask("/health").status == 503
        assert server.ask("/ready").status == 503
        assert server.chat().status == 503


def test_a_call_that_hangs_fails_the_health_check():
    gate = Gate()
    with running(scripted("fine", on_step=gate), ServerSettings(stalled_seconds=0.2)) as server:
        assert server.ask("/health").status == 200
        threads, _ = in_threads(server, 1)
        assert gate.reached.wait(20)
        until(lambda: server.ask("/health").status == 503)
        assert server.ask("/slots").json["slots"] == []  # at once, so that the page goes on
        assert "has not answered" in server.ask("/health").json["detail"]
        gate.opened.set()
        threads[0].join()
        until(lambda: server.ask("/health").status == 200)


def test_a_key_is_required_where_there_are_keys():
    with running(scripted("fine", "fine"), keys=Keys((b"first-key", b"second-key"))) as server:
        refused = server.chat()
        assert (refused.status, refused.error["type"]) == (401, "authentication_error")
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer first", "Bearer first-key2", "Basic first-key", "Bearer", "Bearer \xe9"):
            assert server.ask("/v1/models", headers={"Authorization": wrong}).status == 401
        assert server.ask("/metrics").status == 401
        assert server.ask("/v1/models", headers={"Authorization": "Bearer second-key"}).status == 200
        assert server.ask("/v1/models", headers={"x-api-key": "first-key"}).status == 200
        assert server.ask("/health").status == server.ask("/ready").status == server.ask("/").status == 200


def test_only_this_machines_names_reach_a_server_that_others_cannot():
    """A page whose name was pointed at 127.0.0.1 is refused (DNS rebinding), and so is a form of another site."""
    with running(scripted("fine"), ServerSettings(allowed_hosts=("box.example",))) as server:
        for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("BOX.example:80", 200), ("evil.example", 421)):
            assert server.ask("/v1/models", headers={"Host": host}).status == status
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        body = {"model": NAME, "messages": HELLO}
        assert server.ask("/v1/chat/completions", body, headers={"Content-Type": "text/plain"}).status == 415


def test_a_server_answers_at_the_address_that_it_prints():
    with running(scripted("fine"), ServerSettings(host="127.0.0.2")) as server:
        assert server.ask("/health", headers={"Host": f"127.0.0.2:{server.port}"}).status == 200
    assert allowed_hosts((), None) is None
    assert allowed_hosts(("Box.example",), None) == LOOPBACK_NAMES | {"box.example"}


def test_a_body_that_does_not_come_ends_the_connection():
    with running(scripted("fine"), ServerSettings(request_seconds=0.2)) as server:
        connection = server.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model": ')
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (408, "timeout")
        assert response.headers["Connection"] == "close"
        connection.close()


def test_each_answer_has_the_requests_id():
    with running(scripted("fine")) as server:
        assert server.ask("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for unusable in ("", "x" * 200, "a b", 'a"'):
            given = server.ask("/v1/models", headers={"X-Request-Id": unusable}).headers["x-request-id"]
            assert given.startswith("req-")
