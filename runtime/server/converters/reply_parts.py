"""A chat's reply as parts that follow each other: reasoning, text, and tool calls.

Other APIs divide an answer so; `/v1/chat/completions` names the kind in each piece instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from runtime.server.api import chat

PartKind = Literal["reasoning", "text", "call"]


@dataclass(eq=False)
class Part:
    """One part as far as it has come; the text of a call is its arguments, in JSON."""

    number: int
    kind: PartKind
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[chat.TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class PartEvent:
    """Something that happened to a part."""

    part: Part


@dataclass(frozen=True)
class PartBegun(PartEvent):
    """The part is the next one, still empty."""


@dataclass(frozen=True)
class PartGrown(PartEvent):
    """The part has more text, and the log probabilities of more tokens."""

    text: str
    logprobs: Sequence[chat.TokenLogprob]


@dataclass(frozen=True)
class PartEnded(PartEvent):
    """The part is complete, or what there will be of it."""


class ReplyParts:
    """Takes the pieces of one choice. `finish_reason` and `stop_reason` are those of the last piece."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None
        self._open: Part | None = None
        self._call_index: int | None = None
        self._held: list[chat.TokenLogprob] = []  # of tokens whose text is still to come

    def push(self, piece: chat.ChunkChoice) -> list[PartEvent]:
        """What a piece adds; all parts have ended after the last one."""
        delta = piece.delta
        events: list[PartEvent] = []
        self._held += [] if piece.logprobs is None else piece.logprobs.content
        if delta.reasoning_content is not msgspec.UNSET and delta.reasoning_content:
            events += self._grow("reasoning", delta.reasoning_content, ())
        if delta.content is not msgspec.UNSET and delta.content:
            events += self._grow("text", delta.content, self._taken())
        for call in [] if delta.tool_calls is msgspec.UNSET else delta.tool_calls:
            events += self._call(call)
        if self._open is not None and self._open.kind != "text":
            self._held.clear()  # those of tokens that are no text
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.stop_reason = None if piece.stop_reason is msgspec.UNSET else piece.stop_reason
            if self._held and self._open is not None and self._open.kind == "text":
                events += self._more("", self._taken())
            events += self.end()
        return events

    def end(self) -> list[PartEvent]:
        """End the part that is open, if there is one."""
        ended: list[PartEvent] = [] if self._open is None else [PartEnded(self._open)]
        self._open = self._call_index = None
        return ended

    def _grow(self, kind: PartKind, text: str, logprobs: Sequence[chat.TokenLogprob]) -> list[PartEvent]:
        begun = self._begin(Part(len(self.parts), kind)) if self._open is None or self._open.kind != kind else []
        return begun + self._more(text, logprobs)

    def _call(self, delta: chat.ToolCallDelta) -> list[PartEvent]:
        begun: list[PartEvent] = []
        if delta.index != self._call_index:
            call_id = "" if delta.id is msgspec.UNSET else delta.id
            name = "" if delta.function.name is msgspec.UNSET else delta.function.name
            begun = self._begin(Part(len(self.parts), "call", call_id, name))
            self._call_index = delta.index
        return begun + (self._more(delta.function.arguments, ()) if delta.function.arguments else [])

    def _taken(self) -> list[chat.TokenLogprob]:
        taken, self._held = self._held, []
        return taken

    def _begin(self, part: Part) -> list[PartEvent]:
        ended = self.end()
        self.parts.append(part)
        self._open = part
        return [*ended, PartBegun(part)]

    def _more(self, text: str, logprobs: Sequence[chat.TokenLogprob]) -> list[PartEvent]:
        assert self._open is not None
        self._open.text += text
        self._open.logprobs += logprobs
        return [PartGrown(self._open, text, logprobs)]
