"""Replies as streams: tool calls and reasoning, cut into pieces at every place."""

import json
import random

import pytest

from runtime.text.deltas import ArgumentsDelta, CallDelta, ReasoningDelta, TextDelta
from runtime.text.replies import read_reply, reply_of
from runtime.text.reply_stream import ReplyStream
from runtime.text.stream import Step
from tests.helpers.conversations import tool_round, value
from tests.helpers.mistral_tokenizers import VERSIONS, open_both
from tests.helpers.replies import counted, steps_of, written

CALLS, ARGUMENTS, ID, THINK, END_THINK = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"
CONTROLS = (CALLS, ARGUMENTS, ID, THINK, END_THINK)
DIVIDERS = dict(enumerate(CONTROLS, 100))
WORD = 0  # the id of any token with text
ADD = ("new000000", "add", "{}")
SUM = ("new000000", "add", '{"x": 1}')

# A reply, the reason of its end, and what it says and calls.
REPLIES = [
    (["Hi", CALLS, "add", ARGUMENTS, '{"x": 1}'], "stop", "Hi", [SUM]),
    ([CALLS, " add ", ARGUMENTS, ' {"x": 1} \n'], "stop", "", [SUM]),
    ([CALLS, "add", ID, "a1B2c3D4e", ARGUMENTS, '{"x": 1}'], "stop", "", [("a1B2c3D4e", "add", '{"x": 1}')]),
    ([CALLS, "add", ID, "x", ARGUMENTS, '{"x": 1}'], "stop", "", [SUM]),
    ([CALLS, "add", ARGUMENTS, "{}", CALLS, "sub", ARGUMENTS, "{}"], "stop", "", [ADD, ("new000001", "sub", "{}")]),
    ([CALLS, ' [{"name": "add", "arguments": {"x": 1}}] '], "stop", "", [SUM]),
    ([CALLS, '[{"name": "add", "arguments": {"x": 1}, "id": "a1B2c3D4e"}]'], "stop", "", [SUM]),
    ([CALLS, '[{"id":"a1B2c3D4e","name":"add","arguments":{}}]'], "stop", "", [("a1B2c3D4e", "add", "{}")]),
    ([CALLS, '[{"arguments": {"x": 1}, "name": "add"}]'], "stop", "", [SUM]),
    ([CALLS, '[{"type": [1, "}"], "n": -1.5 , "name": "add", "arguments": {}}]'], "stop", "", [ADD]),
    (
        [CALLS, '[{"name": "add", "arguments": {}}, {"name": "sub", "arguments": {"s": "}]\\"{"}}]'],
        "stop",
        "",
        [ADD, ("new000001", "sub", '{"s": "}]\\"{"}')],
    ),
    ([CALLS, '[{"name": "a\\u0064d", "arguments": {}}]'], "stop", "", [ADD]),
    # cut short
    ([CALLS, "add", ARGUMENTS, '{"x": "1'], "length", "", [("new000000", "add", '{"x": "1')]),
    ([CALLS, "add", ARGUMENTS], "length", "", [("new000000", "add", "")]),
    ([CALLS, "ad"], "length", "ad", []),
    ([CALLS, '[{"name": "add", "arguments": {"x'], "length", "", [("new000000", "add", '{"x')]),
    ([CALLS, '[{"name": "add", "argu'], "length", "", [("new000000", "add", "")]),
    ([CALLS, '[{"name": "add", "arguments": {}, "id": "a1B'], "length", "", [ADD]),
    ([CALLS, '[{"name": "add", "arguments": {}}'], "length", "", [ADD]),
    ([CALLS, '[{"name": "add", "arguments": {}}, '], "length", "", [ADD]),
    ([CALLS, '[{"name": "add", "arguments": {}}, {"na'], "length", ' {"na', [ADD]),
    ([CALLS, '[{"na'], "length", '[{"na', []),
    ([CALLS, '[{"arguments": {"x": 1}, "na'], "length", '[{"arguments": {"x": 1}, "na', []),
    ([CALLS], "length", "", []),
    # ended by the model in the middle
    ([CALLS, "add", ARGUMENTS, '{"x": "1'], "stop", "", [("new000000", "add", '{"x": "1')]),
    ([CALLS, "add", ARGUMENTS], "stop", "add", []),
    ([CALLS, "add"], "stop", "add", []),
    ([CALLS, "add", ID, "a1B2c3D4e"], "stop", "adda1B2c3D4e", []),
    # malformed
    (["Hi", CALLS, "add to it", ARGUMENTS, "{}"], "stop", "Hiadd to it{}", []),
    ([CALLS, "add", ARGUMENTS, "[1]"], "stop", "add[1]", []),
    ([CALLS, "add", ARGUMENTS, "{} and more"], "stop", " and more", [ADD]),
    ([CALLS, "add", ARGUMENTS, "{}", ARGUMENTS, "{}"], "stop", "{}", [ADD]),
    ([CALLS, "add", ARGUMENTS, "{}", ID, "a1B2c3D4e"], "stop", "a1B2c3D4e", [ADD]),
    ([CALLS, "add", ID, "a b", ARGUMENTS, "{}"], "stop", "adda b{}", []),
    ([CALLS, "add", ID, "x", ID, "y", ARGUMENTS, "{}"], "stop", "addxy{}", []),
    ([CALLS, "add", ARGUMENTS, '{"x"', ID, "]}"], "stop", "]}", [("new000000", "add", '{"x"')]),
    ([CALLS, ID, "x", ARGUMENTS, "{}"], "stop", "x{}", []),
    ([CALLS, CALLS, "add", ARGUMENTS, "{}"], "stop", "", [ADD]),
    ([ARGUMENTS, "{}"], "stop", "{}", []),
    ([CALLS, "[]"], "stop", "[]", []),
    ([CALLS, "[3]"], "stop", "[3]", []),
    ([CALLS, "[{}]"], "stop", "[{}]", []),
    ([CALLS, '{"name": "add", "arguments": {}}'], "stop", '{"name": "add", "arguments": {}}', []),
    ([CALLS, '[{"name": "a b", "arguments": {}}]'], "stop", '[{"name": "a b", "arguments": {}}]', []),
    ([CALLS, '[{"name": 3, "arguments": {}}]'], "stop", '[{"name": 3, "arguments": {}}]', []),
    ([CALLS, '[{"name": "add", "arguments": "x"}]'], "stop", '[{"name": "add", "arguments": "x"}]', []),
    ([CALLS, '[{"name": "add"}]'], "stop", '[{"name": "add"}]', []),
    ([CALLS, '[{"name": "\\q", "arguments": {}}]'], "stop", '[{"name": "\\q", "arguments": {}}]', []),
    ([CALLS, '[{"name": "add", "arguments": {]}}]'], "stop", "}}]", [("new000000", "add", "{]")]),
    ([CALLS, '[{"name": "add", "arguments": {}} and more'], "stop", " and more", [ADD]),
    ([CALLS, '[{"name": "add", "arguments": {}}] and more'], "stop", " and more", [ADD]),
    ([CALLS, '[{"name": "add", ', ARGUMENTS, "{}}]"], "stop", '[{"name": "add", {}}]', []),
    ([CALLS, '[{"x": ', ID, "1}]"], "stop", '[{"x": 1}]', []),
    ([CALLS, "[" * 100_000], "stop", "[" * 100_000, []),
]


