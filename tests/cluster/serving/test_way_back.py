"""Answers whose replica is gone, in the form of each API."""

import asyncio
import json

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.serving.way_back import WayBack, failure_of
from runtime.server.http.failures import RequestFailure

STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
WHOLE = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
EVENT = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}

GONE = ActorUnavailableError("10.0.0.7 is gone", None)


def lost(path, *messages):
    """What a client has got once the replica is gone after these messages."""
    sent = []

    async def main():
        async def send(message):
            sent.append(message)

        way_back = WayBack(path, send)
        await way_back.send(list(messages))
        await way_back.fail(failure_of(GONE, "demo"))

    asyncio.run(main())
    return sent


def data(message):
    return json.loads(message["body"].partition(b"data: ")[2])


def test_a_chat_ends_with_an_error_and_without_done():
    last = lost("/v1/chat/completions", STREAM, EVENT)[-1]
    assert data(last)["error"]["code"] == "replica_lost"
    assert last["more_body"] is False
    assert b"[DONE]" not in last["body"]


def test_messages_end_with_anthropics_error():
    last = lost("/v1/messages", STREAM, EVENT)[-1]
    assert last["body"].startswith(b"event: error\n")
    assert data(last)["type"] == "error"
    assert data(last)["error"]["type"] == "overloaded_error"


def test_responses_end_with_an_error_that_is_numbered():
    last = lost("/v1/responses", STREAM, EVENT, EVENT)[-1]
    assert last["body"].startswith(b"event: error\n")
    assert (data(last)["type"], data(last)["sequence_number"]) == ("error", 2)


@pytest.mark.parametrize("messages", [(), (WHOLE,)])
def test_an_answer_that_is_no_stream_is_refused(messages):
    with pytest.raises(RequestFailure) as caught:
        lost("/v1/chat/completions", *messages)
    assert caught.value.status == 503
    assert caught.value.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "queue_full"),
        (TimeoutError(), 503, "timeout"),
        (DeploymentUnavailableError("demo"), 503, "model_unavailable"),
        (GONE, 503, "replica_lost"),
        (RuntimeError("Unexpected error (StatusCode.UNKNOWN): 10.0.0.7:4711"), 503, "replica_lost"),
    ],
)
def test_every_error_is_told_without_what_is_inside_the_cluster(error, status, code):
    failure = failure_of(error, "demo")
    assert (failure.status, failure.body.error.code) == (status, code)
    assert int(failure.headers["Retry-After"]) > 0
    assert "10.0.0.7" not in failure.body.error.message
