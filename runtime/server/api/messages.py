"""`/v1/messages`: Anthropic's Messages API."""

from typing import Annotated, Any, Literal

import msgspec

from runtime.server.api.common import Count


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a cached prefix may end; prefixes are found here without it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """Text."""

    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class TextOnly(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text where no other block may stand; a struct with a tag would be taken without its type there."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking", tag_field="type", forbid_unknown_fields=True):
    """Reasoning of the model; the signature is not looked at."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type", forbid_unknown_fields=True):
    """A call that the model asks for."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(msgspec.Struct, frozen=True, tag="tool_result", tag_field="type", forbid_unknown_fields=True):
    """The result of a call; one that `is_error` says so in its content, which is all that the model reads."""

    tool_use_id: str
    content: str | list[TextOnly] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class UserMessage(msgspec.Struct, frozen=True, tag="user", tag_field="role", forbid_unknown_fields=True):
    """What the user says, after the results of the calls before."""

    content: str | list[TextBlock | ToolResultBlock]


class AssistantMessage(msgspec.Struct, frozen=True, tag="assistant", tag_field="role", forbid_unknown_fields=True):
    """What the model has said."""

    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock]


class SystemMessage(msgspec.Struct, frozen=True, tag="system", tag_field="role", forbid_unknown_fields=True):
    """Instructions to the model within a conversation."""

    content: str | list[TextOnly]


Message = UserMessage | AssistantMessage | SystemMessage


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may use; `input_schema` is a JSON schema."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AutoChoice(msgspec.Struct, frozen=True, tag="auto", tag_field="type", forbid_unknown_fields=True):
    """The model decides whether it calls tools."""

    disable_parallel_tool_use: bool | None = None


class AnyChoice(msgspec.Struct, frozen=True, tag="any", tag_field="type", forbid_unknown_fields=True):
    """The model must call a tool."""

    disable_parallel_tool_use: bool | None = None


class NamedChoice(msgspec.Struct, frozen=True, tag="tool", tag_field="type", forbid_unknown_fields=True):
    """The model must call this tool."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(msgspec.Struct, frozen=True, tag="none", tag_field="type", forbid_unknown_fields=True):
    """The model must not call a tool."""


ToolChoice = AutoChoice | AnyChoice | NamedChoice | NoChoice


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom a request is for."""

    user_id: str | None = None


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the model thinks: it decides so by itself."""

    type: Literal["adaptive"]


class JsonOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer that fits a JSON schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: JsonOutput | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation whose tokens are to be counted."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    system: str | list[TextOnly] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputSettings | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be continued."""

    max_tokens: Count
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ReplyText(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    """Text of the model."""

    text: str


class ReplyThinking(msgspec.Struct, frozen=True, tag="thinking", tag_field="type"):
    """Reasoning of the model, which nobody has signed."""

    thinking: str
    signature: str = ""


class ReplyToolUse(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type"):
    """A call that the model asks for; its input is JSON as it was written."""

    id: str
    name: str
    input: msgspec.Raw


ReplyBlock = ReplyText | ReplyThinking | ReplyToolUse


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens of a request: of its input those that were computed, and those that were found, and of the answer."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ReplyBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStart(msgspec.Struct, frozen=True, tag="message_start", tag_field="type"):
    """The answer begins."""

    message: Reply


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start", tag_field="type"):
    """A block begins, still empty."""

    index: int
    content_block: ReplyBlock


class TextDelta(msgspec.Struct, frozen=True, tag="text_delta", tag_field="type"):
    """More text."""

    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag="thinking_delta", tag_field="type"):
    """More reasoning."""

    thinking: str


class InputDelta(msgspec.Struct, frozen=True, tag="input_json_delta", tag_field="type"):
    """More of a call's input, as JSON text."""

    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta", tag_field="type"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop", tag_field="type"):
    """A block is over."""

    index: int


class MessageEnd(msgspec.Struct, frozen=True):
    """Why the answer has ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta", tag_field="type"):
    """The end of the answer, and its tokens."""

    delta: MessageEnd
    usage: MessageUsage


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop", tag_field="type"):
    """No more events follow."""


class Ping(msgspec.Struct, frozen=True, tag="ping", tag_field="type"):
    """Nothing has happened."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in one sentence."""

    type: str
    message: str


class Error(msgspec.Struct, frozen=True, tag="error", tag_field="type"):
    """The body of every answer that is an error, and the event of an answer that fails after it has begun."""

    error: ErrorDetail
    request_id: str


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | Error


class CountResponse(msgspec.Struct, frozen=True):
    """The tokens of a conversation."""

    input_tokens: int
