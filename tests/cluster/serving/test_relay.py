"""A request's way to an application in another process, without the process."""

import asyncio
from contextlib import aclosing

import pytest

from cluster.serving.relay import RelayedRequest, answered

REQUEST = RelayedRequest("POST", "/v1/x", b"a=1", ((b"name", b"value"),), None, b"body", "key")
START = {"type": "http.response.start", "status": 200, "headers": []}


def piece(body, more=True):
    return {"type": "http.response.body", "body": body, "more_body": more}


async def collected(app):
    return [message async for messages in answered(app, REQUEST) for message in messages]


def test_an_application_sees_the_request_and_its_messages_come_back():
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope, message=await receive())
        for message in (START, piece(b"1"), piece(b"2", more=False)):
            await send(message)

    assert asyncio.run(collected(app)) == [START, piece(b"1"), piece(b"2", more=False)]
    assert (seen["method"], seen["path"], seen["query_string"]) == ("POST", "/v1/x", b"a=1")
    assert seen["headers"] == [(b"name", b"value")]
    assert seen["message"] == {"type": "http.request", "body": b"body", "more_body": False}


def test_pieces_come_as_soon_as_they_are_there():
    async def main():
        going_on = asyncio.Event()

        async def app(_scope, _receive, send):
            await send(START)
            await going_on.wait()
            await send(piece(b"", more=False))

        async with aclosing(answered(app, REQUEST)) as messages:
            assert await anext(messages) == [START]
            going_on.set()
            assert await anext(messages) == [piece(b"", more=False)]

    asyncio.run(main())


def test_an_application_is_told_that_its_client_has_left():
    told = []

    async def app(_scope, receive, send):
        await receive()
        await send(START)
        told.append((await receive())["type"])

    async def main():
        async with aclosing(answered(app, REQUEST)) as messages:
            await anext(messages)

    asyncio.run(main())
    assert told == ["http.disconnect"]


def test_one_that_does_not_end_is_cancelled(monkeypatch):
    monkeypatch.setattr("cluster.serving.relay.END_SECONDS", 0.05)
    ended = []

    async def app(_scope, _receive, send):
        await send(START)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main():
        async with aclosing(answered(app, REQUEST)) as messages:
            await anext(messages)

    asyncio.run(main())
    assert ended == [True]


def test_an_error_of_the_application_comes_after_its_messages():
    async def app(_scope, _receive, send):
        await send(START)
        raise ValueError("broken")

    async def main():
        messages = answered(app, REQUEST)
        assert await anext(messages) == [START]
        with pytest.raises(ValueError, match="broken"):
            await anext(messages)

    asyncio.run(main())
