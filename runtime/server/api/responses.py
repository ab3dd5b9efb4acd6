"""`/v1/responses`, without anything stored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from runtime.server.api.chat import TokenLogprob
from runtime.server.api.common import Count

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(msgspec.Struct, frozen=True, tag="input_text", tag_field="type", forbid_unknown_fields=True):
    """Text of a user, of instructions, or of a call's result."""

    text: str


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type", forbid_unknown_fields=True):
    """Text of the model."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] | None = None


class SummaryText(msgspec.Struct, frozen=True, tag="summary_text", tag_field="type", forbid_unknown_fields=True):
    """A summary of reasoning."""

    text: str


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text", tag_field="type", forbid_unknown_fields=True):
    """Reasoning as it was."""

    text: str


class MessageItem(
    msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="type", forbid_unknown_fields=True
):
    """What somebody has said."""

    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[InputText | OutputText]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ReasoningItem(
    msgspec.Struct, frozen=True, kw_only=True, tag="reasoning", tag_field="type", forbid_unknown_fields=True
):
    """Reasoning of the model, which counts by its `content`."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: None = None


class CallItem(
    msgspec.Struct, frozen=True, kw_only=True, tag="function_call", tag_field="type", forbid_unknown_fields=True
):
    """A call that the model asks for; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(
    msgspec.Struct, frozen=True, kw_only=True, tag="function_call_output", tag_field="type", forbid_unknown_fields=True
):
    """The result of a call."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    name: str | None = None
    status: Status | None = None


Item = MessageItem | ReasoningItem | CallItem | CallOutputItem


class Items(msgspec.Struct, frozen=True):
    """The items of a request, each with its type."""

    input: list[Item]


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one tool that the model must call."""

    type: Literal["function"]
    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


class PlainFormat(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """An answer in any form."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    """An answer that is a JSON object."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """An answer that fits a JSON schema."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: PlainFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream has besides its events: nothing."""

    include_obfuscation: Literal[False] | None = None


Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
ItemFields = Annotated[
    dict[str, Any],
    msgspec.Meta(description="an item of type message, the default, reasoning, function_call or function_call_output"),
]


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be continued.

    Nothing is stored, so that `store`, `background`, `previous_response_id`, `conversation` and `metadata` are taken
    only as far as they ask for nothing. Reasoning comes in plain text with every answer, in place of encrypted content.
    `prompt_cache_key`, `safety_identifier` and `user` change nothing.
    """

    model: str
    input: str | list[ItemFields]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    include: list[Include] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    metadata: Mapping[str, str] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """What the model has said."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning", tag_field="type"):
    """What the model has thought."""

    id: str
    status: Status
    summary: list[SummaryText] = []
    content: list[ReasoningText]


class OutputCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call", tag_field="type"):
    """A call that the model asks for."""

    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(msgspec.Struct, frozen=True):
    """How many of the input's tokens needed no computing; writing them down costs nothing."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """How many of the generated tokens were reasoning."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseError(msgspec.Struct, frozen=True):
    """What went wrong after the answer had begun."""

    code: str
    message: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status | Literal["failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: None = None
    store: Literal[False] = False
    temperature: float
    text: TextSettings
    tool_choice: Literal["none", "auto", "required"] | NamedTool
    tools: list[FunctionTool]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    metadata: dict[str, str] = {}
