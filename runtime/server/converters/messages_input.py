"""From a request of Anthropic's Messages API to one for chat."""

from collections.abc import Sequence

import msgspec

from runtime.server.api import chat
from runtime.server.api import messages as api


def chat_request(asked: api.MessagesRequest) -> chat.ChatRequest:
    """The same request for chat."""
    choice = asked.tool_choice
    output = None if asked.output_config is None else asked.output_config.format
    return chat.ChatRequest(
        model=asked.model,
        messages=chat_messages(asked),
        max_completion_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=asked.stop_sequences,
        response_format=None if output is None else chat.JsonSchemaFormat(chat.JsonSchema("answer", output.schema)),
        tools=chat_tools(asked) or None,
        tool_choice=_choice(choice),
        parallel_tool_calls=False if getattr(choice, "disable_parallel_tool_use", None) else None,
        user=None if asked.metadata is None else asked.metadata.user_id,
    )


def chat_messages(asked: api.CountRequest) -> list[chat.Message]:
    """The conversation for chat."""
    messages: list[chat.Message] = [chat.SystemMessage(_text(asked.system))] if asked.system else []
    for message in asked.messages:
        if isinstance(message, api.AssistantMessage):
            messages.append(_assistant(message))
        elif isinstance(message, api.SystemMessage):
            messages.append(chat.SystemMessage(_text(message.content)))
        else:
            messages += _user(message)
    return messages


def chat_tools(asked: api.CountRequest) -> list[chat.ToolSpec]:
    """The tools for chat."""
    return [
        chat.ToolSpec(chat.FunctionSpec(tool.name, tool.description, tool.input_schema, tool.strict), "function")
        for tool in asked.tools or ()
    ]


def _text(content: str | Sequence[api.TextBlock | api.TextOnly]) -> chat.Content:
    return content if isinstance(content, str) else [chat.TextPart(block.text) for block in content]


def _user(message: api.UserMessage) -> list[chat.Message]:
    """The results of calls, each a message of its own, and then what the user says."""
    if isinstance(message.content, str):
        return [chat.UserMessage(message.content)]
    results = [block for block in message.content if isinstance(block, api.ToolResultBlock)]
    texts = [block for block in message.content if isinstance(block, api.TextBlock)]
    found: list[chat.Message] = [chat.ToolMessage(_text(each.content or ""), each.tool_use_id) for each in results]
    return found + ([chat.UserMessage(_text(texts))] if texts or not found else [])


def _assistant(message: api.AssistantMessage) -> chat.AssistantMessage:
    if isinstance(message.content, str):
        return chat.AssistantMessage(content=message.content)
    texts = [block.text for block in message.content if isinstance(block, api.TextBlock)]
    parts: list[chat.TextPart | chat.ThinkingPart] = [chat.TextPart(text) for text in texts]
    thoughts = [block.thinking for block in message.content if isinstance(block, api.ThinkingBlock)]
    calls = [
        chat.ToolCall(block.id, chat.CalledFunction(block.name, msgspec.json.encode(block.input).decode()))
        for block in message.content
        if isinstance(block, api.ToolUseBlock)
    ]
    return chat.AssistantMessage(
        content=parts if len(parts) > 1 else "".join(texts) or None,
        reasoning_content="".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _choice(given: api.ToolChoice | None) -> chat.ToolChoice:
    if isinstance(given, api.NamedChoice):
        return chat.NamedTool(chat.NamedFunction(given.name), "function")
    if isinstance(given, api.AnyChoice):
        return "required"
    if isinstance(given, api.NoChoice):
        return "none"
    return None if given is None else "auto"
