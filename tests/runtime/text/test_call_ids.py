"""Ids of tool calls from other software, in formats that write nine letters or digits."""

import random
import re
import uuid

import pytest

from runtime.errors import UserError
from runtime.text.call_ids import WELL_FORMED_ID, new_call_id, with_short_ids
from tests.helpers.mistral_tokenizers import open_both

USER = {"role": "user", "content": "What is 2 + 2?"}


def conversation(*ids):
    """A round with a call and a result for each id."""
    calls = [{"id": one, "type": "function", "function": {"name": "add", "arguments": "{}"}} for one in ids]
    results = [{"role": "tool", "content": str(i), "tool_call_id": one, "name": "add"} for i, one in enumerate(ids)]
    return [USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def ids_of(messages):
    calls = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    return calls, [message["tool_call_id"] for message in messages if message["role"] == "tool"]


def test_new_ids_are_well_formed_and_differ():
    ids = {new_call_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(map(WELL_FORMED_ID.fullmatch, ids))


def test_foreign_ids_become_short_ones_of_calls_and_results_alike():
    foreign = ("call_abc123", "toolu_01A09q90qw90lq917835lq9", str(uuid.UUID(int=7)), "größe", "a1B2c3D4e", "x")
    messages = conversation(*foreign)
    calls, results = ids_of(with_short_ids(messages))
    assert calls == results
    assert len(set(calls)) == len(foreign)
    assert all(map(WELL_FORMED_ID.fullmatch, calls))
    assert calls[4] == "a1B2c3D4e", "one that is well-formed stays"
    assert ids_of(messages)[0] == list(foreign), "what was given is as it was"


def test_ids_stay_the_same_as_a_conversation_grows():
    one = ids_of(with_short_ids(conversation("call_1")))[0]
    both = ids_of(with_short_ids(conversation("call_1") + conversation("call_2", "call_3")))[0]
    assert both[:1] == one
    assert with_short_ids(conversation("call_1")) == with_short_ids(conversation("call_1"))


def test_a_short_id_that_is_taken_is_not_given_again():
    (short,) = set(ids_of(with_short_ids(conversation("call_1")))[0])
    calls, results = ids_of(with_short_ids(conversation("call_1", short)))
    assert calls == results
    assert calls[1] == short
    assert calls[0] != short
    assert WELL_FORMED_ID.fullmatch(calls[0])


def test_different_ids_never_become_the_same():
    draw = random.Random(1)
    ids = list(dict.fromkeys("".join(draw.choices("ab_1", k=draw.randint(1, 12))) for _ in range(3000)))
    assert len(set(ids_of(with_short_ids(conversation(*ids)))[0])) == len(ids)


def test_messages_without_ids_are_left_alone():
    result = {"role": "tool", "content": "4"}
    assert with_short_ids([USER, result, {**result, "tool_call_id": ""}]) == [
        USER,
        result,
        {**result, "tool_call_id": ""},
    ]


@pytest.mark.parametrize("name", ["v3", "v7", "v11-tekken"])
def test_formats_of_nine_letters_take_any_id(name):
    tokenizer, ours, _ = open_both(name)
    text = "".join(tokenizer.token_text(one) or "" for one in ours.encode(conversation("call_abc123")))
    short = ids_of(with_short_ids(conversation("call_abc123")))[0][0]
    assert ours.encode(conversation("call_abc123")) == ours.encode(conversation(short))
    assert not re.search("call_abc", text)


def test_an_id_that_is_missing_is_refused_as_ever():
    _, ours, _ = open_both("v3")
    with pytest.raises(UserError, match="has the tool call id '', expected nine letters or digits"):
        ours.encode(conversation(""))
