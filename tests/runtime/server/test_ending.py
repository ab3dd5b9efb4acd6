"""Clients that leave, and servers that end."""

import asyncio
import json
import threading
import time

import pytest

from runtime.errors import UserError
from runtime.server import process
from runtime.server.settings import ServerSettings
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, events_of, running, until
from tests.runtime.server.test_limits import Gate, in_threads, until_queued

HELLO = [{"role": "user", "content": "Hello"}]
LONG = " ".join(["word"] * 300)


def begun(server, **fields):
    """A connection over which a request was sent."""
    connection = server.connect()
    body = json.dumps({"model": NAME, "messages": HELLO, **fields})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_generation_ends_with_the_client(stream):
    """Within one step of the engine that has heard of it."""
    gate = Gate()
    gate.opened.set()
    slow = lambda number: (time.sleep(0.02), gate(number))  # noqa: E731
    with running(scripted(LONG, "fine", on_step=slow)) as server:
        connection = begun(server, stream=stream)
        until(lambda: gate.steps >= 3)
        if stream:
            assert connection.getresponse().read(10)
        connection.sock.close()
        connection.close()
        until(lambda: not server.service.generations.running)
        steps = gate.steps
        assert steps < 100
        assert server.chat().json["choices"][0]["message"]["content"] == "fine"
        assert all(slot["state"] == "idle" for slot in server.ask("/slots").json["slots"])


def test_a_client_that_leaves_the_queue_never_gets_a_slot():
    gate = Gate()
    with running(scripted("first", "third", on_step=gate)) as server:
        threads, _ = in_threads(server, 1)
        assert gate.reached.wait(20)
        waiting = begun(server)
        until_queued(server, 2, 1)
        waiting.sock.close()
        generations = server.service.generations
        until(lambda: sum(bool(each._open) for each in generations._running.values()) == 1)  # the server has seen it
        assert server.ask("/health").status == 200  # and has told the engine, which its event loop does in one go
        gate.opened.set()
        threads[0].join()
        until(lambda: not server.service.generations.running)
        assert server.chat().json["choices"][0]["message"]["content"] == "third"


def test_answers_end_whole_when_the_server_is_told_to_end():
    gate = Gate()
    with running(scripted("fine words", on_step=gate)) as server:
        connection = begun(server, stream=True)
        assert gate.reached.wait(20)
        server.end()
        until(lambda: server.service.state == "draining")
        assert server.ask("/ready").status == 503
        assert server.ask("/health").status == 200
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        gate.opened.set()
        events = events_of(connection.getresponse().read())
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
        assert (text, events[-1]) == ("fine words", "[DONE]")
        server.ended.join(20)
        assert not server.ended.is_alive()  # though the client keeps its connection


def test_a_server_that_ends_says_so_before_it_refuses():
    """So that a gateway, which asks /ready now and then, sends it nothing more by the time that it refuses."""
    gate = Gate()
    with running(scripted("fine", "taken", on_step=gate), ServerSettings(unready_seconds=600)) as server:
        connection = begun(server)
        assert gate.reached.wait(20)
        server.end()
        until(lambda: server.ask("/ready").status == 503)
        gate.opened.set()
        assert server.chat().json["choices"][0]["message"]["content"] == "taken"
        assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "fine"
        server.end()  # in a hurry


def test_a_server_says_that_it_ends_also_if_nothing_runs():
    with running(scripted(), ServerSettings(unready_seconds=0.3)) as server:
        told = time.monotonic()
        server.end()
        server.ended.join(20)
        assert not server.ended.is_alive()
        assert time.monotonic() - told >= 0.3


def test_a_server_refuses_after_it_has_said_long_enough_that_it_ends():
    gate = Gate()
    with running(scripted("fine", on_step=gate), ServerSettings(unready_seconds=0.05)) as server:
        connection = begun(server)
        assert gate.reached.wait(20)
        server.end()
        until(lambda: server.chat(model="another").error["code"] == "draining")  # until then it is not found
        gate.opened.set()
        assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("why", ["asked twice", "still loading", "failed"])
