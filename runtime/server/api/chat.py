"""`/v1/chat/completions`."""

from typing import Annotated, Any, Literal

import msgspec

from runtime.server.api.common import FinishReason, SamplingFields, Usage


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A part of a message that is text."""

    text: str


class ThinkingPart(msgspec.Struct, frozen=True, tag="thinking", tag_field="type", forbid_unknown_fields=True):
    """A part of a message that is reasoning."""

    thinking: str
    closed: bool = True


Content = str | list[TextPart | ThinkingPart]  # which roles may think is for the format to say


class SystemMessage(msgspec.Struct, frozen=True, tag="system", tag_field="role", forbid_unknown_fields=True):
    """Instructions to the model."""

    content: Content
    name: str | None = None


class DeveloperMessage(msgspec.Struct, frozen=True, tag="developer", tag_field="role", forbid_unknown_fields=True):
    """The newer name of a system message."""

    content: Content
    name: str | None = None


class UserMessage(msgspec.Struct, frozen=True, tag="user", tag_field="role", forbid_unknown_fields=True):
    """What the user says."""

    content: Content
    name: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the model asks for."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(
    msgspec.Struct, frozen=True, kw_only=True, tag="assistant", tag_field="role", forbid_unknown_fields=True
):
    """What the model has said; the fields that have only null are those that clients send back from other servers."""

    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class ToolMessage(msgspec.Struct, frozen=True, tag="tool", tag_field="role", forbid_unknown_fields=True):
    """The result of a call."""

    content: Content
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionSpec(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that the model may use."""

    function: FunctionSpec
    type: Literal["function"]


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one tool that the model must call."""

    function: NamedFunction
    type: Literal["function"]


class TextFormat(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """An answer in any form."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    """An answer that is a JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema with a name; `strict` refuses what cannot be enforced, and otherwise it is ignored."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """An answer that fits a JSON schema."""

    json_schema: JsonSchema


class RegexFormat(msgspec.Struct, frozen=True, tag="regex", tag_field="type", forbid_unknown_fields=True):
    """An answer that a regular expression matches as a whole."""

    pattern: str


class GrammarFormat(msgspec.Struct, frozen=True, tag="grammar", tag_field="type", forbid_unknown_fields=True):
    """An answer that a grammar in Lark's notation derives."""

    grammar: str


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


class ChatRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be continued."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that might have come, and its bytes as numbers."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token that came, and the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class ReplyMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model has answered."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer; `stop_reason` is the stop string that ended it."""

    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET


class ChatResponse(msgspec.Struct, frozen=True, kw_only=True):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    """More of a call: first the name, then pieces of the arguments."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """More of the call with this index; its first piece has the id and the type."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: FunctionDelta


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """More of an answer."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """More of one answer; `stop_reason` is the stop string that ended it."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the last one, if it was asked for, has the usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