def pieces_of(reply, reason, cut):
    """Steps of a reply whose texts `cut` divides; a control token has the text that was held back up to it."""
    steps = []
    for part in reply:
        if part in CONTROLS:
            steps.append(Step(100 + CONTROLS.index(part)))
        else:
            steps += [Step(WORD, text=piece) for piece in cut(part)]
    return [*steps, Step(2, finish_reason="stop")] if reason == "stop" else steps


def streamed(steps, reason, **options):
    stream = ReplyStream(DIVIDERS, new_id=counted(), **options)
    return [delta for step in steps for delta in stream.push(step)] + stream.finish(reason), stream


@pytest.mark.parametrize(("reply", "reason", "text", "calls"), REPLIES)
def test_what_a_reply_says_and_calls(reply, reason, text, calls):
    cuts = [lambda part: [part], list]
    if len(str(reply)) < 200:
        longest = max(map(len, reply))
        cuts += [lambda part, at=at: [part[:at], part[at:]] for at in range(1, longest)]
    for cut in cuts:
        deltas, stream = streamed(pieces_of(reply, reason, cut), reason)
        whole = reply_of(deltas)
        assert whole.text == text
        assert [(call["id"], *call["function"].values()) for call in whole.tool_calls] == calls
        assert stream.has_calls == bool(calls)
        assert all(delta.text for delta in deltas if not isinstance(delta, CallDelta)), "no piece is empty"


