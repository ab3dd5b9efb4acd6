"""What a scheduler is asked for, and the events with which it answers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.decoding.constraint import Grammar
from runtime.decoding.logprobs import TokenLogprobs
from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.errors import UserError
from runtime.text.stream import FinishReason, Step

RequestId = Hashable
EndReason = FinishReason | Literal["cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued, `choices` times. Raises `UserError` for values out of range.

    With `prompt_logprobs`, the first choice also gives the log probabilities of the prompt's own tokens, each with so
    many of the likeliest ids in its place; `max_tokens` may then be 0. The options' seed is that of the first choice;
    each further choice has the next number as its seed.
    """

    request_id: RequestId
    prompt_ids: Sequence[int]
    max_tokens: int
    options: SamplingOptions = GREEDY
    eos_ids: Sequence[int] = ()
    logprobs: int | None = None  # how many of the likeliest ids each step lists
    choices: int = 1
    grammar: Grammar | None = None  # to which each choice keeps by itself
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise UserError("the prompt has no tokens, expected at least one; pass some text")
        if min(self.prompt_ids) < 0:
            raise UserError(f"the prompt has the token id {min(self.prompt_ids)}, expected at least 0")
        if self.choices < 1:
            raise UserError(f"choices is {self.choices}, expected at least 1")
        least = 0 if self.prompt_logprobs is not None and self.choices == 1 else 1
        if self.max_tokens < least:
            raise UserError(f"max_tokens is {self.max_tokens}, expected at least {least}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True)
class Event:
    """Something that happened to one choice of a request."""

    request_id: RequestId
    choice: int = field(kw_only=True, default=0)


@dataclass(frozen=True)
class Started(Event):
    """The choice has a slot, in which the first `cached_tokens` tokens of its prompt need no computing.

    `not_reused` says why more tokens that a slot holds could not be used, in a clause; None if all were.
    """

    cached_tokens: int
    not_reused: str | None = None


@dataclass(frozen=True)
class Scored(Event):
    """Log probabilities of the next tokens of the prompt, of which the very first has none."""

    tokens: Sequence[TokenLogprobs]


@dataclass(frozen=True)
class Generated(Event):
    """The next token of the choice; the last one has the reason of the end."""

    step: Step


@dataclass(frozen=True)
class Ended(Event):
    """No more events of this choice follow."""

    reason: EndReason


@dataclass(frozen=True)
class Failed(Event):
    """The choice could not go on, for the reason in `error`, a sentence; no more events of it follow."""

    error: str
