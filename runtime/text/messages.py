"""The parts of a conversation, in the form that chat templates and chat servers share."""

from typing import Literal, NotRequired, TypedDict


class FunctionCall(TypedDict):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the model requests; its result has the same id."""

    id: str
    function: FunctionCall
    type: NotRequired[Literal["function"]]


class TextPart(TypedDict):
    """A part of a message's content that is plain text."""

    type: Literal["text"]
    text: str


class ThinkingPart(TypedDict):
    """A part of a message's content that is reasoning; `closed` (true unless given) says whether it has ended."""

    type: Literal["thinking"]
    thinking: str | list[TextPart]
    closed: NotRequired[bool]


ContentPart = TextPart | ThinkingPart


class Message(TypedDict):
    """One message: `role` is system, user, assistant or tool.

    `tool_calls` belong to assistants, `tool_call_id` and `name` to tools.
    """

    role: str
    content: str | list[ContentPart]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Function(TypedDict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, object]]
    strict: NotRequired[bool]  # whether a schema with parts that are not supported is refused


class Tool(TypedDict):
    """A tool that the model may use; the only kind is a function."""

    type: Literal["function"]
    function: Function
