"""`/v1/messages`: what a request becomes for chat, and the events and blocks of an answer."""

import time

import msgspec
import pytest

from runtime.server.api import chat, messages
from runtime.server.api.common import CompletionTokensDetails, PromptTokensDetails, Usage
from runtime.server.converters.messages_input import chat_request
from runtime.server.converters.messages_output import MessageWriter
from runtime.server.http.bodies import parse
from runtime.server.http.failures import RequestFailure
from runtime.server.settings import Keys, ServerSettings
from tests.helpers.chat_pieces import pieces_of
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running

USAGE = Usage(10, 5, 15, PromptTokensDetails(4), CompletionTokensDetails(2))
HELLO = [{"role": "user", "content": "Hello"}]


def asked(**fields):
    body = {"model": NAME, "max_tokens": 20, "messages": HELLO, **fields}
    return parse(msgspec.json.encode(body), messages.MessagesRequest)


def written(pieces):
    """The answer of these pieces, whole and as events, both as a client sees them."""
    whole, writer = MessageWriter("msg-1", NAME, 10), MessageWriter("msg-1", NAME, 10)
    for piece in pieces:
        whole.push(piece)
    events = [*writer.begin(), *(event for piece in pieces for event in writer.push(piece)), *writer.end(USAGE)]
    return (msgspec.json.decode(msgspec.json.encode(each)) for each in (whole.message(USAGE), events))


def test_blocks_become_messages():
    request = asked(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "2 + 2?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Add.", "signature": "s"},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 2}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "4"}]},
                    {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True},
                    {"type": "text", "text": "So?"},
                ],
            },
            {"role": "system", "content": "Hurry."},
        ],
    )
    assert chat_request(request).messages == [
        chat.SystemMessage([chat.TextPart("Be brief.")]),
        chat.UserMessage("2 + 2?"),
        chat.AssistantMessage(
            content="One moment.",
            reasoning_content="Add.",
            tool_calls=[chat.ToolCall("toolu_1", chat.CalledFunction("add", '{"a":2}'))],
        ),
        chat.ToolMessage([chat.TextPart("4")], "toolu_1"),
        chat.ToolMessage("", "toolu_2"),
        chat.UserMessage([chat.TextPart("So?")]),
        chat.SystemMessage("Hurry."),
    ]


def test_settings_become_those_of_chat():
    schema = {"type": "object"}
    request = chat_request(
        asked(
            tools=[{"name": "add", "input_schema": schema, "description": "adds"}],
            tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
            stop_sequences=["END"],
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            metadata={"user_id": "u"},
            output_config={"format": {"type": "json_schema", "schema": schema}},
        )
    )
    assert request.tools == [chat.ToolSpec(chat.FunctionSpec("add", "adds", schema), "function")]
    assert request.tool_choice == chat.NamedTool(chat.NamedFunction("add"), "function")
    assert request.parallel_tool_calls is False
    assert request.stop == ["END"]
    assert (request.max_completion_tokens, request.temperature, request.top_k, request.top_p) == (20, 0.5, 3, 0.9)
    assert request.user == "u"
    assert request.response_format.json_schema.schema == schema


@pytest.mark.parametrize(
    ("given", "expected"), [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none")]
)
def test_choices_of_tools_have_other_names(given, expected):
    assert chat_request(asked(tool_choice=given)).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"mcp_servers": []}, "mcp_servers"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(fields, param):
    with pytest.raises(RequestFailure) as failure:
        asked(**fields)
    assert failure.value.body.error.param == param


def test_a_text_is_one_block():
    whole, events = written(pieces_of("Bon", "jour"))
    assert whole == {
        "id": "msg-1",
        "type": "message",
        "role": "assistant",
        "model": NAME,
        "content": [{"type": "text", "text": "Bonjour"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_read_input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "output_tokens": 5,
        },
    }
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    assert events[1:] == [
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Bon"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "jour"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": whole["usage"],
        },
        {"type": "message_stop"},
    ]


