"""Replies under grammars: tools that may or must be called, and reasoning in front of an answer."""

import json

import numpy as np
import pytest

from runtime.decoding.reply_grammar import NamedTool, ReplyGrammars, ReplyRules
from runtime.errors import UserError
from runtime.text.call_grammar import MOST_TOOLS
from runtime.text.grammar_source import JsonSchema, Regex
from runtime.text.replies import read_reply
from runtime.text.stream import Step, with_text
from tests.helpers.grammar_texts import compiler_of, drawn, walk
from tests.helpers.mistral_tokenizers import VERSIONS, open_both
from tests.helpers.replies import counted

WITH_TOOLS = [name for version, name in VERSIONS.items() if version != "v1"]


def tool(name, **parameters):
    schema = {"type": "object", "properties": parameters, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


ADD = tool("add", x={"$ref": "#/$defs/small"}, y={"enum": ["one", "two"]})
ADD["function"]["parameters"]["$defs"] = {"small": {"type": "integer", "minimum": 0, "maximum": 9}}
ADD_MORE = tool("add_more", list={"type": "array", "items": {"type": "boolean"}, "maxItems": 2})
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, ADD_MORE, NOW]


def grammars(name):
    return ReplyGrammars(compiler_of(name), open_both(name)[1].call_layout)


def reply_of_ids(tokenizer, ids):
    steps = [Step(token_id) for token_id in ids[:-1]] + [Step(ids[-1], finish_reason="stop")]
    return read_reply(list(with_text(iter(steps), tokenizer.text_stream(()))), tokenizer, new_id=counted())


def check_arguments(call):
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "add":
        assert arguments["x"] in range(10)
        assert arguments["y"] in ("one", "two")
    elif call["function"]["name"] == "add_more":
        assert all(isinstance(one, bool) for one in arguments["list"])
    else:
        assert (call["function"]["name"], arguments) == ("now", {})


def replies(name, rules, seeds=range(12), **options):
    compiler = compiler_of(name)
    grammar = grammars(name).compile(rules, **options)
    for seed in seeds:
        ids = walk(compiler, grammar, seed, most=3000)
        assert ids[-1] in compiler.eos_ids
        yield reply_of_ids(compiler.tokenizer, ids)


def without_thoughts(monkeypatch):
    """Let no text begin with a thought, which random ids would hardly ever end."""
    monkeypatch.setattr(ReplyGrammars, "_behind_thought", lambda self, grammar, in_thought: grammar)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_required_call_is_one_of_a_tool_with_its_arguments(name, monkeypatch):
    without_thoughts(monkeypatch)
    called = []
    for reply in replies(name, ReplyRules(TOOLS, "required")):
        assert (reply.text, reply.reasoning) == ("", None)
        assert reply.tool_calls
        for call in reply.tool_calls:
            check_arguments(call)
        called += [call["function"]["name"] for call in reply.tool_calls]
    assert set(called) == {"add", "add_more", "now"}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_named_tool_is_called_and_only_once_without_parallel_calls(name, monkeypatch):
    without_thoughts(monkeypatch)
    for reply in replies(name, ReplyRules(TOOLS, NamedTool("add_more"), parallel=False), range(4)):
        assert [call["function"]["name"] for call in reply.tool_calls] == ["add_more"]
        check_arguments(reply.tool_calls[0])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_text_is_free_until_a_call_begins(name):
    compiler = compiler_of(name)
    constraint = grammars(name).compile(ReplyRules(TOOLS)).begin()
    begin = compiler.tokenizer.control_tokens["[TOOL_CALLS]"]
    said = compiler.tokenizer.encode("I add.", add_bos=False)
    assert constraint.allowed() is None
    assert constraint.permitted([*said, begin, begin]) == len(said) + 1
    after = constraint.allowed([*said, begin])
    for token_id in (*said, begin):
        constraint.append(token_id)
    assert (constraint.allowed() == after).all()
    assert not after[list(compiler.eos_ids)].any()
    assert not after[begin]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_drawn_by_the_scheduler(name):
    rules = ReplyRules([ADD], "required", parallel=False)
    grammar = grammars(name).compile(rules)
    plain, _ = drawn(name, grammar, choices=2, seed=4)
    guessed, _ = drawn(name, grammar, choices=2, seed=4, speculate=True)
    assert plain == guessed
    for steps in plain:
        (call,) = read_reply(steps, compiler_of(name).tokenizer).tool_calls
        check_arguments(call)


