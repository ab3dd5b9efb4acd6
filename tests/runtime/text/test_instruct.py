import subprocess
import sys
from typing import get_args

import msgspec
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from export.stage import ROOT
from runtime.artifact.manifest import InstructVersion, TokenizerSpec, from_json, to_json
from runtime.errors import UserError
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.instruct import INSTRUCT_FORMATS, InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.mistral_tokenizers import DATA, FILES, VERSIONS, open_both

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "4.  "}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "add", "arguments": '{"x": 2, "y": 2}'}}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "a1B2c3D4e", "name": "add"}


def spec(version):
    return TokenizerSpec(
        kind="sentencepiece", file=FILES[version], bos_id=1, add_bos=True, eos_ids=(2,), instruct=version
    )


@pytest.fixture(scope="module", params=VERSIONS)
def both(request):
    """The version, our encoder and mistral-common's tokenizer."""
    _, encoder, theirs = open_both(VERSIONS[request.param])
    return request.param, encoder, theirs


def encoder(version):
    return InstructEncoder(version, open_tokenizer(spec(version), DATA))


def test_there_is_a_format_for_each_version_that_the_tests_know():
    assert INSTRUCT_FORMATS.keys() == VERSIONS.keys() == set(get_args(InstructVersion))


LAYOUTS = {  # transcribed from Mistral's documentation of the formats, with spaces where SentencePiece puts them
    "v1": "<s>▁[INST]▁Be▁brief.<0x0A><0x0A>What▁is▁2▁+▁2?▁[/INST]▁4.▁▁</s>▁[INST]▁Why?▁[/INST]",
    "v2": "<s>[INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Be▁brief.<0x0A><0x0A>Why?[/INST]",
    "v3": "<s>[INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Be▁brief.<0x0A><0x0A>Why?[/INST]",
    "v7": "<s>[SYSTEM_PROMPT]▁Be▁brief.[/SYSTEM_PROMPT][INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Why?[/INST]",
}


@pytest.mark.parametrize("version", LAYOUTS)
def test_layouts_are_those_that_are_documented(version):
    tokenizer = open_tokenizer(spec(version), DATA)
    ids = InstructEncoder(version, tokenizer).encode([SYSTEM, USER, REPLY, {"role": "user", "content": "Why?"}])
    assert "".join(map(tokenizer.token_text, ids)) == LAYOUTS[version]


NO_TOOLS = [
    [USER],
    [SYSTEM],
    [SYSTEM, USER],
    [USER, SYSTEM],
    [USER, USER],
    [{"role": "user", "content": ""}],
    [USER, REPLY, USER],
    [SYSTEM, REPLY, USER],
]
TOOLS = [[USER, ASKS, RESULT], [USER, ASKS, RESULT, REPLY, USER], [USER, ASKS, {**RESULT, "content": ""}, USER]]


@pytest.mark.parametrize("messages", NO_TOOLS)
def test_short_conversations_give_the_ids_of_mistral_common(both, messages):
    _, ours, theirs = both
    assert ours.encode(messages) == theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages)).tokens


@pytest.mark.parametrize("messages", TOOLS)
@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_tools_give_the_ids_of_mistral_common(both, messages, tools):
    version, ours, theirs = both
    if version == "v1":
        with pytest.raises(UserError, match="the instruct format v1 does not support them"):
            ours.encode(messages, tools)
        return
    assert (
        ours.encode(messages, tools)
        == theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools=tools or None)).tokens
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "does not end with a message that calls for a reply"),
        ([USER, REPLY], "does not end with a message that calls for a reply"),
        ([USER, {"role": "bot", "content": "x"}], "message 1 has the role 'bot', expected one of system, user"),
        ([USER, ASKS, RESULT, SYSTEM, USER], "message 3 has the role system after tool"),
        ([USER, {"role": "assistant", "content": ""}, USER], "message 1 is from an assistant and has neither"),
        ([USER, RESULT], "message 1 has the role tool after user"),
        ([USER, REPLY, RESULT], "message 2 is a tool result that answers no call"),
        ([USER, ASKS, RESULT, RESULT], "message 3 is a tool result that answers no call"),
        ([USER, ASKS, REPLY, USER], "message 2 is from an assistant while 1 tool calls have no result"),
        ([USER, ASKS, USER], "1 tool calls have no result"),
        (
            [USER, {**ASKS, "tool_calls": [{**CALL, "id": ""}]}, RESULT],
            "message 1 has the tool call id '', expected nine",
        ),
        ([USER, ASKS, {**RESULT, "tool_call_id": ""}], "message 2 has the tool call id"),
        (
            [USER, {**ASKS, "tool_calls": [{**CALL, "function": {"name": "a b", "arguments": ""}}]}, RESULT],
            "has the function name 'a b'",
        ),
        ([USER, {**ASKS, "content": "x"}, RESULT], "has both text and tool calls"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_what_no_model_was_trained_on_is_one_sentence(messages, message):
    with pytest.raises(UserError, match=message):
        encoder("v3").encode(messages)


def test_text_beside_calls_is_allowed_from_v7():
    theirs = MistralTokenizer.from_file(DATA / FILES["v7"])
    messages = [USER, {**ASKS, "content": "I add."}, RESULT]
    assert (
        encoder("v7").encode(messages)
        == theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages)).tokens
    )


