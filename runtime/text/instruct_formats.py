"""The table of instruct formats: which control tokens and texts messages, tools, calls and results become.

A row is one version of Mistral's tokenizers, as their reference encoder, mistral-common, writes it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from runtime.artifact.manifest import InstructVersion
from runtime.text.message_parts import SEPARATOR, Part
from runtime.text.messages import ToolCall


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
TOOL_CALLS, CALL_ID, ARGUMENTS = Control("[TOOL_CALLS]"), Control("[CALL_ID]"), Control("[ARGS]")
BEGIN_THINK, END_THINK = Control("[THINK]"), Control("[/THINK]")
BEGIN_PREFIX, BEGIN_SUFFIX = Control("[PREFIX]"), Control("[SUFFIX]")
BEGIN_SETTINGS, END_SETTINGS = Control("[MODEL_SETTINGS]"), Control("[/MODEL_SETTINGS]")

# The control tokens that divide a reply into text, reasoning and tool calls.
DIVIDERS = (TOOL_CALLS, CALL_ID, ARGUMENTS, BEGIN_THINK, END_THINK)


@dataclass(frozen=True)
class Turn:
    """Consecutive messages of one role, as the formats see them."""

    role: str
    content: tuple[Part, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str | None = None

    @property
    def text(self) -> str:
        """The content, as far as it is text."""
        return "".join(part for part in self.content if isinstance(part, str))


def as_json(value: object) -> str:
    """A value as the formats write JSON."""
    return json.dumps(value, ensure_ascii=False)


def _user_as_text(content: str) -> list[Piece]:
    return [f"[INST] {content} [/INST]"]


def _user_between_controls(content: str) -> list[Piece]:
    return [BEGIN_USER, content, END_USER]


def _parsed(text: str) -> object:
    """The JSON value of a text, or the text itself if it is not JSON; an empty text is an empty object."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _call(call: ToolCall) -> dict[str, object]:
    return {"name": call["function"]["name"], "arguments": _parsed(call["function"]["arguments"])}


def _calls_in_a_list(calls: Sequence[ToolCall]) -> list[Piece]:
    return [TOOL_CALLS, as_json([_call(call) for call in calls])]


def _calls_with_ids_in_a_list(calls: Sequence[ToolCall]) -> list[Piece]:
    return [TOOL_CALLS, as_json([{**_call(call), "id": call["id"]} for call in calls])]


def _arguments(call: ToolCall) -> list[Piece]:
    return [ARGUMENTS, as_json(_parsed(call["function"]["arguments"]))]


def _calls_with_ids_one_by_one(calls: Sequence[ToolCall]) -> list[Piece]:
    return [
        piece
        for call in calls
        for piece in (TOOL_CALLS, call["function"]["name"], CALL_ID, call["id"], *_arguments(call))
    ]


def _calls_one_by_one(calls: Sequence[ToolCall]) -> list[Piece]:
    return [piece for call in calls for piece in (TOOL_CALLS, call["function"]["name"], *_arguments(call))]


def _named_result(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, as_json([{"name": turn.name, "content": _parsed(turn.text)}]), END_RESULT]


def _result_with_id(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, as_json({"content": _parsed(turn.text), "call_id": turn.call_id}), END_RESULT]


def _result_as_text_with_id(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, turn.call_id, RESULT_CONTENT, turn.text, END_RESULT]


def _result_as_text(turn: Turn) -> list[Piece]:
    return [BEGIN_RESULT, turn.text, END_RESULT]


@dataclass(frozen=True)
class CallLayout:
    """What a model writes for its calls.

    `listed`: one [TOOL_CALLS] and a JSON list of all calls; otherwise a [TOOL_CALLS] for each, with its arguments
    behind [ARGS]. `with_ids`: an id for each call, within the list or behind [CALL_ID].
    """

    listed: bool
    with_ids: bool

    @property
    def controls(self) -> tuple[Control, ...]:
        """The control tokens of a call, in order."""
        if self.listed:
            return (TOOL_CALLS,)
        return (TOOL_CALLS, CALL_ID, ARGUMENTS) if self.with_ids else (TOOL_CALLS, ARGUMENTS)


