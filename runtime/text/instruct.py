"""Conversations as token ids in the instruct formats of Mistral's own tokenizers.

Control tokens are written by id and texts as texts. A format defines which control tokens and texts a conversation
becomes; the formats are those of Mistral's reference encoder, mistral-common, with which the tests compare token for
token. A message's text never passes through a template, so nothing in it can become a control token.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from runtime.artifact.manifest import InstructVersion
from runtime.errors import UserError
from runtime.text.call_ids import with_short_ids
from runtime.text.instruct_formats import (
    BEGIN_SETTINGS,
    BEGIN_SYSTEM,
    BEGIN_THINK,
    BEGIN_TOOLS,
    BOS,
    END_SETTINGS,
    END_SYSTEM,
    END_THINK,
    END_TOOLS,
    EOS,
    INSTRUCT_FORMATS,
    CallLayout,
    Control,
    InstructFormat,
    Piece,
    Turn,
    as_json,
)
from runtime.text.message_checks import check_order, check_tools
from runtime.text.message_parts import SEPARATOR, Part, Thinking, joined, parts_of
from runtime.text.messages import Message, Tool, ToolCall
from runtime.text.tokenizer import Tokenizer


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
        thinking = [control for control in (BEGIN_THINK, END_THINK) if control.name in known]
        self._ids = {control: known[control.name] for control in (*self._format.controls, *thinking)}

    @property
    def writes_reasoning(self) -> bool:
        """Whether an assistant's messages may hold reasoning."""
        return "assistant" in self._format.thinkers and {BEGIN_THINK, END_THINK} <= self._ids.keys()

    @property
    def writes_tools(self) -> bool:
        """Whether the format has tools."""
        return self._format.tools is not None

    @property
    def call_layout(self) -> CallLayout | None:
        """What the model writes for its calls; None if the format has no tools."""
        return self._format.tools.layout if self._format.tools else None

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids up to where the next reply begins, starting with bos.

        Raises `UserError` for a conversation that the format cannot express.
        """
        check_order(messages)
        if self._format.tools is not None and self._format.tools.ids == "nine":
            messages = with_short_ids(messages)
        self._check_tools(messages, tools)
        contents = [parts_of(message, i) for i, message in enumerate(messages)]
        self._check_thinking(messages, contents)
        settings = self._tokenizer.spec.model_settings if self._format.has_settings else None
        ids: list[int] = []
        for piece in _pieces(self._format, messages, contents, tools, settings):
            ids += [self._ids[piece]] if isinstance(piece, Control) else self._tokenizer.encode(piece, add_bos=False)
        return ids

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        rules = self._format.tools
        if rules is not None:
            check_tools(
                messages, tools, ids=rules.ids, several_results=rules.several_results, paired_by_id=rules.paired
            )
        elif tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            raise UserError(
                f"the conversation has tools, but the instruct format {self._name} does not support them: "
                "leave them out"
            )

    def _check_thinking(self, messages: Sequence[Message], contents: Sequence[Sequence[Part]]) -> None:
        for i, (message, parts) in enumerate(zip(messages, contents, strict=True)):
            if not any(isinstance(part, Thinking) for part in parts):
                continue
            if message["role"] not in self._format.thinkers:
                raise UserError(
                    f"message {i} has reasoning, which the instruct format {self._name} does not support in a message "
                    f"with the role {message['role']}: leave it out"
                )
            if not {BEGIN_THINK, END_THINK} <= self._ids.keys():
                raise UserError(
                    f"message {i} has reasoning, but the tokenizer has no {BEGIN_THINK.name} and {END_THINK.name}: "
                    "leave it out"
                )


def _pieces(
    layout: InstructFormat,
    messages: Sequence[Message],
    contents: Sequence[Sequence[Part]],
    tools: Sequence[Tool],
    settings: str | None,
) -> Iterator[Piece]:
    """The conversation as control tokens and texts, in order; `contents` are those of the messages, as parts."""
    turns = _turns(layout, messages, contents)
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    first, last = (users[0], users[-1]) if users else (-1, -1)
    index_of = {"first user": first, "last user": last, "own turn": None}
    system_at, tools_at = index_of[layout.system], index_of[layout.tools.listed_at if layout.tools else "last user"]
    system = _system_text(layout, messages, contents)
    yield BOS
    for i, turn in enumerate(turns):
        if turn.role == "user":
            if tools and i == tools_at:
                yield from (BEGIN_TOOLS, as_json([_tool(tool) for tool in tools]), END_TOOLS)
            if settings is not None and i == first:
                yield from (BEGIN_SETTINGS, settings, END_SETTINGS)
            yield from layout.user(system + SEPARATOR + turn.text if system and i == system_at else turn.text)
        elif turn.role == "system":
            yield from (BEGIN_SYSTEM, *_content(turn.content), END_SYSTEM)
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
    elif not turn.content:
        raise UserError("an assistant's turn consists of empty parts; leave it out")
    thinks = any(isinstance(part, Thinking) for part in turn.content)
    yield from [turn.text.rstrip(" ")] if layout.strips_reply and not thinks else _content(turn.content)
    if turn.calls and tools is not None:
        yield from tools.calls(turn.calls)
    yield EOS


def _content(parts: Sequence[Part]) -> Iterator[Piece]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            yield from (BEGIN_THINK, part.text, *((END_THINK,) if part.closed else ()))


def _system_text(layout: InstructFormat, messages: Sequence[Message], contents: Sequence[Sequence[Part]]) -> str:
    """The system messages as one text, for the formats that put them into a user's turn."""
    turns = [
        Turn("system", joined([parts], within=layout.between_parts))
        for message, parts in zip(messages, contents, strict=True)
        if message["role"] == "system" and message["content"]
    ]
    return SEPARATOR.join(turn.text for turn in turns)


def _turns(layout: InstructFormat, messages: Sequence[Message], contents: Sequence[Sequence[Part]]) -> list[Turn]:
    """Join consecutive messages of one role into turns.

    System messages are included only if the format gives them turns of their own; otherwise the first turn must be a
    user's, and an empty one is added if needed.
    """
    turns: list[Turn] = []
    for role, group in groupby(zip(messages, contents, strict=True), key=lambda pair: pair[0]["role"]):
        same = list(group)
        if role in ("user", "assistant"):
            content = joined([parts for _, parts in same], within=layout.between_parts)
            turns.append(
                Turn(role, content, tuple(call for message, _ in same for call in message.get("tool_calls", ())))
            )
        elif role == "tool" or layout.system == "own turn":
            alone = [
                Turn(
                    role,
                    joined([parts], within=layout.between_parts),
                    call_id=message.get("tool_call_id", ""),
                    name=message.get("name"),
                )
                for message, parts in same
            ]
            turns += _in_order_of_calls(layout, alone, turns[-1].calls if turns else ()) if role == "tool" else alone
    if layout.system != "own turn" and (not turns or turns[0].role != "user"):
        turns.insert(0, Turn("user"))
    return turns


def _in_order_of_calls(layout: InstructFormat, results: list[Turn], calls: Sequence[ToolCall]) -> list[Turn]:
    if layout.tools is None or not layout.tools.paired:
        return results
    places = {call["id"]: i for i, call in enumerate(calls)}
    return sorted(results, key=lambda result: places[result.call_id])


def _tool(tool: Tool) -> dict[str, object]:
    function = tool["function"]
    described = {
        "name": function["name"],
        "description": function.get("description", ""),
        "parameters": function.get("parameters", {}),
    }
    return {"type": tool["type"], "function": described}
