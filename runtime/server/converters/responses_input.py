"""From a request of OpenAI's Responses API to one for chat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.server.api import chat
from runtime.server.api import responses as api
from runtime.server.http.bodies import converted
from runtime.server.http.failures import RequestFailure, refused

# where a field of chat has another name here
FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}

SPEAKERS: Mapping[str, Callable[[chat.Content], chat.Message]] = {
    "user": chat.UserMessage,
    "system": chat.SystemMessage,
    "developer": chat.DeveloperMessage,
}


def chat_request(asked: api.ResponsesRequest) -> chat.ChatRequest:
    """The same request for chat; raises `RequestFailure` for an item that does not fit, and what would be stored."""
    if asked.store:
        raise refused("store is true, but nothing is stored here; set it to false", param="store")
    if asked.metadata:
        raise refused("metadata is set, but nothing is stored here; leave it out", param="metadata")
    logprobs = "message.output_text.logprobs" in (asked.include or ())
    if asked.top_logprobs is not None and not logprobs:
        raise refused("top_logprobs needs message.output_text.logprobs in include", param="top_logprobs")
    return chat.ChatRequest(
        model=asked.model,
        messages=_messages(asked),
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=logprobs or None,
        top_logprobs=asked.top_logprobs,
        response_format=None if asked.text is None else _format(asked.text.format),
        tools=None if asked.tools is None else [_tool(tool) for tool in asked.tools],
        tool_choice=_choice(asked.tool_choice),
        parallel_tool_calls=asked.parallel_tool_calls,
        service_tier=asked.service_tier,
        user=asked.user,
    )


def as_asked_here(failure: RequestFailure) -> RequestFailure:
    """The failure of the request for chat, with the name that its field has here."""
    error = failure.body.error
    return failure.about(FIELDS.get(error.param, error.param) if error.param else None)


@dataclass
class _Conversation:
    """Messages, of which the last is still being put together if the assistant says it: it takes several items."""

    messages: list[chat.Message] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[chat.ToolCall] = field(default_factory=list)

    def add(self, message: chat.Message) -> None:
        """Add what somebody else says."""
        self.end_assistant()
        self.messages.append(message)

    def end_assistant(self) -> None:
        """Add what the assistant has said, if it has."""
        if self.texts or self.reasoning or self.calls:
            parts: list[chat.TextPart | chat.ThinkingPart] = [chat.TextPart(text) for text in self.texts]
            self.messages.append(
                chat.AssistantMessage(
                    content=parts if len(parts) > 1 else "".join(self.texts) or None,
                    reasoning_content="".join(self.reasoning) or None,
                    tool_calls=self.calls or None,
                )
            )
        self.texts, self.reasoning, self.calls = [], [], []


def _messages(asked: api.ResponsesRequest) -> list[chat.Message]:
    found = _Conversation()
    if asked.instructions:
        found.add(chat.SystemMessage(asked.instructions))
    if isinstance(asked.input, str):
        found.add(chat.UserMessage(asked.input))
    else:
        for number, item in enumerate(_items(asked.input)):
            _add(found, item, number)
    found.end_assistant()
    if not found.messages:
        raise refused("input is empty, expected a text or items", param="input")
    return found.messages


def _items(given: Sequence[Mapping[str, Any]]) -> Sequence[api.Item]:
    """The items; those without a type are messages, which no tagged union can say."""
    return converted({"input": [{"type": "message", **fields} for fields in given]}, api.Items).input


def _add(found: _Conversation, item: api.Item, number: int) -> None:
    if isinstance(item, api.ReasoningItem):
        found.reasoning += [part.text for part in item.content or ()]
    elif isinstance(item, api.CallItem):
        found.calls.append(chat.ToolCall(item.call_id, chat.CalledFunction(item.name, item.arguments)))
    elif isinstance(item, api.CallOutputItem):
        found.add(chat.ToolMessage(_content(item.output), item.call_id, item.name))
    elif item.role == "assistant":
        if found.calls:  # what is said after calls is another message
            found.end_assistant()
        found.texts += [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
    else:
        if not isinstance(item.content, str) and any(isinstance(part, api.OutputText) for part in item.content):
            raise refused(
                f"input[{number}] has output_text, which the role {item.role} does not say; use input_text",
                param=f"input[{number}].content",
            )
        found.add(SPEAKERS[item.role](_content(item.content)))


def _content(content: str | Sequence[api.InputText | api.OutputText]) -> chat.Content:
    return content if isinstance(content, str) else [chat.TextPart(part.text) for part in content]


def _format(
    given: api.PlainFormat | api.JsonObjectFormat | api.JsonSchemaFormat | None,
) -> chat.ResponseFormat | None:
    if isinstance(given, api.JsonObjectFormat):
        return chat.JsonObjectFormat()
    if isinstance(given, api.JsonSchemaFormat):
        return chat.JsonSchemaFormat(chat.JsonSchema(given.name, given.schema, given.description, given.strict))
    return None


def _tool(tool: api.FunctionTool) -> chat.ToolSpec:
    function = chat.FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict)
    return chat.ToolSpec(function, "function")


def _choice(given: api.ToolChoice) -> chat.ToolChoice:
    return chat.NamedTool(chat.NamedFunction(given.name), "function") if isinstance(given, api.NamedTool) else given
