import importlib.resources
import subprocess
import sys
from pathlib import Path
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

DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
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


@pytest.fixture(scope="module", params=FILES)
def both(request):
    """The version, our encoder and mistral-common's tokenizer."""
    version = request.param
    encoder = open_conversation_encoder(spec(version), DATA, open_tokenizer(spec(version), DATA))
    return version, encoder, MistralTokenizer.from_file(DATA / FILES[version])


def encoder(version):
    return InstructEncoder(version, open_tokenizer(spec(version), DATA))


def test_there_is_a_format_for_each_version_that_the_tests_know():
    assert INSTRUCT_FORMATS.keys() == FILES.keys() == set(get_args(InstructVersion))


LAYOUTS = {  # transcribed from Mistral's documentation of the formats, with spaces where SentencePiece puts them
    "v1": "<s>▁[INST]▁Be▁brief.<0x0A><0x0A>What▁is▁2▁+▁2?▁[/INST]▁4.▁▁</s>▁[INST]▁Why?▁[/INST]",
    "v2": "<s>[INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Be▁brief.<0x0A><0x0A>Why?[/INST]",
    "v3": "<s>[INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Be▁brief.<0x0A><0x0A>Why?[/INST]",
    "v7": "<s>[SYSTEM_PROMPT]▁Be▁brief.[/SYSTEM_PROMPT][INST]▁What▁is▁2▁+▁2?[/INST]▁4.</s>[INST]▁Why?[/INST]",
}


@pytest.mark.parametrize("version", FILES)
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
            [USER, {**ASKS, "tool_calls": [{**CALL, "id": "1"}]}, RESULT],
            "message 1 has the tool call id '1', expected nine",
        ),
        ([USER, ASKS, {**RESULT, "tool_call_id": "a1B2c3D4e\n"}], "message 2 has the tool call id"),
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
