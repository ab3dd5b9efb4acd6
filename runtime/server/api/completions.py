"""`/v1/completions`."""

from typing import Annotated, Literal

import msgspec

from runtime.server.api.common import FinishReason, SamplingFields, TextsOrIds, Usage


class CompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts, or token ids, to be continued: a text, a list of texts, a list of ids, or a list of such lists.

    With `echo`, `logprobs` are those of the prompt too, and `max_tokens` may be 0. `best_of` is taken if it asks for
    nothing more than `n`.
    """

    prompt: TextsOrIds
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1)] | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a text's tokens; the first of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text, or more of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionResponse(msgspec.Struct, frozen=True, kw_only=True):
    """All texts, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
