"""What `runtime.generate` makes of its prompts, and how it shows what the model replies to them."""

import json

import msgspec
import pytest
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from runtime.errors import run_command
from runtime.generate import main
from runtime.prompts import TOOLS_LIMIT
from runtime.text.call_ids import WELL_FORMED_ID
from tests.helpers.mistral_tokenizers import open_both
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, ScriptedEngine, install

CHAT = msgspec.structs.replace(SPEC, instruct="v3")
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = '[{"name": "add", "arguments": {"x": 2, "y": 2}, "id": "a1B2c3D4e"}]'
TOOL_CALLS = PIECES.piece_to_id("[TOOL_CALLS]")
CALLS = [TOOL_CALLS, *PIECES.encode(CALL), EOS]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the command on a scripted engine with Mistral's v3 tokenizer; return status, stdout and stderr."""

    def run(engine, *flags, spec=CHAT):
        install(monkeypatch, tmp_path, engine, spec)
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: main([str(tmp_path), *map(str, flags)]))
        return exit_info.value.code, *capsys.readouterr()

    return run


def write_tools(folder, tools):
    (folder / "tools.json").write_text(tools if isinstance(tools, str) else json.dumps(tools))
    return folder / "tools.json"


def test_tools_are_offered_and_calls_are_shown_as_such(command, tmp_path):
    engine = ScriptedEngine([CALLS])
    tools = write_tools(tmp_path, [TOOL])
    status, out, _ = command(engine, "--chat", "--prompt", "2 + 2?", "--tools", tools, "--json")
    answer = json.loads(out)
    _, _, theirs = open_both("v3")
    request = ChatCompletionRequest.from_openai([{"role": "user", "content": "2 + 2?"}], tools=[TOOL])
    assert engine.prefills == [theirs.encode_chat_completion(request).tokens]
    assert (status, answer["text"], answer["finish_reason"]) == (0, "", "tool_calls")
    function = {"name": "add", "arguments": '{"x": 2, "y": 2}'}
    (call,) = answer["tool_calls"]
    assert WELL_FORMED_ID.fullmatch(call["id"])  # a new one, since the model writes its own behind the arguments
    assert call == {"id": call["id"], "type": "function", "function": function}
    assert answer["token_ids"] == CALLS


def test_a_byte_order_mark_is_no_part_of_a_file_of_tools(command, tmp_path):
    status, _, _ = command(
        ScriptedEngine([CALLS]),
        "--chat",
        "--prompt",
        "x",
        "--tools",
        write_tools(tmp_path, "\ufeff" + json.dumps([TOOL])),
    )
    assert status == 0


def test_a_call_without_tools_offered_or_a_chat_is_one_too(command):
    _, out, _ = command(ScriptedEngine([CALLS]), "--prompt", "x", "--json", spec=SPEC)
    assert json.loads(out)["tool_calls"][0]["function"]["name"] == "add"


def test_a_call_that_is_cut_short_is_kept_as_far_as_it_has_come(command):
    engine = ScriptedEngine([CALLS])
    _, out, _ = command(engine, "--chat", "--prompt", "x", "--max-tokens", len(CALLS) - 2, "--json")
    answer = json.loads(out)
    assert answer["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"x": 2, "y": 2}'}
    assert (answer["text"], answer["finish_reason"]) == ("", "length")


def test_the_terminal_shows_what_divides_a_reply(command):
    _, out, _ = command(ScriptedEngine([CALLS]), "--chat", "--prompt", "x")
    assert out == f"[TOOL_CALLS]{CALL}\n"


def test_several_replies_are_told_apart_each_by_itself(command):
    engine = ScriptedEngine([CALLS, [*PIECES.encode("Hello"), EOS]])
    _, out, _ = command(engine, "--chat", "--prompt", "x", "--prompt", "y", "--json")
    assert [("tool_calls" in answer, answer["text"]) for answer in json.loads(out)] == [(True, ""), (False, "Hello")]


def test_a_text_between_two_is_filled_in(command):
    engine = ScriptedEngine([[*PIECES.encode("x):"), EOS]])
    status, _, _ = command(engine, "--prompt", "def f(", "--suffix", "    return x", "--json")
    _, _, theirs = open_both("v3")
    expected = theirs.encode_fim(FIMRequest(prompt="def f(", suffix="    return x")).tokens
    assert (status, engine.prefills) == (0, [expected])


@pytest.mark.parametrize("prompt", ["<s>[INST] Hi[/INST]", "[INST] Hi[/INST]"])
def test_names_of_control_tokens_are_those_tokens_on_request(command, prompt):
    special, plain = ScriptedEngine([[EOS]]), ScriptedEngine([[EOS]])
    command(special, "--prompt", prompt, "--special", spec=SPEC)
    assert special.prefills == [[1, 3, *PIECES.encode("Hi"), 4]]  # <s> once, whether the prompt has it or not
    command(plain, "--prompt", prompt, spec=SPEC)
    assert plain.prefills == [[1, *PIECES.encode(prompt)]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tools", "x"], "--tools is part of a chat: pass --chat with it"),
        (["--chat", "--tools", "none.json"], "none.json cannot be read: No such file"),
        (["--suffix", "y", "--chat"], "--suffix is about a text to continue: leave out --chat"),
        (["--special", "--chat"], "--special is about a text to continue: leave out --chat"),
        (["--special", "--suffix", "y"], "--suffix takes both texts as plain text: leave out --special"),
        (["--suffix", "y" * 400], "the text has 400 characters"),
    ],
)
def test_wrong_use_is_one_sentence(command, flags, message):
    status, out, err = command(ScriptedEngine([[EOS]], cache_len=20), "--prompt", "x", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{", "tools.json is not a list of tools"),
        ([{"type": "function"}], "tools.json is not a list of tools: Object missing required field `function`"),
        ([{"type": "retrieval", "function": {"name": "x"}}], "is not a list of tools: Invalid enum value 'retrieval'"),
        ([{"type": "function", "function": {"name": "a b"}}], "a tool has the function name 'a b'"),
        ("[" * 10_000, "is not a list of tools"),
        ("[" + " " * TOOLS_LIMIT + "]", f"has more than {TOOLS_LIMIT} bytes"),
    ],
)
def test_tools_that_are_none_are_one_sentence(command, tmp_path, tools, message):
    engine = ScriptedEngine([[EOS]])
    status, _, err = command(engine, "--chat", "--prompt", "x", "--tools", write_tools(tmp_path, tools))
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_tools_are_refused_where_they_would_be_left_out(command, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    spec = msgspec.structs.replace(SPEC, chat_template="chat.jinja")
    tools = write_tools(tmp_path, [TOOL])
    status, _, err = command(ScriptedEngine([[EOS]]), "--chat", "--prompt", "x", "--tools", tools, spec=spec)
    assert status == 2
    assert "has no place for tools" in err