def test_v2_takes_one_result_for_a_turn_as_mistral_common_does():
    messages = [USER, {**ASKS, "tool_calls": [CALL, CALL]}, RESULT, RESULT]
    with pytest.raises(UserError, match="one result for each"):
        encoder("v2").encode(messages)
    theirs = MistralTokenizer.from_file(DATA / FILES["v2"])
    with pytest.raises(MistralCommonException):
        theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages))
    history = [*messages, REPLY, USER]  # calls and results before the last user message are not written
    assert (
        encoder("v2").encode(history)
        == theirs.encode_chat_completion(ChatCompletionRequest.from_openai(history)).tokens
    )


THINKS = {
    "role": "assistant",
    "content": [{"type": "thinking", "thinking": "2 and 2 ..."}, {"type": "text", "text": "4"}],
}
OPEN = {"role": "assistant", "content": [{"type": "thinking", "thinking": "2 and", "closed": False}]}
TEMPLATE = {
    "role": "system",
    "content": [
        {"type": "text", "text": "Think first:"},
        {"type": "thinking", "thinking": "Your draft."},
        {"type": "text", "text": "Then answer."},
    ],
}
SECOND = {**CALL, "id": "f6G7h8I9j"}
BOTH = {**ASKS, "tool_calls": [CALL, SECOND]}
ANSWER = {**RESULT, "tool_call_id": "f6G7h8I9j", "content": "5"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}


def written(tokenizer, ids):
    """Ids as text, with the names of control tokens."""
    names = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
    return "".join(names.get(token_id) or tokenizer.decode([token_id]) for token_id in ids)


CALLS = {  # the calls and results of the last round, transcribed from mistral-common's documentation of the versions
    "v11": '[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{"x": 2, "y": 2}[TOOL_CALLS]add[CALL_ID]f6G7h8I9j[ARGS]'
    '{"x": 2, "y": 2}</s>[TOOL_RESULTS]a1B2c3D4e[TOOL_CONTENT]4[/TOOL_RESULTS]'
    "[TOOL_RESULTS]f6G7h8I9j[TOOL_CONTENT]5[/TOOL_RESULTS]",
    "v13": '[TOOL_CALLS]add[ARGS]{"x": 2, "y": 2}[TOOL_CALLS]add[ARGS]{"x": 2, "y": 2}</s>'
    "[TOOL_RESULTS]4[/TOOL_RESULTS][TOOL_RESULTS]5[/TOOL_RESULTS]",
}
CALLS["v15"] = CALLS["v13"]


@pytest.mark.parametrize("version", CALLS)
def test_calls_stand_one_by_one_and_results_in_their_order(version):
    tokenizer, ours, _ = open_both(VERSIONS[version])
    text = written(tokenizer, ours.encode([USER, BOTH, ANSWER, RESULT, REPLY, USER], [TOOL]))
    assert CALLS[version] in text
    first = "[AVAILABLE_TOOLS]" in text.partition("[INST]")[0]
    assert first == (version != "v11")  # later formats list the tools before the first turn, which a cache keeps
    assert ('[MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS][INST]' in text) == (version == "v15")


def test_reasoning_stands_between_its_tokens():
    tokenizer, ours, _ = open_both("v13-tekken")
    text = written(tokenizer, ours.encode([TEMPLATE, USER, THINKS, USER]))
    assert text.startswith(
        "<s>[SYSTEM_PROMPT]Think first:[THINK]Your draft.[/THINK]Then answer.[/SYSTEM_PROMPT]"
        "[INST]What is 2 + 2?[/INST][THINK]2 and 2 ...[/THINK]4</s>"
    )
    listed = {
        **THINKS["content"][0],
        "thinking": [{"type": "text", "text": "2 and 2 "}, {"type": "text", "text": "..."}],
    }
    assert ours.encode([USER, {**THINKS, "content": [listed, THINKS["content"][1]]}, USER]) == ours.encode(
        [USER, THINKS, USER]
    )
    assert written(tokenizer, ours.encode([USER, OPEN, USER])).endswith("[THINK]2 and</s>[INST]What is 2 + 2?[/INST]")


THINKING = {
    "an assistant's": ([USER, THINKS, USER], ("v13", "v15")),
    "the system's": ([TEMPLATE, USER], ("v13",)),
    "a user's": ([{**THINKS, "role": "user"}], ()),
    "a tool's": ([USER, ASKS, {**RESULT, "content": THINKS["content"]}], ()),
}


@pytest.mark.parametrize("case", THINKING)
def test_reasoning_is_refused_where_mistral_common_refuses_it(both, case):
    version, ours, theirs = both
    messages, allowed = THINKING[case]
    if version in allowed:
        request = ChatCompletionRequest.from_openai(messages)
        assert ours.encode(messages) == theirs.encode_chat_completion(request).tokens
        return
    with pytest.raises(UserError, match=r"has reasoning, which the instruct format|does not support them"):
        ours.encode(messages)
    with pytest.raises(Exception):  # noqa: B017, PT011 (it raises its own errors, pydantic's and assertions)
        theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages))


