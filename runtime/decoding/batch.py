"""Generation for several sequences at once: each row of a batch has its own positions, sampler and end.

No row sees another: a row's tokens are the same to the bit whatever the other rows hold. A row that has ended, or that
no prompt has filled, is fed at a negative position until the last row ends: the kernels neither write nor see such a
token, so even full caches stay as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.generation import TokenModel, check_prompts, generate, next_step
from runtime.decoding.sampler import Sampler
from runtime.text.stream import Step, TextStream, with_text

FILLER_ID = 0  # any valid id: nothing ever sees it
HIDDEN = -1  # a position that is neither written nor seen


class BatchModel(Protocol):
    """The interface that batched generation needs of a model that keeps the caches of several sequences."""

    @property
    def batch(self) -> int:
        """Rows that every call computes."""

    def room(self) -> int | None:
        """How many more ids fit the caches; None without a limit."""

    def reset(self) -> None:
        """Forget every id."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Feed one list of ids per row into empty caches; returns logits (B, vocab) after each row's last id."""

    def step(self, tokens: int, ids: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed ids (B, T) at positions first .. first + T - 1 of each row; returns logits (B, vocab)."""


@dataclass
class _Row:
    """One sequence being generated; `left` more ids may follow, none once it has ended."""

    index: int  # of its prompt
    sampler: Sampler
    text: TextStream | None
    history: list[int]
    left: int

    def take(self, logits: NDArray[np.float32], eos_ids: Sequence[int], logprobs: int | None) -> Step:
        """The next step, with its text, from logits (vocab,)."""
        step = next_step(logits, self.sampler, left=self.left, eos_ids=eos_ids, logprobs=logprobs)
        self.history.append(step.token_id)
        if self.text is not None:
            step = next(with_text(iter((step,)), self.text))
        self.left = self.left - 1 if step.finish_reason is None else 0
        return step


def generate_batch(
    model: BatchModel,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    texts: Sequence[TextStream] = (),
) -> Iterator[tuple[int, Step]]:
    """Steps of all prompts, each with its prompt's index; as many prompts run side by side as the model has rows.

    The next group starts when all of a group have ended. Each prompt ends by itself: at an end of sequence, a stop
    string, `max_tokens`, or when its own caches are full. `texts`, one per prompt, add text to the steps. The model is
    empty afterwards. Raises `UserError` before the first step if any prompt is empty or does not fit.
    """
    assert len(samplers) == len(prompts)
    assert len(texts) in (0, len(prompts))
    model.reset()
    slots = model.room()
    check_prompts(prompts, max_tokens, slots)
    rows = [
        _Row(
            i,
            sampler,
            texts[i] if texts else None,
            list(prompt),
            max_tokens if slots is None else min(max_tokens, slots - len(prompt) + 1),
        )
        for i, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True))
    ]
    for row in rows:
        row.sampler.begin(row.history)
    for start in range(0, len(rows), model.batch):
        try:
            yield from _generate_side_by_side(model, rows[start : start + model.batch], eos_ids, logprobs)
        finally:
            model.reset()


def _generate_side_by_side(
    model: BatchModel, rows: Sequence[_Row], eos_ids: Sequence[int], logprobs: int | None
) -> Iterator[tuple[int, Step]]:
    """Steps of one group, with at most as many rows as the model has, starting from empty caches."""
    unused = model.batch - len(rows)
    logits = model.prefill([*(row.history for row in rows), *([[FILLER_ID]] * unused)])
    ids = np.full((model.batch, 1), FILLER_ID, np.int64)
    first = np.full(model.batch, HIDDEN, np.int64)
    while True:
        for i, row in enumerate(rows):
            if row.left:
                step = row.take(logits[i], eos_ids, logprobs)
                ids[i] = step.token_id
                first[i] = len(row.history) - 1 if row.left else HIDDEN
                yield row.index, step
        if not any(row.left for row in rows):
            return
        logits = model.step(1, ids, first)


class AnyModel(TokenModel, BatchModel, Protocol):
    """A model of any batch size."""


def generate_all(
    model: AnyModel,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    texts: Sequence[TextStream] = (),
) -> Iterator[tuple[int, Step]]:
    """`generate_batch` for a model of any batch size: with batch 1, the prompts run one after the other."""
    if model.batch > 1:
        yield from generate_batch(
            model, prompts, samplers, max_tokens=max_tokens, eos_ids=eos_ids, logprobs=logprobs, texts=texts
        )
        return
    model.reset()
    check_prompts(prompts, max_tokens, model.room())
    for i, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True)):
        model.reset()
        steps = generate(model, prompt, sampler, max_tokens=max_tokens, eos_ids=eos_ids, logprobs=logprobs)
        yield from ((i, step) for step in (with_text(steps, texts[i]) if texts else steps))
