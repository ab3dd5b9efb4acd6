"""OpenAI's own client for Python."""

import json
import threading
import time
from contextlib import contextmanager

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from runtime.server.http.failures import RequestFailure
from runtime.server.settings import Keys, ServerSettings
from tests.helpers.scripted_service import call_ids, scripted
from tests.helpers.serving import NAME, running

HELLO = [{"role": "user", "content": "Hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
REPLY = "Bonjour, ça va ?"


def client_of(server, **options):
    return openai.OpenAI(base_url=f"{server.address}/v1", **{"api_key": "unused", "max_retries": 0, **options})


@pytest.fixture
def served_reply():
    """A client of a server that says `REPLY` to whatever comes first and second."""
    with running(scripted(REPLY, REPLY)) as server, client_of(server) as client:
        yield client


def test_chat_whole_and_as_a_stream(served_reply):
    whole = served_reply.chat.completions.create(model=NAME, messages=HELLO, temperature=0)
    assert whole.choices[0].message.content == REPLY
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"include_usage": True}
    chunks = list(
        served_reply.chat.completions.create(
            model=NAME, messages=HELLO, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_puts_the_answer_together(served_reply):
    with served_reply.chat.completions.stream(model=NAME, messages=HELLO, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == REPLY


def test_log_probabilities_come_beside_the_tokens(served_reply):
    choice = served_reply.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)


def test_completions(served_reply):
    whole = served_reply.completions.create(model=NAME, prompt="Hello", temperature=0, max_tokens=3)
    assert whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    chunks = served_reply.completions.create(model=NAME, prompt=[1, 22557], temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks).strip() == REPLY


def test_models(served_reply):
    assert [model.id for model in served_reply.models.list()] == [NAME]
    assert served_reply.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError):
        served_reply.models.retrieve("another")


def test_responses_whole_and_as_a_stream(served_reply):
    whole = served_reply.responses.create(model=NAME, input="Hello", instructions="Be brief.", store=False)
    assert whole.output_text == REPLY
    assert whole.status == "completed"
    assert whole.usage.output_tokens > 0
    with served_reply.responses.stream(model=NAME, input="Hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == REPLY
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == REPLY


def test_an_answer_continues_as_the_next_input():
    with running(scripted(REPLY, "Bien.")) as server, client_of(server) as client:
        first = client.responses.create(model=NAME, input="Hello")
        again = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "Et toi ?"}]
        assert client.responses.create(model=NAME, input=again).output_text == "Bien."


def test_every_event_fits_the_types_of_the_client():
    """A client builds its types without checking; here each event is checked against them."""
    with running(scripted(REPLY)) as server:
        events = server.stream({"input": "Hello"}, "/v1/responses")
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "another"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
    ],
)
def test_errors_are_those_of_the_client(served_reply, fields, kind, param):
    with pytest.raises(kind) as failure:
        served_reply.chat.completions.create(**{"model": NAME, "messages": HELLO, **fields})
    assert failure.value.param == param
    assert failure.value.request_id


def test_a_key_is_asked_for():
    with running(scripted(REPLY), keys=Keys((b"secret",))) as server:
        with client_of(server) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, api_key="secret") as client:
            assert client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message.content == REPLY


def test_tool_calls_whole_and_as_a_stream():
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
    with running(scripted(call_ids(), call_ids(), "Sunny.")) as server, client_of(server) as client:
        asked = {"model": NAME, "messages": HELLO, "tools": tools}
        (choice,) = client.chat.completions.create(**asked).choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            (streamed,) = stream.get_final_completion().choices
        assert kinds.count("tool_calls.function.arguments.done") == 1
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
        turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
        (last,) = client.chat.completions.create(model=NAME, messages=turns, tools=tools).choices
        assert last.message.content == "Sunny."


def test_responses_call_tools():
    tools = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}]
    with running(scripted(call_ids(), call_ids(), "Sunny.")) as server, client_of(server) as client:
        asked = {"model": NAME, "input": "Hello", "tools": tools}
        (call,) = client.responses.create(**asked).output
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "get_weather",
            {"city": "Paris"},
        )
        with client.responses.stream(**asked) as stream:
            deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            (streamed,) = stream.get_final_response().output
        assert "".join(deltas) == streamed.arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
        turns = [{"role": "user", "content": "Hello"}, call, result]
        assert client.responses.create(model=NAME, input=turns, tools=tools).output_text == "Sunny."


@contextmanager
def a_full_queue(opened):
    """A server with one request in its slot and one that waits, until `opened` is set."""
    model = scripted(REPLY, REPLY, REPLY, on_step=lambda _number: opened.wait(30))
    with running(model, ServerSettings(max_queued=1)) as server:
        generations = server.service.generations
        others = [threading.Thread(target=server.chat) for _ in range(2)]
        for number, thread in enumerate(others):
            thread.start()
            while generations.running <= number or generations.waiting != number:
                time.sleep(0.005)
        yield server
        opened.set()
        for thread in others:
            thread.join()


def test_a_full_queue_is_an_exception_of_its_own():
    with a_full_queue(threading.Event()) as server, client_of(server) as client:
        with pytest.raises(openai.RateLimitError) as failure:
            client.chat.completions.create(model=NAME, messages=HELLO)
        assert int(failure.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_tried_again():
    """The client waits as long as the server's Retry-After says, and comes back by itself."""
    opened, refused = threading.Event(), []
    with a_full_queue(opened) as server, client_of(server, max_retries=1) as client:
        generations = server.service.generations
        check_place = generations.check_place

        def noted(*arguments):
            try:
                check_place(*arguments)
            except RequestFailure:
                refused.append(time.monotonic())
                opened.set()  # there will be a place when the client comes back
                raise

        generations.check_place = noted
        assert client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message.content == REPLY
    (when,) = refused
    assert time.monotonic() - when >= 1
