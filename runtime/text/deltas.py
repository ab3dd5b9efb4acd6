"""The parts of a reply as they come: text, reasoning, and tool calls in pieces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextDelta:
    """More of the text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model has thought."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """The beginning of a tool call, the `index`-th of the reply from 0 on."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments of a call, which are JSON text."""

    index: int
    text: str


Delta = TextDelta | ReasoningDelta | CallDelta | ArgumentsDelta
