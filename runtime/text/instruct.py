"""Conversations as token ids in the instruct formats of Mistral's own tokenizers.

Control tokens are written by id and texts as texts. A format defines which control tokens and texts a conversation
becomes; the formats are those of Mistral's reference encoder, mistral-common, with which the tests compare token for
token. A message's text never passes through a template, so nothing in it can become a control token.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from runtime.artifact.manifest import InstructVersion
from runtime.errors import UserError
from runtime.text.message_checks import check_order, check_tools
from runtime.text.messages import Message, Tool, ToolCall
from runtime.text.tokenizer import Tokenizer

SEPARATOR = "\n\n"  # between the contents of messages that become one turn


@dataclass(frozen=True)
class Control:
    """A control token, identified by its name in the vocabulary."""

    name: str


Piece = Control | str
BOS, EOS = Control("<s>"), Control("</s>")
BEGIN_USER, END_USER = Control("[INST]"), Control("[/INST]")
BEGIN_SYSTEM, END_SYSTEM = Control("[SYSTEM_PROMPT]"), Control("[/SYSTEM_PROMPT]")
BEGIN_TOOLS, END_TOOLS = Control("[AVAILABLE_TOOLS]"), Control("[/AVAILABLE_TOOLS]")
BEGIN_RESULT, RESULT_CONTENT, END_RESULT = (
    Control("[TOOL_RESULTS]"),
    Control("[TOOL_CONTENT]"),
    Control("[/TOOL_RESULTS]"),
)
TOOL_CALLS = Control("[TOOL_CALLS]")


@dataclass(frozen=True)
class Turn:
    """Consecutive messages of one role, as the formats see them."""

    role: str
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str | None = None


def _user_as_text(content: str) -> list[Piece]:
    return [f"[INST] {content} [/INST]"]


def _user_between_controls(content: str) -> list[Piece]:
    return [BEGIN_USER, content, END_USER]


def _call(call: ToolCall) -> dict[str, object]:
    return {"name": call["function"]["name"], "arguments": _parsed(call["function"]["arguments"])}


def _call_with_id(call: ToolCall) -> dict[str, object]:
    return {**_call(call), "id": call["id"]}


def _named_result(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, _json([{"name": turn.name, "content": _parsed(turn.content)}]), END_RESULT]


def _result_with_id(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, _json({"content": _parsed(turn.content), "call_id": turn.call_id}), END_RESULT]


def _result_as_text(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, turn.call_id, RESULT_CONTENT, turn.content, END_RESULT]


@dataclass(frozen=True)
class ToolFormat:
    """How tools, calls and results are written."""

    call: Callable[[ToolCall], dict[str, object]]
    result: Callable[[Turn], list[Piece]]
    needs_ids: bool  # each call has an id, and its result names it
    keeps_history: bool  # calls and results before the last user turn are written too
    several_results: bool  # more than one result may answer one assistant turn
    beside_text: bool  # one assistant turn may hold text and calls


@dataclass(frozen=True)
class InstructFormat:
    """One version of the format; every tokenizer file of that version, SentencePiece or tekken, uses it."""

    user: Callable[[str], list[Piece]]
    system: Literal["first user", "last user", "own turn"]  # where system messages go
    strips_reply: bool  # trailing spaces of an assistant's text are dropped
    tools: ToolFormat | None
    controls: tuple[Control, ...]  # every control token that the format may write


_TEXT_CONTROLS = (BOS, EOS)
_TOOL_CONTROLS = (*_TEXT_CONTROLS, BEGIN_USER, END_USER, BEGIN_TOOLS, END_TOOLS, TOOL_CALLS, BEGIN_RESULT, END_RESULT)
_V2_TOOLS = ToolFormat(
    _call, _named_result, needs_ids=False, keeps_history=False, several_results=False, beside_text=False
)
_V3_TOOLS = ToolFormat(
    _call_with_id, _result_with_id, needs_ids=True, keeps_history=True, several_results=True, beside_text=False
)
_V7_TOOLS = ToolFormat(
    _call_with_id, _result_as_text, needs_ids=True, keeps_history=True, several_results=True, beside_text=True
)

INSTRUCT_FORMATS: Mapping[InstructVersion, InstructFormat] = {
    "v1": InstructFormat(_user_as_text, "first user", strips_reply=False, tools=None, controls=_TEXT_CONTROLS),
    "v2": InstructFormat(
        _user_between_controls, "last user", strips_reply=True, tools=_V2_TOOLS, controls=_TOOL_CONTROLS
    ),
    "v3": InstructFormat(
        _user_between_controls, "last user", strips_reply=True, tools=_V3_TOOLS, controls=_TOOL_CONTROLS
    ),
    "v7": InstructFormat(
        _user_between_controls,
        "own turn",
        strips_reply=True,
        tools=_V7_TOOLS,
        controls=(*_TOOL_CONTROLS, BEGIN_SYSTEM, END_SYSTEM, RESULT_CONTENT),
    ),
}


class InstructEncoder:
    """Conversations to ids in one format; raises `UserError` if the tokenizer lacks its control tokens."""

    def __init__(self, name: InstructVersion, tokenizer: Tokenizer) -> None:
        self._name = name
        self._format = INSTRUCT_FORMATS[name]
        self._tokenizer = tokenizer
        known = tokenizer.control_tokens
        missing = [control.name for control in self._format.controls if control.name not in known]
        if missing:
            raise UserError(
                f"the tokenizer lacks {missing[0]}, which the instruct format {name} needs; compile the artifact again"
            )
        self._ids = {control: known[control.name] for control in self._format.controls}

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids up to where the next reply begins, starting with bos.

        Raises `UserError` for a conversation that the format cannot express.
        """
        check_order(messages)
        self._check_tools(messages, tools)
        ids: list[int] = []
        for piece in _pieces(self._format, messages, tools):
            ids += [self._ids[piece]] if isinstance(piece, Control) else self._tokenizer.encode(piece, add_bos=False)
        return ids

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        rules = self._format.tools
        if rules is not None:
            check_tools(messages, tools, needs_ids=rules.needs_ids, several_results=rules.several_results)
        elif tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            raise UserError(
                f"the conversation has tools, but the instruct format {self._name} does not support them: "
                "leave them out"
            )