def test_a_server_need_not_wait_before_it_refuses(why):
    """When someone is in a hurry, or it takes no requests anyway."""
    loading = threading.Event()
    opened = scripted("fine", on_step=lambda _number: 1 / 0)

    def open_model():
        assert why != "still loading" or loading.wait(20)
        return opened()

    with running(open_model, ServerSettings(unready_seconds=600), wait=why != "still loading") as server:
        if why == "failed":
            assert server.chat().error["code"] == "engine_failed"
        server.end()
        if why != "failed":
            until(lambda: server.service.state == "draining")
        loading.set()
        if why == "asked twice":
            server.end()
        server.ended.join(20)
        assert not server.ended.is_alive()


def hold_encoding(server):
    """The gate at which texts wait before they are encoded."""
    gate, encode = Gate(), server.service.encode
    server.service.encode = lambda function: encode(lambda: (gate(0), function())[1])
    return gate


def test_a_request_whose_text_is_being_encoded_is_answered_before_the_end():
    with running(scripted("fine")) as server:
        gate = hold_encoding(server)
        connection = begun(server)
        assert gate.reached.wait(20)
        server.end()
        until(lambda: server.service.state == "draining")
        time.sleep(0.1)  # in which a server that forgot it would end
        gate.opened.set()
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["message"]["content"] == "fine"


def test_a_request_that_reaches_an_engine_that_has_failed_is_told_so():
    """Its text was being encoded meanwhile."""

    def fail(_number):
        raise KeyError("broken")

    with running(scripted("fine", on_step=fail)) as server:
        gate = hold_encoding(server)
        connection = begun(server)
        assert gate.reached.wait(20)
        server.service.encode = lambda function: asyncio.to_thread(function)
        assert server.chat().status == 503
        gate.opened.set()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "engine_failed")


def test_a_body_that_never_comes_does_not_hold_the_end_up(monkeypatch, capfd):
    monkeypatch.setattr(process, "CLOSING_SECONDS", 0.2)
    with running(scripted("fine")) as server:
        connection = server.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model": ')
        assert server.ask("/health").status == 200
        server.end()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "draining")
        server.ended.join(20)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("twice", [False, True], ids=["after a while", "asked twice"])
def test_answers_that_take_too_long_end_with_an_error(twice):
    gate = Gate()
    settings = ServerSettings(drain_seconds=600 if twice else 0.1)
    with running(scripted(LONG, on_step=gate), settings) as server:
        connection = begun(server, stream=True)
        assert gate.reached.wait(20)
        server.end()
        if twice:
            until(lambda: server.service.state == "draining")
            server.end()
        until(lambda: server.service.generations.running == 0)
        gate.opened.set()
        events = events_of(connection.getresponse().read())
        assert events[-1]["error"]["code"] == "draining"
        server.ended.join(20)


def test_a_server_answers_while_its_model_is_being_loaded():
    loading = threading.Event()
    opened = scripted("fine")

    def slowly():
        assert loading.wait(20)
        return opened()

    with running(slowly, wait=False) as server:
        assert (server.ask("/health").status, server.ask("/ready").status) == (200, 503)
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "loading")
        assert server.ask("/slots").json["slots"] == []
        assert server.ask("/v1/models").status == 200
        loading.set()
        until(lambda: server.ask("/ready").status == 200)
        assert server.chat().status == 200


def test_a_model_that_cannot_be_opened_ends_the_server():
    def fail():
        raise UserError("the artifact is damaged")

    with pytest.raises(AssertionError, match="the artifact is damaged"), running(fail):
        pass


def test_files_that_are_not_for_https_end_the_server_before_it_says_that_it_is_ready(tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for path in (junk, tmp_path / "missing.pem"):
        settings = ServerSettings(tls_certificate=str(path), tls_key=str(path))
        with pytest.raises(AssertionError, match=r"cannot be used for HTTPS"), running(scripted("fine"), settings):
            pass


def test_a_silent_stream_sends_comments():
    gate = Gate()
    with running(scripted("fine", on_step=gate), ServerSettings(ping_seconds=0.05)) as server:
        connection = begun(server, stream=True)
        assert gate.reached.wait(20)
        response = connection.getresponse()
        found = b""
        while found.count(b": ping\n\n") < 3:
            found += response.read1(100)
        assert events_of(found)[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        gate.opened.set()
        assert events_of(response.read())[-1] == "[DONE]"
