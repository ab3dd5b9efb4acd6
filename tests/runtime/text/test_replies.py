"""Replies, read back from the very ids that the instruct formats write for them."""

import json
import random

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime.artifact.manifest import TokenizerSpec
from runtime.decoding.options import SamplingOptions
from runtime.scheduling.conversation import Conversation
from runtime.text.replies import ReplyText, content_of, ends_in_thought, read_reply
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.conversations import tool_round, value
from tests.helpers.mistral_tokenizers import VERSIONS, open_both
from tests.helpers.replies import counted, steps_of, written
from tests.helpers.scripted_engine import ScriptedEngine

USER = {"role": "user", "content": "What is 2 + 2?"}
THOUGHT = [{"type": "thinking", "thinking": "2 and 2 …", "closed": True}, {"type": "text", "text": "It is 4."}]
WITH_TOOLS = [name for version, name in VERSIONS.items() if version != "v1"]
WITH_IDS = ("v11-tekken",)  # which come before the arguments, so that a stream can use them


def ids_of_turn(ours, tokenizer, messages):
    """The ids of the assistant's turn behind the first message, without the end of the text."""
    ids = ours.encode(messages)
    begin = ids.index(tokenizer.control_tokens["[/INST]"]) + 1
    return ids[begin : ids.index(2, begin)]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_those_that_the_format_writes(name):
    tokenizer, ours, _ = open_both(name)
    draw = random.Random(name)
    for _ in range(200):
        several = name != "v2"
        asks, *results = tool_round(draw, several=several, beside_text=name not in ("v2", "v3"))
        for call in asks["tool_calls"]:
            arguments = json.dumps({"x": value(draw)}, ensure_ascii=False)
            call["function"]["arguments"] = arguments.replace("▁", "_")  # SentencePiece reads it back as a space
        ids = ids_of_turn(ours, tokenizer, [USER, asks, *results])
        reply = read_reply(steps_of(tokenizer, ids), tokenizer, new_id=counted())
        assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.tool_calls] == [
            (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in asks["tool_calls"]
        ]
        assert all(call["type"] == "function" for call in reply.tool_calls)
        expected = [call["id"] if name in WITH_IDS else f"new{i:06d}" for i, call in enumerate(asks["tool_calls"])]
        assert [call["id"] for call in reply.tool_calls] == expected
        assert (reply.text == "") == (not asks["content"].rstrip(" "))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_the_name_of_a_control_token_in_a_text_calls_nothing(name):
    tokenizer, _, _ = open_both(name)
    text = '[TOOL_CALLS] [{"name": "add", "arguments": {}}]'
    reply = read_reply(steps_of(tokenizer, written(tokenizer, "Say " + text)), tokenizer)
    assert (reply.text, reply.tool_calls, reply.reasoning) == ("Say " + text, (), None)


@pytest.mark.parametrize("name", ["v13-tekken", "v15-tekken"])
def test_reasoning_is_apart_from_the_text(name):
    tokenizer, ours, _ = open_both(name)
    steps = steps_of(tokenizer, ids_of_turn(ours, tokenizer, [USER, {"role": "assistant", "content": THOUGHT}, USER]))
    reply = read_reply(steps, tokenizer)
    assert (reply.reasoning, reply.text, reply.tool_calls) == ("2 and 2 …", "It is 4.", ())
    assert content_of(steps, tokenizer, reasoning=True) == THOUGHT
    assert content_of(steps, tokenizer, reasoning=False) == "It is 4."
    shown = ReplyText(tokenizer.dividers, lambda text: f"({text})")
    text = "".join(map(shown.push, steps)).replace(")(", "")
    assert text == "([THINK]2 and 2 …[/THINK])It is 4."


def test_reasoning_that_is_cut_short_stays_open():
    tokenizer, _, _ = open_both("v13-tekken")
    steps = steps_of(tokenizer, written(tokenizer, "[THINK]", "2 and"))
    assert read_reply(steps, tokenizer).reasoning == "2 and"
    assert content_of(steps, tokenizer, reasoning=True) == [{"type": "thinking", "thinking": "2 and", "closed": False}]


def test_a_prompt_may_have_begun_the_reasoning():
    tokenizer, _, _ = open_both("v13-tekken")
    assert ends_in_thought(written(tokenizer, "[/INST]", "[THINK]"), tokenizer)
    assert not ends_in_thought(written(tokenizer, "[THINK]", "x"), tokenizer)
    assert not ends_in_thought([], tokenizer)
    steps = steps_of(tokenizer, written(tokenizer, "2 and 2", "[/THINK]", "4"))
    reply = read_reply(steps, tokenizer, in_thought=True)
    assert (reply.reasoning, reply.text) == ("2 and 2", "4")


def test_nothing_is_held_back_beyond_a_divider():
    """The beginning of a stop string, or of a character, at the end of the reasoning is none of the text behind it."""
    tokenizer, _, _ = open_both("v13-tekken")
    half = tokenizer.encode("\N{TROPICAL FISH}", add_bos=False)[:1]
    ids = [*written(tokenizer, "[THINK]", "a ST"), *half, *written(tokenizer, "[/THINK]", "OP it STOP no")]
    reply = read_reply(steps_of(tokenizer, ids, ["STOP"]), tokenizer)
    assert (reply.reasoning, reply.text) == ("a ST\N{REPLACEMENT CHARACTER}", "OP it ")


def test_the_next_turn_is_what_mistral_common_encodes():
    tokenizer, ours, theirs = open_both("v13-tekken")
    said = written(tokenizer, "[THINK]", "2 and 2", "[/THINK]", "It is 4.")
    engine = ScriptedEngine([[*said, 2], [2]])
    conversation = Conversation(engine, tokenizer, ours, SamplingOptions(), max_tokens=50)
    list(conversation.say("What is 2 + 2?"))
    list(conversation.say("Why?"))
    thinking = {"type": "thinking", "thinking": "2 and 2", "closed": True}
    messages = [
        USER,
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "It is 4."}]},
        {"role": "user", "content": "Why?"},
    ]
    assert engine.fed == theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages)).tokens
    assert engine.prompts[1] == [*engine.prompts[0], *said, *engine.prefills[1]]  # the second turn feeds what is new


@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_that_divide_a_reply_need_not_be_special(tmp_path, special):
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    library = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(name, special=special) for name in ("[TOOL_CALLS]", "[THINK]", "[/THINK]")])
    library.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec(kind="tokenizer.json", file="tokenizer.json", bos_id=None, add_bos=False, eos_ids=(1,))
    tokenizer = open_tokenizer(spec, tmp_path)
    ids = library.encode('[THINK]so[/THINK]hi[TOOL_CALLS][{"name": "add", "arguments": {}}]').ids
    reply = read_reply(steps_of(tokenizer, ids), tokenizer, new_id=counted())
    assert (reply.reasoning, reply.text, [call["function"]["name"] for call in reply.tool_calls]) == (
        "so",
        "hi",
        ["add"],
    )
    stopped = steps_of(tokenizer, ids, stops=["[/THINK]"])
    assert "".join(step.text for step in stopped) == "so"
