"""The events of a stream of `/v1/responses`."""

from typing import Literal

import msgspec

from runtime.server.api.chat import TokenLogprob
from runtime.server.api.responses import OutputItem, OutputText, ReasoningText, Response

ResponseEventKind = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]
ItemEventKind = Literal["response.output_item.added", "response.output_item.done"]
ContentEventKind = Literal["response.content_part.added", "response.content_part.done"]
TextEventKind = Literal[
    "response.output_text.delta",
    "response.output_text.done",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
]
ArgumentsEventKind = Literal["response.function_call_arguments.delta", "response.function_call_arguments.done"]


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event about the whole answer."""

    type: ResponseEventKind
    sequence_number: int
    response: Response


class ItemEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An item has begun, or is over."""

    type: ItemEventKind
    sequence_number: int
    output_index: int
    item: OutputItem


class ContentPartEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The text of an item has begun, or is over."""

    type: ContentEventKind
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class TextEvent(msgspec.Struct, frozen=True, kw_only=True):
    """More text in `delta`, or at the end the whole in `text`; `logprobs` are those of a message's tokens."""

    type: TextEventKind
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[TokenLogprob] | msgspec.UnsetType = msgspec.UNSET


class ArgumentsEvent(msgspec.Struct, frozen=True, kw_only=True):
    """More of a call's arguments in `delta`, or at the end the whole in `arguments`, with the name."""

    type: ArgumentsEventKind
    sequence_number: int
    item_id: str
    output_index: int
    delta: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET


Event = ResponseEvent | ItemEvent | ContentPartEvent | TextEvent | ArgumentsEvent
