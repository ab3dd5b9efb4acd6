"""`/v1/responses`: what a request becomes for chat, and the events and items of an answer."""

import msgspec
import pytest

from runtime.server.api import chat, responses
from runtime.server.api.common import CompletionTokensDetails, PromptTokensDetails, Usage
from runtime.server.converters.reply_parts import ReplyParts
from runtime.server.converters.responses_input import chat_request
from runtime.server.converters.responses_output import ResponseWriter
from runtime.server.http.bodies import parse
from runtime.server.http.failures import RequestFailure, broken
from runtime.server.settings import ServerSettings
from tests.helpers.chat_pieces import pieces_of
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running

USAGE = Usage(10, 5, 15, PromptTokensDetails(4), CompletionTokensDetails(2))


def asked(**fields):
    body = {"model": NAME, "input": "Hello", **fields}
    return parse(msgspec.json.encode(body), responses.ResponsesRequest)


def written(pieces, **fields):
    """The answer of these pieces, whole and as events, both as a client sees them."""
    whole = ResponseWriter(asked(**fields), "resp-1", 7, NAME)
    for piece in pieces:
        whole.push(piece)
    writer = ResponseWriter(asked(**fields), "resp-1", 7, NAME)
    events = [*writer.begin(), *(event for piece in pieces for event in writer.push(piece)), *writer.end(USAGE)]
    return msgspec.to_builtins(whole.response(USAGE)), [msgspec.to_builtins(event) for event in events]


def test_items_become_messages():
    request = asked(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": "2 + 2?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Add."}]},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}],
            },
            {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 2}', "id": "fc_1"},
            {"type": "function_call", "call_id": "call_2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "4"},
            {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "0"}]},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Go on."}]},
        ],
    )
    assert chat_request(request).messages == [
        chat.SystemMessage("Be brief."),
        chat.UserMessage("2 + 2?"),
        chat.AssistantMessage(
            content="One moment.",
            reasoning_content="Add.",
            tool_calls=[
                chat.ToolCall("call_1", chat.CalledFunction("add", '{"a": 2}')),
                chat.ToolCall("call_2", chat.CalledFunction("add", "{}")),
            ],
        ),
        chat.ToolMessage("4", "call_1"),
        chat.ToolMessage([chat.TextPart("0")], "call_2"),
        chat.DeveloperMessage([chat.TextPart("Go on.")]),
    ]


