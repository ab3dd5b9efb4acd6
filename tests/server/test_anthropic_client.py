"""Anthropic's own client for Python."""

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from runtime.server.settings import Keys
from tests.helpers.scripted_service import call_ids, scripted
from tests.helpers.serving import NAME, running

HELLO = [{"role": "user", "content": "Hello"}]
REPLY = "Bonjour, ça va ?"
KEY = "secret"


@pytest.fixture
def client():
    """A client of a server that says `REPLY` to whatever comes first and second."""
    with (
        running(scripted(REPLY, REPLY), keys=Keys((KEY.encode(),))) as server,
        anthropic.Anthropic(base_url=server.address, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_messages_whole_and_as_a_stream(client):
    asked = {"model": NAME, "max_tokens": 30, "messages": HELLO, "system": "Be brief."}
    whole = client.messages.create(**asked)
    assert whole.content[0].text == REPLY
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == REPLY
        final = stream.get_final_message()
    assert final.content[0].text == REPLY
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    used = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert used == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_tools_are_used_whole_and_as_a_stream():
    tools = [{"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    with (
        running(scripted(call_ids(), call_ids(), "Sunny.")) as server,
        anthropic.Anthropic(base_url=server.address, api_key=KEY, max_retries=0) as client,
    ):
        asked = {"model": NAME, "max_tokens": 60, "messages": HELLO, "tools": tools}
        whole = client.messages.create(**asked)
        (call,) = whole.content
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
        assert whole.stop_reason == "tool_use"
        with client.messages.stream(**asked) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert len(pieces) > 1
        assert final.content[0].input == {"city": "Paris"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}
        turns = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**{**asked, "messages": turns}).content[0].text == "Sunny."


def test_every_event_fits_the_types_of_the_client():
    """A client builds its types without checking; here each event is checked against them."""
    with running(scripted(REPLY)) as server:
        events = server.stream({"messages": HELLO, "max_tokens": 30}, "/v1/messages")
    for event in events:
        if event["type"] != "ping":  # of which the client makes nothing
            TypeAdapter(RawMessageStreamEvent).validate_python(event)


def test_tokens_are_counted(client):
    assert client.messages.count_tokens(model=NAME, messages=HELLO).input_tokens > 0


def test_an_answer_continues_as_the_next_message(client):
    first = client.messages.create(model=NAME, max_tokens=30, messages=HELLO)
    turns = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Et toi ?"}]
    assert client.messages.create(model=NAME, max_tokens=30, messages=turns).content[0].text == REPLY


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "another"}, anthropic.NotFoundError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"extra_body": {"no_such_field": 1}}, anthropic.BadRequestError),
    ],
)
def test_errors_are_those_of_the_client(client, fields, kind):
    with pytest.raises(kind) as failure:
        client.messages.create(**{"model": NAME, "max_tokens": 30, "messages": HELLO, **fields})
    assert failure.value.body["type"] == "error"
    assert failure.value.request_id


def test_a_key_is_asked_for(client):
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=NAME, max_tokens=30, messages=HELLO)


def test_a_failure_during_a_stream_is_raised():
    def fail(number):
        if number == 2:
            raise ArithmeticError("broken on purpose")

    with (
        running(scripted(REPLY, on_step=fail)) as server,
        anthropic.Anthropic(base_url=server.address, api_key=KEY, max_retries=0) as client,
        client.messages.stream(model=NAME, max_tokens=30, messages=HELLO) as stream,
        pytest.raises(anthropic.APIStatusError, match="broken on purpose"),
    ):
        list(stream)