def test_no_call_begins_if_none_may():
    compiler = compiler_of("v13-tekken")
    constraint = grammars("v13-tekken").compile(ReplyRules(TOOLS, "none")).begin()
    controls = [compiler.tokenizer.control_tokens[name] for name in ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")]
    mask = constraint.allowed()
    assert np.flatnonzero(~mask).tolist() == sorted(controls)
    assert constraint.permitted([1000, controls[0], 1000]) == 1
    assert grammars("v13-tekken").compile(ReplyRules()) is None


def test_an_answer_keeps_to_its_schema_or_is_a_call():
    compiler = compiler_of("v3")
    grammar = grammars("v3").compile(ReplyRules(TOOLS, answer=JsonSchema({"type": "boolean"})))
    begins = {compiler.tokenizer.token_text(token_id) for token_id in np.flatnonzero(grammar.begin().allowed())}
    assert "[TOOL_CALLS]" in begins
    assert {"true", "▁true", "f"} <= begins
    assert not begins & {"{", "</s>", "[ARGS]"}


@pytest.mark.parametrize("in_thought", [False, True])
def test_the_grammar_of_an_answer_begins_behind_a_thought(in_thought):
    compiler = compiler_of("v13-tekken")
    controls = compiler.tokenizer.control_tokens
    opens, closes = controls["[THINK]"], controls["[/THINK]"]
    grammar = grammars("v13-tekken").compile(ReplyRules(answer=Regex("yes|no")), in_thought=in_thought)
    thought = compiler.tokenizer.encode("Let me see", add_bos=False)
    constraint = grammar.begin()
    if not in_thought:
        first = {compiler.tokenizer.token_text(token_id) for token_id in np.flatnonzero(constraint.allowed())}
        assert first == {"[THINK]", "y", "ye", "yes", "n", "no"}
        assert constraint.permitted([opens, *thought, closes, thought[0]]) == len(thought) + 2
        constraint.append(opens)
    within = constraint.allowed()
    assert within[thought].all()
    assert not within[[opens, controls["[TOOL_CALLS]"], *compiler.eos_ids]].any()
    behind = constraint.allowed([*thought, closes])
    for token_id in (*thought, closes):
        constraint.append(token_id)
    assert (constraint.allowed() == behind).all()
    (yes,) = compiler.tokenizer.encode("yes", add_bos=False)
    assert behind[yes]
    assert not behind[[opens, closes]].any()
    constraint.append(yes)
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(compiler.eos_ids)


def test_a_thought_is_not_needed():
    constraint = grammars("v13-tekken").compile(ReplyRules(answer=Regex("yes|no"))).begin()
    (yes,) = compiler_of("v13-tekken").tokenizer.encode("yes", add_bos=False)
    assert constraint.permitted([yes, yes]) == 1
    constraint.append(yes)
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(compiler_of("v13-tekken").eos_ids)


def test_what_cannot_be_called_is_refused():
    def refused(rules, name="v3"):
        with pytest.raises(UserError) as error:
            grammars(name).compile(rules)
        return str(error.value)

    assert "requires a call, but the form of calls" in refused(ReplyRules(TOOLS, "required"), "v1")
    assert "names the tool 'sub', but the request has no such tool" in refused(ReplyRules(TOOLS, NamedTool("sub")))
    assert "requires a call, but the request has no such tool" in refused(ReplyRules((), "required"))
    assert "two tools of the name 'now'" in refused(ReplyRules([NOW, NOW], "required"))
    assert "the function name 'a b'" in refused(ReplyRules([tool("a b")], "required"))
    assert f"expected at most {MOST_TOOLS}" in refused(ReplyRules([tool(f"f{i}") for i in range(200)], "required"))
    wrong = tool("add", x={"type": "string", "pattern": "(a"})
    assert "the parameters of the tool 'add' at #/properties/x cannot be used: regex" in refused(ReplyRules([wrong]))


def test_what_is_not_known_in_parameters_is_refused_only_where_strict():
    unknown = tool("add", x={"type": "integer", "contentEncoding": "x", "not": {"const": 3}})
    assert grammars("v3").compile(ReplyRules([unknown], "required")) is not None
    unknown["function"]["strict"] = True
    with pytest.raises(UserError, match=r"at #/properties/x cannot be used: Unimplemented keys: \[\"not\"\]"):
        grammars("v3").compile(ReplyRules([unknown], "required"))
