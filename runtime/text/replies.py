"""What a model has replied: text, reasoning and tool calls, told apart by the ids of control tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.text.instruct_formats import ARGUMENTS, BEGIN_THINK, CALL_ID, END_THINK, TOOL_CALLS
from runtime.text.messages import ContentPart, TextPart, ThinkingPart, ToolCall
from runtime.text.stream import Step
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import Stretch, new_call_id, parse_tool_calls

IN_CALLS = {control.name for control in (TOOL_CALLS, CALL_ID, ARGUMENTS)}


@dataclass(frozen=True)
class Reply:
    """A reply as chat servers show it. `reasoning` is None if there is none; calls that are malformed stay text."""

    text: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def ends_in_thought(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends with [THINK], so that the reply begins with reasoning."""
    return bool(prompt) and tokenizer.dividers.get(prompt[-1]) == BEGIN_THINK.name


def stretches_of(steps: Iterable[Step], dividers: Mapping[int, str], *, in_thought: bool = False) -> list[Stretch]:
    """The text behind each divider; the first stretch has no name, or that of an open thought.

    A step's text ends at its own token, so that of a divider belongs to the stretch before it.
    """
    stretches = [(BEGIN_THINK.name if in_thought else "", "")]
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
    stretches = stretches_of(steps, tokenizer.dividers, in_thought=in_thought)
    calls = parse_tool_calls([stretch for stretch in stretches if stretch[0] in IN_CALLS], new_id)
    said = [(name, text) for name, text in stretches if calls is None or name not in IN_CALLS]
    thoughts = [text for name, text in said if name == BEGIN_THINK.name]
    return Reply(
        text="".join(text for name, text in said if name != BEGIN_THINK.name),
        reasoning="".join(thoughts) if thoughts else None,
        tool_calls=calls or (),
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