def test_settings_become_those_of_chat():
    schema = {"type": "object"}
    request = chat_request(
        asked(
            tools=[{"type": "function", "name": "add", "parameters": schema, "strict": True}],
            tool_choice={"type": "function", "name": "add"},
            parallel_tool_calls=False,
            text={"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}},
            max_output_tokens=5,
            temperature=0,
            top_p=0.5,
            include=["message.output_text.logprobs"],
            top_logprobs=2,
        )
    )
    assert request.tools == [chat.ToolSpec(chat.FunctionSpec("add", None, schema, True), "function")]
    assert request.tool_choice == chat.NamedTool(chat.NamedFunction("add"), "function")
    assert request.parallel_tool_calls is False
    assert request.response_format == chat.JsonSchemaFormat(chat.JsonSchema("sum", schema, None, True))
    assert (request.max_completion_tokens, request.temperature, request.top_p) == (5, 0, 0.5)
    assert (request.logprobs, request.top_logprobs) == (True, 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "computer_call"}]}, "input[1].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "extra": 1}]}, "input[0].extra"),
        ({"input": [{"type": ["message"], "role": "user", "content": "x"}]}, "input[0].type"),
        ({"input": ["x"]}, "input[0]"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(fields, param):
    with pytest.raises(RequestFailure) as failure:
        chat_request(asked(**fields))
    assert failure.value.status == 400
    assert failure.value.body.error.param == param


def test_a_text_is_one_message():
    whole, events = written(pieces_of("Bon", "jour"))
    (item,) = whole["output"]
    assert item.pop("id").startswith("msg_")
    text = {"type": "output_text", "text": "Bonjour", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [text]}
    assert whole["status"] == "completed"
    assert whole["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["delta"] for event in events if "delta" in event] == ["Bon", "jour"]
    assert events[2]["item"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == []
    assert events[6]["text"] == "Bonjour"
    assert {event["item_id"] for event in events if "item_id" in event} == {events[2]["item"]["id"]}
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


def test_reasoning_text_and_calls_are_items_of_their_own():
    whole, events = written(
        pieces_of(
            ("reasoning", "Hm"),
            ("reasoning", "m."),
            "Let me see.",
            ("call", 0, "abc", "add", ""),
            ("call", 0, None, None, '{"a":'),
            ("call", 0, None, None, " 1}"),
            ("call", 1, "def", "sub", "{}"),
            finish_reason="tool_calls",
        )
    )
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert whole["output"][0]["summary"] == []
    calls = [{key: item[key] for key in ("call_id", "name", "arguments", "status")} for item in whole["output"][2:]]
    assert calls == [
        {"call_id": "abc", "name": "add", "arguments": '{"a": 1}', "status": "completed"},
        {"call_id": "def", "name": "sub", "arguments": "{}", "status": "completed"},
    ]
    kinds = [event["type"].removeprefix("response.") for event in events if event.get("output_index") == 2]
    assert kinds == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    added = next(event for event in events if event.get("output_index") == 2)
    assert (added["item"]["name"], added["item"]["arguments"]) == ("add", "")
    # what is sent back as it came is understood
    again = chat_request(asked(input=[{"role": "user", "content": "x"}, *whole["output"]])).messages[1]
    assert (again.reasoning_content, again.content) == ("Hmm.", "Let me see.")
    assert [call.id for call in again.tool_calls] == ["abc", "def"]


def test_an_answer_that_was_cut_is_incomplete():
    whole, events = written(pieces_of("Bonj", finish_reason="length"))
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"
    assert events[-1]["type"] == "response.incomplete"


def test_an_answer_that_fails_keeps_what_there_is():
    writer = ResponseWriter(asked(), "resp-1", 7, NAME)
    for piece in pieces_of("Bonj", finish_reason=None):
        writer.push(piece)
    event = msgspec.to_builtins(writer.fail(broken("the engine is gone")))
    assert event["type"] == "response.failed"
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "the engine is gone"}
    assert event["response"]["output"][0]["content"][0]["text"] == "Bonj"


def test_logprobs_lie_beside_the_text():
    with running(scripted("Bonjour !")) as server:
        body = {"model": NAME, "input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
        (item,) = server.ask("/v1/responses", body).json["output"]
    logprobs = item["content"][0]["logprobs"]
    assert "Bonjour" in "".join(one["token"] for one in logprobs)
    assert all(len(one["top_logprobs"]) == 1 for one in logprobs)


def test_log_probabilities_of_thoughts_and_calls_are_not_those_of_the_text():
    def piece(delta, token, reason=None):
        return chat.ChunkChoice(0, delta, chat.ChoiceLogprobs([chat.TokenLogprob(token, -1.0, [], [])]), reason)

    parts = ReplyParts()
    for one in (
        piece(chat.Delta(reasoning_content="Hm"), "Hm"),
        piece(chat.Delta(), "[/THINK]"),
        piece(chat.Delta(content="So "), "So "),
        piece(chat.Delta(), "half"),
        piece(chat.Delta(content="whole"), "other half"),
        *pieces_of(("call", 0, "abc", "add", "{}"), finish_reason=None),
        piece(chat.Delta(), "</s>", "tool_calls"),
    ):
        parts.push(one)
    found = [[token.token for token in part.logprobs] for part in parts.parts]
    assert found == [[], ["So ", "half", "other half"], []]


def test_a_failure_during_a_stream_is_its_last_event():
    with running(scripted("un deux trois", on_step=lambda number: None if number < 2 else 1 / 0)) as server:
        events = server.stream({"input": "Hello"}, "/v1/responses")
    assert events[-1]["type"] == "response.failed"
    assert "ZeroDivisionError" in events[-1]["response"]["error"]["message"]


def test_errors_name_the_fields_of_this_api():
    with running(scripted("x"), ServerSettings(max_body_bytes=10_000)) as server:
        answer = server.ask("/v1/responses", {"model": NAME, "input": [{"role": "assistant", "content": "x"}]})
        assert (answer.status, answer.error["param"]) == (400, "input")
        assert server.ask("/v1/responses", {"model": "other", "input": "x"}).status == 404
