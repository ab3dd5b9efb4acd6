"""Generation for one sequence: a stream of steps from any model that can prefill and decode, and the reason it ends."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.logprobs import top_logprobs
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import DrawingModel, Sampler
from runtime.errors import UserError
from runtime.text.stream import FinishReason, Step


class TokenModel(Protocol):
    """The interface that generation needs of a model that keeps the caches of one sequence."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append one list of ids per row; returns logits (1, vocab) after the last id."""

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id per row; returns logits (1, vocab)."""

    def room(self) -> int | None:
        """How many more ids fit the caches; None without a limit."""

    def reset(self) -> None:
        """Forget every id."""


def generate(
    model: TokenModel,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    fed: Sequence[int] = (),
) -> Iterator[Step]:
    """Feed the prompt and yield steps until an end of sequence (which is the last step), `max_tokens` or full caches.

    `fed` are the ids that the caches already hold. An id enters the caches when the caller asks for the step after it:
    a caller that stops early leaves all ids but the last one in the caches. Raises `UserError` if the prompt is empty
    or does not fit.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens, expected at least one; pass some text")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
    sampler.begin([*fed, *prompt_ids])
    logits = model.prefill([prompt_ids])[0]
    room = model.room()
    most = max_tokens if room is None else min(max_tokens, room + 1)
    if logprobs is None and isinstance(model, DrawingModel) and model.can_draw(sampler.options):
        first = sampler.sample(logits)
        sampler.append(first)
        yield from _ended(itertools.chain([first], model.draw(first, sampler, most - 1)), most, eos_ids)
        return
    for left in range(most, 0, -1):
        step = next_step(logits, sampler, left=left, eos_ids=eos_ids, logprobs=logprobs)
        yield step
        if step.finish_reason is not None:
            return
        logits = model.decode([step.token_id])[0]


def _ended(ids: Iterator[int], most: int, eos_ids: Sequence[int]) -> Iterator[Step]:
    """At most `most` ids as steps, up to an end of sequence."""
    for left, token_id in zip(range(most, 0, -1), ids, strict=False):
        step = Step(token_id, finish_reason=finish_reason_of(token_id, left, eos_ids))
        yield step
        if step.finish_reason is not None:
            return


def next_step(
    logits: NDArray[np.float32],
    sampler: Sampler,
    *,
    left: int,
    eos_ids: Sequence[int],
    logprobs: int | None,
) -> Step:
    """Draw an id from logits (vocab,) and append it to the text; `left` ids, including this one, may still follow."""
    token_id = sampler.sample(logits)
    sampler.append(token_id)
    reason = finish_reason_of(token_id, left, eos_ids)
    return Step(token_id, None if logprobs is None else tuple(top_logprobs(logits, logprobs)), reason)


def finish_reason_of(token_id: int, left: int, eos_ids: Sequence[int]) -> FinishReason | None:
    """The reason that a sequence ends with this id; None if it goes on. `left` ids, including this one, may follow."""
    return "stop" if token_id in eos_ids else "length" if left == 1 else None


def row_samplers(options: SamplingOptions, count: int) -> list[Sampler]:
    """A sampler per prompt, seeded with the options' seed plus the prompt's index, so that no two share a stream."""
    return [Sampler(options if options.seed is None else replace(options, seed=options.seed + i)) for i in range(count)]


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, slots: int | None) -> None:
    """Raise `UserError` for whatever would fail later; `slots` is the room in empty caches, None without a limit."""
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number} has no tokens, expected at least one; pass some text")
        if slots is not None and len(prompt) > slots:
            remedy = "shorten it, or compile with a larger shape.cache_len"
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, expected at most {slots}, the slots of a cache: {remedy}"
            )