def _pieces(layout: InstructFormat, messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Piece]:
    """The conversation as control tokens and texts, in order."""
    turns = _turns(layout, messages)
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    first, last = (users[0], users[-1]) if users else (-1, -1)
    system_at = {"first user": first, "last user": last, "own turn": None}[layout.system]
    system = SEPARATOR.join(
        message["content"] for message in messages if message["role"] == "system" and message["content"]
    )
    yield BOS
    for i, turn in enumerate(turns):
        if turn.role == "user":
            if tools and i == last:
                yield from (BEGIN_TOOLS, _json([_tool(tool) for tool in tools]), END_TOOLS)
            yield from layout.user(system + SEPARATOR + turn.content if system and i == system_at else turn.content)
        elif turn.role == "system":
            yield from (BEGIN_SYSTEM, turn.content, END_SYSTEM)
        else:
            yield from _model_turn(layout, turn, is_history=i < last)


def _model_turn(layout: InstructFormat, turn: Turn, *, is_history: bool) -> Iterator[Piece]:
    """An assistant's turn or a tool's result; some formats omit calls and results from before the last user turn."""
    tools = layout.tools
    if (turn.calls or turn.role == "tool") and tools is not None:
        if turn.content and turn.calls and not tools.beside_text:
            raise UserError(
                "an assistant's turn has both text and tool calls, which this model was not trained on; "
                "keep one of the two"
            )
        if is_history and not tools.keeps_history:
            return
        if turn.role == "tool":
            yield from tools.result(turn)
            return
    if turn.content:
        yield turn.content.rstrip(" ") if layout.strips_reply else turn.content
    if turn.calls and tools is not None:
        yield from (TOOL_CALLS, _json([tools.call(call) for call in turn.calls]))
    yield EOS


def _turns(layout: InstructFormat, messages: Sequence[Message]) -> list[Turn]:
    """Join consecutive messages of one role into turns.

    System messages are included only if the format gives them turns of their own; otherwise the first turn must be a
    user's, and an empty one is added if needed.
    """
    turns: list[Turn] = []
    for role, group in groupby(messages, key=lambda message: message["role"]):
        same = list(group)
        if role in ("user", "assistant"):
            content = SEPARATOR.join(message["content"] for message in same if message["content"])
            turns.append(Turn(role, content, tuple(call for message in same for call in message.get("tool_calls", ()))))
        elif role == "tool":
            turns += [
                Turn(role, message["content"], call_id=message.get("tool_call_id", ""), name=message.get("name"))
                for message in same
            ]
        elif layout.system == "own turn":
            turns += [Turn(role, message["content"]) for message in same]
    if layout.system != "own turn" and (not turns or turns[0].role != "user"):
        turns.insert(0, Turn("user"))
    return turns


def _tool(tool: Tool) -> dict[str, object]:
    function = tool["function"]
    described = {
        "name": function["name"],
        "description": function.get("description", ""),
        "parameters": function.get("parameters", {}),
    }
    return {"type": tool["type"], "function": described}


def _parsed(text: str) -> object:
    """The JSON value of a text, or the text itself if it is not JSON; an empty text is an empty object."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
