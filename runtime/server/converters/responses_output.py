"""From a chat's reply to the answer and the events of OpenAI's Responses API."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from runtime.server.answers.sampling import DEFAULT_TEMPERATURE
from runtime.server.api import response_events as events
from runtime.server.api import responses as api
from runtime.server.api.chat import ChunkChoice
from runtime.server.api.common import Usage
from runtime.server.converters.reply_parts import Part, PartBegun, PartEvent, PartGrown, PartKind, ReplyParts
from runtime.server.http.failures import RequestFailure

ID_KINDS: Mapping[PartKind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}
DELTAS: Mapping[PartKind, events.TextEventKind] = {
    "reasoning": "response.reasoning_text.delta",
    "text": "response.output_text.delta",
}
ENDS: Mapping[PartKind, events.TextEventKind] = {
    "reasoning": "response.reasoning_text.done",
    "text": "response.output_text.done",
}


@dataclass
class ResponseWriter:
    """Writes one answer from the pieces of a chat."""

    asked: api.ResponsesRequest
    response_id: str
    created: int
    model: str
    reply: ReplyParts = field(default_factory=ReplyParts)
    _ids: dict[int, str] = field(default_factory=dict)  # of the items, by the number of their part
    _events: int = 0

    def response(self, usage: Usage | None = None, failure: RequestFailure | None = None) -> api.Response:
        """The answer as far as it has come; it is over with its usage, or with a failure."""
        asked = self.asked
        over = usage is not None or failure is not None
        status: api.Status | Literal["failed"] = "failed" if failure else self._status() if over else "in_progress"
        return api.Response(
            id=self.response_id,
            created_at=self.created,
            status=status,
            error=None if failure is None else _error(failure),
            incomplete_details=api.IncompleteDetails("max_output_tokens") if status == "incomplete" else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            model=self.model,
            output=[self._item(part) for part in self.reply.parts] if over else [],
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=DEFAULT_TEMPERATURE if asked.temperature is None else asked.temperature,
            text=asked.text or api.TextSettings(api.PlainFormat()),
            tool_choice=asked.tool_choice or "auto",
            tools=asked.tools or [],
            top_p=1.0 if asked.top_p is None else asked.top_p,
            usage=None if usage is None else _usage(usage),
        )

    def begin(self) -> list[events.Event]:
        """The events before the first piece."""
        return [self._about_all("response.created"), self._about_all("response.in_progress")]

    def push(self, piece: ChunkChoice) -> list[events.Event]:
        """The events of a piece."""
        return [event for change in self.reply.push(piece) for event in self._part_events(change)]

    def end(self, usage: Usage) -> list[events.Event]:
        """The events after the last piece."""
        kind: events.ResponseEventKind = (
            "response.incomplete" if self._status() == "incomplete" else "response.completed"
        )
        return [events.ResponseEvent(type=kind, sequence_number=self._next(), response=self.response(usage))]

    def fail(self, failure: RequestFailure) -> events.Event:
        """The event of an answer that has failed."""
        self.reply.end()
        return events.ResponseEvent(
            type="response.failed", sequence_number=self._next(), response=self.response(failure=failure)
        )

    def _about_all(self, kind: events.ResponseEventKind) -> events.Event:
        return events.ResponseEvent(type=kind, sequence_number=self._next(), response=self.response())

    def _part_events(self, change: PartEvent) -> Iterator[events.Event]:
        part = change.part
        if isinstance(change, PartBegun):
            self._ids[part.number] = f"{ID_KINDS[part.kind]}_{secrets.token_hex(16)}"
            yield self._about_item("response.output_item.added", part)
            if part.kind != "call":
                yield self._about_content("response.content_part.added", part)
        elif isinstance(change, PartGrown):
            yield self._more(part, change)
        else:
            yield self._all_of(part)
            if part.kind != "call":
                yield self._about_content("response.content_part.done", part)
            yield self._about_item("response.output_item.done", part)

    def _about_item(self, kind: events.ItemEventKind, part: Part) -> events.Event:
        return events.ItemEvent(
            type=kind,
            sequence_number=self._next(),
            output_index=part.number,
            item=self._item(part, begun=kind == "response.output_item.added"),
        )

    def _about_content(self, kind: events.ContentEventKind, part: Part) -> events.Event:
        content = api.ReasoningText(part.text) if part.kind == "reasoning" else self._output_text(part)
        return events.ContentPartEvent(
            type=kind,
            sequence_number=self._next(),
            item_id=self._ids[part.number],
            output_index=part.number,
            part=content,
        )

    def _more(self, part: Part, change: PartGrown) -> events.Event:
        if part.kind == "call":
            return events.ArgumentsEvent(
                type="response.function_call_arguments.delta",
                sequence_number=self._next(),
                item_id=self._ids[part.number],
                output_index=part.number,
                delta=change.text,
            )
        return events.TextEvent(
            type=DELTAS[part.kind],
            sequence_number=self._next(),
            item_id=self._ids[part.number],
            output_index=part.number,
            delta=change.text,
            logprobs=list(change.logprobs) if part.kind == "text" else msgspec.UNSET,
        )

    def _all_of(self, part: Part) -> events.Event:
        if part.kind == "call":
            return events.ArgumentsEvent(
                type="response.function_call_arguments.done",
                sequence_number=self._next(),
                item_id=self._ids[part.number],
                output_index=part.number,
                arguments=part.text,
                name=part.name,
            )
        return events.TextEvent(
            type=ENDS[part.kind],
            sequence_number=self._next(),
            item_id=self._ids[part.number],
            output_index=part.number,
            text=part.text,
            logprobs=part.logprobs if part.kind == "text" else msgspec.UNSET,
        )

    def _item(self, part: Part, *, begun: bool = False) -> api.OutputItem:
        """A part as an item; one that has just `begun` is empty."""
        item_id = self._ids[part.number]
        ended: api.Status = self._status() if part is self.reply.parts[-1] else "completed"
        status: api.Status = "in_progress" if begun else ended
        if part.kind == "call":
            return api.OutputCall(
                id=item_id, status=status, call_id=part.call_id, name=part.name, arguments="" if begun else part.text
            )
        if part.kind == "reasoning":
            return api.OutputReasoning(
                id=item_id, status=status, content=[] if begun else [api.ReasoningText(part.text)]
            )
        return api.OutputMessage(id=item_id, status=status, content=[] if begun else [self._output_text(part)])

    def _status(self) -> api.Status:
        """That of an answer that is over, and of its last item."""
        return "incomplete" if self.reply.finish_reason == "length" else "completed"

    def _output_text(self, part: Part) -> api.OutputText:
        return api.OutputText(part.text, logprobs=part.logprobs)

    def _next(self) -> int:
        self._events += 1
        return self._events - 1


def _usage(usage: Usage) -> api.ResponseUsage:
    return api.ResponseUsage(
        usage.prompt_tokens,
        api.InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        api.OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
    )


def _error(failure: RequestFailure) -> api.ResponseError:
    error = failure.body.error
    return api.ResponseError(error.code or "server_error", error.message)
