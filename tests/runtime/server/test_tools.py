"""Tool calls, and answers that fit a schema, over HTTP."""

import json

import pytest

from tests.helpers.scripted_engine import EOS, PIECES
from tests.helpers.scripted_service import call_ids, scripted
from tests.helpers.serving import running

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


WORDS = [*PIECES.encode("I would rather talk"), EOS]


def test_a_call_is_whole_or_in_pieces():
    with running(scripted(call_ids(), call_ids())) as server:
        choice = server.chat(messages=HELLO, tools=[WEATHER]).json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        events = server.stream({"messages": HELLO, "tools": [WEATHER]})
        pieces = [piece for event in events[:-1] for piece in event["choices"][0]["delta"].get("tool_calls", ())]
        assert [piece["function"].get("name") for piece in pieces] == ["get_weather"] + [None] * (len(pieces) - 1)
        assert pieces[0]["id"]
        assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
        assert len(pieces) > 2
        assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
        assert not any(event["choices"][0]["delta"].get("content") for event in events[:-1])


def test_ids_of_other_servers_are_taken():
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": "sunny"},
    ]
    with running(scripted("It is sunny.")) as server:
        assert server.chat(messages=messages).json["choices"][0]["message"]["content"] == "It is sunny."


def test_a_required_call_is_forced_and_a_forbidden_one_cannot_come():
    """The model wants to say something else; the grammar leaves it no choice."""
    with running(scripted(*[WORDS] * 20)) as server:
        choice = server.chat(
            messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=12, temperature=0
        ).json["choices"][0]
        assert (choice["message"]["content"] or "") == ""
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tools"),
        ({"tools": [{**WEATHER, "function": {"name": "a b"}}]}, ("messages", "tools")),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": "start: missing"}}, "response_format"),
    ],
)
def test_what_cannot_be_asked_for_is_named(fields, param):
    with running(scripted("fine")) as server:
        answer = server.chat(messages=HELLO, **fields)
        assert answer.status == 400, answer.body
        assert answer.error["param"] in (param if isinstance(param, tuple) else (param,))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_fits_its_schema(stream):
    """Whatever the model wants to say: random words, at a temperature at which any token may come."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    fields = {"messages": HELLO, "response_format": form, "temperature": 100, "max_tokens": 200}
    with running(scripted(*[WORDS] * 2000)) as server:
        for seed in range(5):
            if stream:
                events = server.stream({**fields, "seed": seed})[:-1]
                text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
                reason = events[-1]["choices"][0]["finish_reason"]
            else:
                choice = server.chat(**fields, seed=seed).json["choices"][0]
                text, reason = choice["message"]["content"], choice["finish_reason"]
            assert reason == "stop"
            person = json.loads(text)
            assert person.keys() == {"name", "age"}
            assert 0 <= person["age"] <= 99