@dataclass(frozen=True)
class ToolFormat:
    """How tools, calls and results are written."""

    layout: CallLayout
    calls: Callable[[Sequence[ToolCall]], list[Piece]]
    result: Callable[[Turn], list[Piece]]
    ids: Literal["unused", "nine", "any"]  # each call has an id, of nine letters or digits or any, named by its result
    keeps_history: bool = True  # calls and results before the last user turn are written too
    several_results: bool = True  # more than one result may answer one assistant turn
    beside_text: bool = True  # one assistant turn may hold text and calls
    paired: bool = False  # results are told apart by their ids, and written in the order of their calls
    listed_at: Literal["first user", "last user"] = "last user"  # the turn that the list of tools comes before


@dataclass(frozen=True)
class InstructFormat:
    """One version of the format; every tokenizer file of that version, SentencePiece or tekken, uses it."""

    user: Callable[[str], list[Piece]]
    system: Literal["first user", "last user", "own turn"]  # where system messages go
    strips_reply: bool  # trailing spaces of an assistant's text are dropped
    tools: ToolFormat | None
    controls: tuple[Control, ...]  # every control token that the format needs
    thinkers: tuple[str, ...] = ()  # the roles whose messages may hold reasoning, if the tokenizer has tokens for it
    between_parts: str = SEPARATOR  # between neighbouring text parts of one message
    has_settings: bool = False  # the model's settings come before the first user turn


_TEXT_CONTROLS = (BOS, EOS)
_TOOL_CONTROLS = (*_TEXT_CONTROLS, BEGIN_USER, END_USER, BEGIN_TOOLS, END_TOOLS, TOOL_CALLS, BEGIN_RESULT, END_RESULT)
_V3_TOOLS = ToolFormat(
    CallLayout(listed=True, with_ids=True), _calls_with_ids_in_a_list, _result_with_id, "nine", beside_text=False
)
_V7_TOOLS = replace(_V3_TOOLS, result=_result_as_text_with_id, beside_text=True)
_V13_TOOLS = ToolFormat(
    CallLayout(listed=False, with_ids=False),
    _calls_one_by_one,
    _result_as_text,
    "any",
    paired=True,
    listed_at="first user",
)
_V1 = InstructFormat(_user_as_text, "first user", strips_reply=False, tools=None, controls=_TEXT_CONTROLS)
_V2 = InstructFormat(
    _user_between_controls,
    "last user",
    strips_reply=True,
    tools=ToolFormat(
        CallLayout(listed=True, with_ids=False),
        _calls_in_a_list,
        _named_result,
        "unused",
        keeps_history=False,
        several_results=False,
        beside_text=False,
    ),
    controls=_TOOL_CONTROLS,
)
_V7 = replace(
    _V2, system="own turn", tools=_V7_TOOLS, controls=(*_TOOL_CONTROLS, BEGIN_SYSTEM, END_SYSTEM, RESULT_CONTENT)
)
_V11 = replace(
    _V7,
    tools=replace(
        _V7_TOOLS, layout=CallLayout(listed=False, with_ids=True), calls=_calls_with_ids_one_by_one, paired=True
    ),
    controls=(*_V7.controls, CALL_ID, ARGUMENTS),
)
_V13 = replace(_V11, tools=_V13_TOOLS, thinkers=("assistant", "system"))
_V15 = replace(
    _V13,
    controls=(*_V13.controls, BEGIN_SETTINGS, END_SETTINGS),
    thinkers=("assistant",),
    between_parts="",
    has_settings=True,
)

INSTRUCT_FORMATS: Mapping[InstructVersion, InstructFormat] = {
    "v1": _V1,
    "v2": _V2,
    "v3": replace(_V2, tools=_V3_TOOLS),
    "v7": _V7,
    "v11": _V11,
    "v13": _V13,
    "v15": _V15,
}
