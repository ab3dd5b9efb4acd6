"""Checks by the rules of Mistral's reference encoder.

They refuse conversations that no model was trained on before these become tokens.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from runtime.errors import UserError
from runtime.text.call_ids import WELL_FORMED_ID
from runtime.text.messages import Message, Tool

FOLLOWERS: Mapping[str, tuple[str, ...]] = {  # which roles may follow a role
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NO_ID = "null"  # how Mistral's reference encoder writes that there is none


def check_order(messages: Sequence[Message]) -> None:
    """Raise `UserError` unless each role may follow the one before it and the last message calls for a reply.

    Assistant messages must not be empty.
    """
    for i, message in enumerate(messages):
        if message["role"] not in FOLLOWERS:
            raise UserError(f"message {i} has the role {message['role']!r}, expected one of {', '.join(FOLLOWERS)}")
        if message["role"] == "assistant" and not message["content"] and not message.get("tool_calls"):
            raise UserError(f"message {i} is from an assistant and has neither content nor tool calls; leave it out")
    for i, (before, after) in enumerate(pairwise(messages), 1):
        if after["role"] not in FOLLOWERS[before["role"]]:
            expected = ", ".join(FOLLOWERS[before["role"]])
            raise UserError(
                f"message {i} has the role {after['role']} after {before['role']}, expected one of {expected}"
            )
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(
            "the conversation does not end with a message that calls for a reply; end it with one from a user or a tool"
        )


def check_tools(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    *,
    ids: Literal["unused", "nine", "any"],
    several_results: bool,
    paired_by_id: bool,
) -> None:
    """Raise `UserError` unless names and ids are well-formed and each call has one result.

    Without `several_results`, the format cannot express the results of more than one call since the last user message.
    With `paired_by_id`, a result answers the call whose id it has, in any order.
    """
    check_tool_names(tools)
    for i, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            _check_name(call["function"]["name"], f"a call in message {i}")
        if message["role"] == "tool" and message.get("name") is not None:
            _check_name(message["name"], f"message {i}")
        if ids != "unused":
            _check_ids(message, i, any_text=ids == "any")
    _check_pairs(messages, by_id=paired_by_id)
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if not several_results and any(len(message.get("tool_calls", ())) > 1 for message in messages[last_user + 1 :]):
        raise UserError(
            "an assistant's message calls several tools, but this model takes one result for each message; "
            "let it call one tool at a time"
        )


def check_tool_names(tools: Sequence[Tool]) -> None:
    """Raise `UserError` unless the name of each tool is one that every format can write."""
    for tool in tools:
        _check_name(tool["function"]["name"], "a tool")


def _check_name(name: str, owner: str) -> None:
    if not FUNCTION_NAME.fullmatch(name):
        raise UserError(
            f"{owner} has the function name {name!r}, expected 1 to 64 letters, digits, underscores or dashes"
        )


def _check_ids(message: Message, index: int, *, any_text: bool) -> None:
    ids = [call["id"] for call in message.get("tool_calls", ())]
    ids += [message.get("tool_call_id", "")] if message["role"] == "tool" else []
    for call_id in ids:
        if any_text and (not call_id or call_id == NO_ID):
            raise UserError(f"message {index} has the tool call id {call_id!r}, expected any other text")
        if not any_text and not WELL_FORMED_ID.fullmatch(call_id):
            raise UserError(f"message {index} has the tool call id {call_id!r}, expected nine letters or digits")


def _check_pairs(messages: Sequence[Message], *, by_id: bool) -> None:
    """Check that each call has its result before the assistant's next message; without `by_id`, only their number."""
    unanswered: list[str] = []
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            answered = message.get("tool_call_id", "") if by_id else unanswered[0] if unanswered else ""
            if answered not in unanswered:
                raise UserError(f"message {i} is a tool result that answers no call; leave it out")
            unanswered.remove(answered)
        elif message["role"] == "assistant":
            if unanswered:
                raise UserError(
                    f"message {i} is from an assistant while {len(unanswered)} tool calls have no result; "
                    "add a message with the role tool for each"
                )
            unanswered = [call.get("id", NO_ID) for call in message.get("tool_calls", ())]
            if by_id and len(set(unanswered)) < len(unanswered):
                raise UserError(f"message {i} has two tool calls with the same id; give each one its own")
    if unanswered:
        raise UserError(f"{len(unanswered)} tool calls have no result; add a message with the role tool for each")