def test_reasoning_needs_its_tokens():
    _, ours, theirs = open_both("v13-tekken", thinks=False)
    assert ours.encode([USER]) == theirs.encode_chat_completion(ChatCompletionRequest.from_openai([USER])).tokens
    with pytest.raises(UserError, match=r"message 1 has reasoning, but the tokenizer has no \[THINK\]"):
        ours.encode([USER, THINKS, USER])


MISPAIRED = {
    "twice the same id": ([USER, {**ASKS, "tool_calls": [CALL, CALL]}, RESULT, RESULT], "two tool calls with the same"),
    "a result of no call": ([USER, ASKS, ANSWER], "message 2 is a tool result that answers no call"),
    "two results of one call": ([USER, BOTH, RESULT, RESULT], "message 3 is a tool result that answers no call"),
}


@pytest.mark.parametrize("case", MISPAIRED)
@pytest.mark.parametrize("version", CALLS)
def test_results_are_paired_by_id_from_v11(version, case):
    _, ours, theirs = open_both(VERSIONS[version])
    messages, message = MISPAIRED[case]
    with pytest.raises(UserError, match=message):
        ours.encode(messages)
    with pytest.raises(MistralCommonException):
        theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages))


@pytest.mark.parametrize(("call_id", "allowed"), [("call_123", True), ("", False), ("null", False)])
def test_ids_are_any_text_from_v13(call_id, allowed):
    _, ours, theirs = open_both("v13-tekken")
    messages = [USER, {**ASKS, "tool_calls": [{**CALL, "id": call_id}]}, {**RESULT, "tool_call_id": call_id}]
    if allowed:
        request = ChatCompletionRequest.from_openai(messages)
        assert ours.encode(messages) == theirs.encode_chat_completion(request).tokens
        return
    with pytest.raises(UserError, match="message 1 has the tool call id"):
        ours.encode(messages)
    with pytest.raises(MistralCommonException):
        theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([IMAGE], "message 0 has a part of the type 'image_url', but only the text part of the model is compiled"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 has a part of the type 'text'"),
        ([{"role": "user", "content": ["x"]}], "message 0 has a part of the type None"),
        ([USER, {**THINKS, "content": [{"type": "thinking", "thinking": 3}]}, USER], "that is not made of text"),
        ([USER, {**THINKS, "content": [{"type": "text", "text": ""}]}, USER], "consists of empty parts"),
        ([USER, ASKS, {**RESULT, "name": "a b"}], "message 2 has the function name 'a b'"),
    ],
)
def test_parts_that_no_format_has_are_one_sentence(messages, message):
    with pytest.raises(UserError, match=message):
        encoder("v7").encode(messages)


def test_parts_of_text_are_joined_as_by_mistral_common(both):
    _, ours, theirs = both
    parts = [{"type": "text", "text": text} for text in ("a", "", "b ")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}, USER, USER]
    request = ChatCompletionRequest.from_openai([{"role": "system", "content": parts}, *messages])
    assert (
        ours.encode([{"role": "system", "content": parts}, *messages]) == theirs.encode_chat_completion(request).tokens
    )


def test_tools_with_bad_names_are_refused():
    with pytest.raises(UserError, match="a tool has the function name 'x y'"):
        encoder("v3").encode([USER], [{"type": "function", "function": {"name": "x y"}}])


def test_a_format_needs_its_control_tokens():
    with pytest.raises(UserError, match=r"the tokenizer lacks \[SYSTEM_PROMPT\], which the instruct format v7 needs"):
        InstructEncoder("v7", open_tokenizer(spec("v3"), DATA))
    with pytest.raises(UserError, match="is not a valid tokenizerspec: Invalid enum value 'v99'"):
        from_json(to_json(msgspec.structs.replace(spec("v3"), instruct="v99")), TokenizerSpec, "x")


def test_the_format_wins_over_the_template_and_a_base_model_has_neither(tmp_path):
    tokenizer = open_tokenizer(spec("v3"), DATA)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    chat = msgspec.structs.replace(spec("v3"), chat_template="chat.jinja")
    assert open_conversation_encoder(chat, tmp_path, tokenizer).encode([USER])[:2] == [1, 3]
    template = msgspec.structs.replace(chat, instruct=None)
    assert open_conversation_encoder(template, tmp_path, tokenizer).encode([USER]) == tokenizer.encode(
        USER["content"], add_bos=False
    )
    with pytest.raises(UserError, match="has no chat template"):
        open_conversation_encoder(msgspec.structs.replace(template, chat_template=None), tmp_path, tokenizer)


def test_the_box_needs_no_tokenizer_library_of_the_tests():
    code = (
        "import sys, runtime.text.conversation_encoder; "
        "sys.exit(bool({'mistral_common', 'tiktoken', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
