"""The content of messages as texts and thoughts; whatever else a message may hold elsewhere is refused by name."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from runtime.errors import UserError
from runtime.text.messages import Message, TextPart

SEPARATOR = "\n\n"  # between the contents of messages that become one turn


@dataclass(frozen=True)
class Thinking:
    """Reasoning within a message; `closed` says whether it has ended."""

    text: str
    closed: bool


Part = str | Thinking


def parts_of(message: Message, index: int) -> list[Part]:
    """The parts of one message's content; `index` names the message in errors.

    Raises `UserError` for a part that is neither text nor reasoning, such as an image.
    """
    content = message["content"]
    return [content] if isinstance(content, str) else [_part(part, index) for part in content]


def joined(contents: Sequence[Sequence[Part]], *, within: str = SEPARATOR) -> tuple[Part, ...]:
    """The contents of messages as that of one turn, joined as in Mistral's reference encoder.

    Neighbouring texts become one, with `within` between those of one message; empty texts are dropped.
    """
    turn: list[Part] = []
    text = ""
    for parts in contents:
        joint = SEPARATOR
        for part in parts:
            if isinstance(part, Thinking):
                turn += [text, part] if text else [part]
                text = ""
            elif part:
                text += joint + part if text else part
                joint = within
    return (*turn, text) if text else tuple(turn)


def as_texts(messages: Sequence[Message]) -> list[Message]:
    """The messages with texts for content, and no reasoning; raises `UserError` like `parts_of`."""
    plain = [
        "".join(part for part in parts_of(message, i) if isinstance(part, str)) for i, message in enumerate(messages)
    ]
    return [cast(Message, {**message, "content": text}) for message, text in zip(messages, plain, strict=True)]


def in_parts(messages: Sequence[Message], roles: Collection[str]) -> list[Message]:
    """The messages, with texts of these roles as lists of one text part."""
    return [
        cast(Message, {**message, "content": [TextPart(type="text", text=message["content"])]})
        if message["role"] in roles and isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _part(part: Mapping[str, object], index: int) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return cast(str, part["text"])
    if kind == "thinking":
        return Thinking(_thought(part.get("thinking"), index), part.get("closed", True) is not False)
    raise UserError(
        f"message {index} has a part of the type {kind!r}, but only the text part of the model is compiled; "
        "give parts of the types text and thinking"
    )


def _thought(thinking: object, index: int) -> str:
    """The text of a thought, which is a text or a list of text parts."""
    if isinstance(thinking, str):
        return thinking
    parts = [_part(part, index) for part in thinking] if isinstance(thinking, list) else [Thinking("", closed=True)]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"message {index} has a thinking part that is not made of text, expected a text or text parts")
    return "".join(part for part in parts if isinstance(part, str))
