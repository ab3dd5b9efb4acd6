"""From a chat's reply to the answer and the events of Anthropic's Messages API."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from runtime.server.api import messages as api
from runtime.server.api.chat import ChunkChoice
from runtime.server.api.common import Usage
from runtime.server.converters.reply_parts import Part, PartBegun, PartEvent, PartGrown, ReplyParts
from runtime.server.http.failures import RequestFailure
from runtime.server.http.request_ids import current_request_id

STOP_REASONS: Mapping[str, api.StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
NO_INPUT = msgspec.Raw(b"{}")


def error_of(failure: RequestFailure) -> api.Error:
    """A failure as this API writes it."""
    kind = ERROR_TYPES.get(failure.status, "invalid_request_error")
    return api.Error(api.ErrorDetail(kind, failure.body.error.message), current_request_id.get())


@dataclass
class MessageWriter:
    """Writes one answer from the pieces of a chat."""

    message_id: str
    model: str
    prompt_tokens: int
    reply: ReplyParts = field(default_factory=ReplyParts)

    def message(self, usage: Usage) -> api.Reply:
        """The whole answer."""
        end = self._end()
        return api.Reply(
            id=self.message_id,
            model=self.model,
            content=[_block(part) for part in self.reply.parts],
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=_usage(usage),
        )

    def begin(self) -> list[api.Event]:
        """The events before the first piece. How many tokens were found in a cache is known at the end only."""
        started = api.Reply(
            id=self.message_id,
            model=self.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=api.MessageUsage(self.prompt_tokens, 0, 0),
        )
        return [api.MessageStart(started), api.Ping()]

    def push(self, piece: ChunkChoice) -> list[api.Event]:
        """The events of a piece."""
        return [event for change in self.reply.push(piece) for event in _events(change)]

    def end(self, usage: Usage) -> list[api.Event]:
        """The events after the last piece."""
        return [api.MessageDelta(self._end(), _usage(usage)), api.MessageStop()]

    def _end(self) -> api.MessageEnd:
        if self.reply.stop_reason is not None:
            return api.MessageEnd("stop_sequence", self.reply.stop_reason)
        return api.MessageEnd(STOP_REASONS[self.reply.finish_reason or "stop"], None)


def _events(change: PartEvent) -> Iterator[api.Event]:
    part = change.part
    if isinstance(change, PartBegun):
        yield api.BlockStart(part.number, _block(part, begun=True))
    elif isinstance(change, PartGrown):
        if change.text:
            yield api.BlockDelta(part.number, _delta(part, change.text))
    else:
        yield api.BlockStop(part.number)


def _delta(part: Part, text: str) -> api.TextDelta | api.ThinkingDelta | api.InputDelta:
    if part.kind == "call":
        return api.InputDelta(text)
    return api.ThinkingDelta(text) if part.kind == "reasoning" else api.TextDelta(text)


def _block(part: Part, *, begun: bool = False) -> api.ReplyBlock:
    """A part as a block; one that has just `begun` is empty."""
    text = "" if begun else part.text
    if part.kind == "call":
        return api.ReplyToolUse(part.call_id, part.name, _input(text))
    return api.ReplyThinking(text) if part.kind == "reasoning" else api.ReplyText(text)


def _input(arguments: str) -> msgspec.Raw:
    """Arguments as they were written; none of a call that was cut short, since half an object is no JSON."""
    try:
        msgspec.json.decode(arguments, type=dict)
    except (msgspec.DecodeError, RecursionError):
        return NO_INPUT
    return msgspec.Raw(arguments.encode())


def _usage(usage: Usage) -> api.MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return api.MessageUsage(usage.prompt_tokens - cached, cached, usage.completion_tokens)
