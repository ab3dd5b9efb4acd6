"""From the messages of a request to the ids that a model was trained on."""

from collections.abc import Sequence

from runtime.server.api import chat
from runtime.server.http.failures import refused
from runtime.server.running.served_model import ServedModel
from runtime.text.messages import ContentPart, Function, FunctionCall, Message, TextPart, ThinkingPart, Tool, ToolCall


def conversation_ids(model: ServedModel, messages: Sequence[chat.Message], tools: Sequence[Tool]) -> list[int]:
    """Ids up to where the reply begins.

    Raises `RequestFailure` or `UserError` if the model's format does not allow the conversation, or no sequence can
    hold it.
    """
    if model.encoder is None:
        raise refused(f"this model does not chat: {model.no_chat}; use /v1/completions", code="no_chat_format")
    if tools and not model.encoder.writes_tools:
        raise refused("this model's format has no place for tools; leave tools out", param="tools", code="no_tools")
    converted = [_message(message, reasoning=model.encoder.writes_reasoning) for message in messages]
    model.tokenizer.check_length(sum(map(_characters, converted)), model.capacity)
    return model.encoder.encode(converted, tools)


def tools_of(given: Sequence[chat.ToolSpec]) -> list[Tool]:
    """The tools of a request, as formats take them."""
    return [_tool(tool) for tool in given]


def _message(given: chat.Message, *, reasoning: bool) -> Message:
    if isinstance(given, chat.AssistantMessage):
        message = Message(role="assistant", content=_said(given, reasoning=reasoning))
        if given.tool_calls:
            message["tool_calls"] = [_call(call) for call in given.tool_calls]
        return message
    if isinstance(given, chat.ToolMessage):
        message = Message(
            role="tool", content=_content(given.content, reasoning=reasoning), tool_call_id=given.tool_call_id
        )
        if given.name is not None:
            message["name"] = given.name
        return message
    role = "user" if isinstance(given, chat.UserMessage) else "system"
    return Message(role=role, content=_content(given.content, reasoning=reasoning))


def _said(given: chat.AssistantMessage, *, reasoning: bool) -> str | list[ContentPart]:
    """What an assistant has said; reasoning is left out of formats that do not write it."""
    if given.content is None or isinstance(given.content, str):
        parts: list[ContentPart] = [TextPart(type="text", text=given.content)] if given.content else []
    else:
        parts = [_part(part) for part in given.content]
    if given.reasoning_content:
        parts = [ThinkingPart(type="thinking", thinking=given.reasoning_content), *parts]
    if not reasoning:
        parts = [part for part in parts if part["type"] == "text"]
    if all(part["type"] == "text" for part in parts) and len(parts) <= 1:
        return "".join(part["text"] for part in parts if part["type"] == "text")
    return parts


def _part(part: chat.TextPart | chat.ThinkingPart) -> ContentPart:
    if isinstance(part, chat.TextPart):
        return TextPart(type="text", text=part.text)
    return ThinkingPart(type="thinking", thinking=part.thinking, closed=part.closed)


def _content(content: chat.Content, *, reasoning: bool) -> str | list[ContentPart]:
    """What others have said; raises `RequestFailure` for reasoning in a format that does not write it."""
    if isinstance(content, str):
        return content
    if not reasoning and any(isinstance(part, chat.ThinkingPart) for part in content):
        raise refused("this model's format has no place for thinking parts; leave them out", param="messages")
    return [_part(part) for part in content]


def _call(call: chat.ToolCall) -> ToolCall:
    function = FunctionCall(name=call.function.name, arguments=call.function.arguments)
    return ToolCall(id=call.id, type="function", function=function)


def _tool(tool: chat.ToolSpec) -> Tool:
    function = Function(name=tool.function.name)
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    if tool.function.strict is not None:
        function["strict"] = tool.function.strict
    return Tool(type="function", function=function)


def _characters(message: Message) -> int:
    """Characters that a message has at least, in whatever format."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    said = sum(map(len, parts))
    return said + sum(len(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
