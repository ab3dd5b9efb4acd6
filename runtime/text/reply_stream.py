"""A reply as it is generated, divided into text, reasoning and tool calls by the ids of control tokens."""

from collections.abc import Callable, Mapping

from runtime.text.call_ids import new_call_id
from runtime.text.deltas import Delta, ReasoningDelta, TextDelta
from runtime.text.instruct_formats import ARGUMENTS, BEGIN_THINK, CALL_ID, TOOL_CALLS
from runtime.text.stream import FinishReason, Step
from runtime.text.tool_calls import CallNumbers, CallReader

IN_CALLS = {control.name for control in (CALL_ID, ARGUMENTS)}


class ReplyStream:
    """Takes the steps of a reply, with their texts, of a stream from `Tokenizer.text_stream`.

    `dividers` are those of the tokenizer. `in_thought` says that the prompt ends with [THINK]. Pieces of one kind that
    follow each other are parts of one text. The names of control tokens are in none of them.
    """

    def __init__(
        self, dividers: Mapping[int, str], *, in_thought: bool = False, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self._dividers = dividers
        self._in_thought = in_thought
        self._numbers = CallNumbers(new_id)
        self._calls: CallReader | None = None

    @property
    def in_thought(self) -> bool:
        """Whether the next token belongs to what the model has thought."""
        return self._in_thought and self._calls is None

    @property
    def has_calls(self) -> bool:
        """Whether a tool call has begun; a reply that ends by itself then has the finish reason `tool_calls`."""
        return bool(self._numbers.ids)

    def push(self, step: Step) -> list[Delta]:
        """The parts that one more step completes. Its text ends at its own token, which may begin another part."""
        deltas = self._said(step.text)
        name = self._dividers.get(step.token_id)
        if name is None:
            return deltas
        if name in IN_CALLS:
            return deltas + (self._calls.divide(name) if self._calls else [])
        deltas += self._end_calls(cut=False)
        self._in_thought = name == BEGIN_THINK.name
        self._calls = CallReader(self._numbers) if name == TOOL_CALLS.name else None
        return deltas

    def finish(self, reason: FinishReason | None) -> list[Delta]:
        """The parts that were held back; call it once, at the end.

        A call that is cut short, for any reason but `stop`, is kept as far as it has come if its name is complete.
        """
        return self._end_calls(cut=reason != "stop")

    def _said(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._calls is not None:
            return self._calls.push(text)
        return [ReasoningDelta(text) if self._in_thought else TextDelta(text)]

    def _end_calls(self, *, cut: bool) -> list[Delta]:
        return [] if self._calls is None else self._calls.end(cut=cut)