def test_thinking_text_and_calls_are_blocks_of_their_own():
    whole, events = written(
        pieces_of(
            ("reasoning", "Hmm."),
            "Let me see.",
            ("call", 0, "abc", "add", ""),
            ("call", 0, None, None, '{"a":'),
            ("call", 0, None, None, " 1}"),
            ("call", 1, "def", "sub", "{}"),
            finish_reason="tool_calls",
        )
    )
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hmm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "abc", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "def", "name": "sub", "input": {}},
    ]
    assert whole["stop_reason"] == "tool_use"
    of_call = [event for event in events if event.get("index") == 2]
    assert of_call[0]["content_block"] == {"type": "tool_use", "id": "abc", "name": "add", "input": {}}
    assert "".join(event["delta"]["partial_json"] for event in of_call[1:-1]) == '{"a": 1}'
    # what is sent back as it came is understood
    again = chat_request(asked(messages=[*HELLO, {"role": "assistant", "content": whole["content"]}])).messages[1]
    assert (again.reasoning_content, again.content) == ("Hmm.", "Let me see.")


def test_a_call_that_was_cut_has_no_input():
    whole, _ = written(pieces_of(("call", 0, "abc", "add", '{"a":'), finish_reason="length"))
    assert whole["content"] == [{"type": "tool_use", "id": "abc", "name": "add", "input": {}}]
    assert whole["stop_reason"] == "max_tokens"


def test_the_stop_sequence_that_ended_the_text_is_named():
    with running(scripted("un deux trois", "un deux trois")) as server:
        body = {"model": NAME, "max_tokens": 20, "messages": HELLO, "stop_sequences": ["trois", "quatre"]}
        whole = server.ask("/v1/messages", body).json
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "trois")
        assert whole["content"][0]["text"].strip() == "un deux"
        events = server.stream(body, "/v1/messages")
        assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "trois"}


def test_chat_names_the_stop_string_whole_and_as_a_stream_too():
    with running(scripted("un deux trois", "un deux", "un deux trois")) as server:
        (choice,) = server.chat(stop=["trois"]).json["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "trois")
        assert "stop_reason" not in server.chat(stop=["trois"]).json["choices"][0]
        events = server.stream({"messages": HELLO, "stop": ["trois"]})
        assert events[-2]["choices"][0]["stop_reason"] == "trois"


def test_errors_are_in_the_form_of_this_api():
    with running(scripted("x"), keys=Keys((b"secret",))) as server:
        keyless = server.ask("/v1/messages", {})
        assert (keyless.status, keyless.error["type"]) == (401, "authentication_error")
        assert keyless.json["type"] == "error"
        assert keyless.json["request_id"] == keyless.headers["x-request-id"]
        key = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
        wrong = server.ask("/v1/messages", {"model": NAME, "messages": HELLO}, headers=key)
        assert (wrong.status, wrong.error["type"]) == (400, "invalid_request_error")
        assert "max_tokens" in wrong.error["message"]
        missing = server.ask("/v1/messages", {"model": "x", "messages": HELLO, "max_tokens": 1}, headers=key)
        assert (missing.status, missing.error["type"]) == (404, "not_found_error")


def test_a_failure_during_a_stream_is_its_last_event():
    with running(scripted("un deux trois", on_step=lambda number: None if number < 2 else 1 / 0)) as server:
        events = server.stream({"messages": HELLO, "max_tokens": 20}, "/v1/messages")
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "overloaded_error"


def test_a_silent_stream_sends_pings():
    with running(scripted("un", on_prefill=lambda: time.sleep(0.3)), ServerSettings(ping_seconds=0.05)) as server:
        events = server.stream({"messages": HELLO, "max_tokens": 20}, "/v1/messages")
    assert sum(event["type"] == "ping" for event in events) > 1


def test_tokens_of_a_conversation_are_counted():
    with running(scripted()) as server:
        found = server.ask("/v1/messages/count_tokens", {"model": NAME, "messages": HELLO}).json
        assert found == {"input_tokens": len(server.ask("/tokenize", {"messages": HELLO}).json["tokens"])}