def test_pieces_come_as_soon_as_they_can():
    steps = pieces_of(["Hi", CALLS, "add", ARGUMENTS, '{"x":1}'], "stop", list)
    stream = ReplyStream(DIVIDERS, new_id=counted())
    came = [stream.push(step) for step in steps]
    assert came[:2] == [[TextDelta("H")], [TextDelta("i")]]
    assert came[2:7] == [[], [], [], [], []], "of the name and its control tokens"
    assert came[7] == [CallDelta(0, "new000000", "add"), ArgumentsDelta(0, "{")]
    assert came[8:-1] == [[ArgumentsDelta(0, piece)] for piece in '"x":1}']
    listed = pieces_of([CALLS, '[{"name":"add","arguments":{"x":1}}]'], "stop", list)
    came = [delta for step in listed for delta in ReplyStream.push(stream, step)]
    assert came == [CallDelta(1, "new000001", "add"), *(ArgumentsDelta(1, piece) for piece in '{"x":1}')]


def test_text_that_can_be_no_call_is_not_held_back():
    stream = ReplyStream(DIVIDERS)
    stream.push(Step(100))
    assert reply_of(stream.push(Step(WORD, text="It is "))).text == "It is "
    assert stream.push(Step(WORD, text="so.")) == [TextDelta("so.")]


@pytest.mark.parametrize("in_thought", [False, True])
def test_reasoning_comes_apart(in_thought):
    opened = [] if in_thought else [THINK]
    steps = pieces_of([*opened, "2 and 2", END_THINK, "It is 4.", CALLS, "add", ARGUMENTS, "{}"], "stop", list)
    deltas, _ = streamed(steps, "stop", in_thought=in_thought)
    whole = reply_of(deltas)
    assert (whole.reasoning, whole.text, len(whole.tool_calls)) == ("2 and 2", "It is 4.", 1)
    assert deltas[:2] == [ReasoningDelta("2"), ReasoningDelta(" ")]


def test_a_thought_after_a_call_ends_the_call():
    deltas, _ = streamed(pieces_of([CALLS, "add", ARGUMENTS, "{}", THINK, "so", END_THINK, "x"], "stop", list), "stop")
    whole = reply_of(deltas)
    assert (whole.reasoning, whole.text, len(whole.tool_calls)) == ("so", "x", 1)


@pytest.mark.parametrize("name", [name for version, name in VERSIONS.items() if version != "v1"])
def test_a_stream_of_tokens_is_the_whole_reply(name):
    """With real tokenizers, and cut off behind every token."""
    tokenizer, ours, _ = open_both(name)
    draw = random.Random(name)
    user = {"role": "user", "content": "What is 2 + 2?"}
    for _ in range(10):
        asks, *results = tool_round(draw, several=name != "v2", beside_text=False)
        for call in asks["tool_calls"]:
            call["function"]["arguments"] = json.dumps({"x": value(draw)}).replace("▁", "_")
        ids = ours.encode([user, asks, *results])
        begin = ids.index(tokenizer.control_tokens["[TOOL_CALLS]"])
        ids = ids[begin : ids.index(2, begin)]
        for end in range(1, len(ids) + 1):
            steps = steps_of(tokenizer, ids[:end], reason="length")
            reply = read_reply(steps, tokenizer, new_id=counted())
            stream = ReplyStream(tokenizer.dividers, new_id=counted())
            deltas = [delta for step in steps for delta in stream.push(step)] + stream.finish("length")
            assert reply_of(deltas) == reply
            assert not any(control in reply.text for control in CONTROLS)
        assert [json.loads(call["function"]["arguments"]) for call in reply.tool_calls] == [
            json.loads(call["function"]["arguments"]) for call in asks["tool_calls"]
        ]


def test_a_whole_call_among_text_of_real_tokens():
    tokenizer, _, _ = open_both("v13-tekken")
    ids = written(tokenizer, "I add.", CALLS, "add", ARGUMENTS, '{"x": "[ARGS]"}')
    reply = read_reply(steps_of(tokenizer, ids), tokenizer, new_id=counted())
    assert (reply.text, reply.tool_calls[0]["function"]["arguments"]) == ("I add.", '{"x": "[ARGS]"}')
