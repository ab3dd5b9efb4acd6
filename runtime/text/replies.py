"""What a model has replied: text, reasoning and tool calls, told apart by the ids of control tokens."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.text.call_ids import new_call_id
from runtime.text.deltas import ArgumentsDelta, CallDelta, Delta, ReasoningDelta, TextDelta
from runtime.text.instruct_formats import BEGIN_THINK, END_THINK
from runtime.text.messages import ContentPart, FunctionCall, TextPart, ThinkingPart, ToolCall
from runtime.text.reply_stream import ReplyStream
from runtime.text.stream import Step
from runtime.text.tokenizer import Tokenizer

Stretch = tuple[str, str]  # a control token's name and the text behind it


@dataclass(frozen=True)
class Reply:
    """A reply as chat servers show it. `reasoning` is None if there is none; what becomes no call is text."""

    text: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def ends_in_thought(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends with [THINK], so that the reply begins with reasoning."""
    return bool(prompt) and tokenizer.dividers.get(prompt[-1]) == BEGIN_THINK.name


def stretches_of(steps: Iterable[Step], dividers: Mapping[int, str]) -> list[Stretch]:
    """The text behind each divider; the first stretch has no name.

    A step's text ends at its own token, so that of a divider belongs to the stretch before it.
    """
    stretches = [("", "")]
    for step in steps:
        name, text = stretches[-1]
        stretches[-1] = (name, text + step.text)
        if step.token_id in dividers:
            stretches.append((dividers[step.token_id], ""))
    return stretches


def read_reply(
    steps: Sequence[Step],
    tokenizer: Tokenizer,
    *,
    in_thought: bool = False,
    new_id: Callable[[], str] = new_call_id,
) -> Reply:
    """Tell the parts of a reply apart; `in_thought` says that the prompt ends with [THINK].

    The steps have their texts, of a stream from `Tokenizer.text_stream`.
    """
    stream = ReplyStream(tokenizer.dividers, in_thought=in_thought, new_id=new_id)
    deltas = [delta for step in steps for delta in stream.push(step)]
    return reply_of([*deltas, *stream.finish(steps[-1].finish_reason if steps else None)])


def reply_of(deltas: Sequence[Delta]) -> Reply:
    """The whole reply that a stream of its parts makes up."""
    thoughts = [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)]
    arguments: dict[int, str] = defaultdict(str)
    for delta in deltas:
        if isinstance(delta, ArgumentsDelta):
            arguments[delta.index] += delta.text
    calls = [delta for delta in deltas if isinstance(delta, CallDelta)]
    return Reply(
        text="".join(delta.text for delta in deltas if isinstance(delta, TextDelta)),
        reasoning="".join(thoughts) if thoughts else None,
        tool_calls=tuple(
            ToolCall(
                id=call.call_id, type="function", function=FunctionCall(name=call.name, arguments=arguments[call.index])
            )
            for call in calls
        ),
    )


def content_of(steps: Iterable[Step], tokenizer: Tokenizer, *, reasoning: bool) -> str | list[ContentPart]:
    """A reply as the content of a message: a text, or parts if the model has thought; calls are text.

    Without `reasoning`, what the model has thought is left out.
    """
    stretches = stretches_of(steps, tokenizer.dividers)
    if not reasoning or all(name != BEGIN_THINK.name for name, _ in stretches):
        return "".join(text for name, text in stretches if name != BEGIN_THINK.name)
    parts: list[ContentPart] = []
    for i, (name, text) in enumerate(stretches):
        if name == BEGIN_THINK.name:
            closed = stretches[i + 1][0] == END_THINK.name if i + 1 < len(stretches) else False
            parts.append(ThinkingPart(type="thinking", thinking=text, closed=closed))
        elif text:
            parts.append(TextPart(type="text", text=text))
    return parts


class ReplyText:
    """A reply as a terminal shows it while it is generated: control tokens by name, reasoning as `faint` makes it."""

    def __init__(self, dividers: Mapping[int, str], faint: Callable[[str], str], *, in_thought: bool = False) -> None:
        self._dividers = dividers
        self._faint = faint
        self._in_thought = in_thought

    def push(self, step: Step) -> str:
        """The text of one more step."""
        text = self._faint(step.text) if self._in_thought and step.text else step.text
        name = self._dividers.get(step.token_id) if step.finish_reason != "stop" else None
        if name is None:
            return text
        self._in_thought = name == BEGIN_THINK.name
        return text + self._faint(name)
