"""Draws of a step's rows, each with the number of its token: so one can be made before it is known to count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.sampler import NOT_FINITE, SamplingOptions, candidates, penalized
from runtime.errors import UserError


@dataclass
class DrawnRow:
    """The tokens that a row's draw depends on: `history` and, assumed to follow, `drafts`."""

    options: SamplingOptions
    prompt_tokens: int
    history: Sequence[int]
    drafts: Sequence[int] = ()

    @property
    def number(self) -> int:
        """Tokens drawn before."""
        return len(self.history) + len(self.drafts) - self.prompt_tokens


def draw_rows(logits: NDArray[np.float32], rows: Sequence[DrawnRow]) -> list[int | UserError]:
    """An id for each row of logits (n, vocab), or why there is none."""
    return [_draw(scores, row) for scores, row in zip(logits, rows, strict=True)]


def _draw(logits: NDArray[np.float32], row: DrawnRow) -> int | UserError:
    if not np.isfinite(logits.max()):
        return UserError(NOT_FINITE)
    scores = penalized(logits, [*row.history, *row.drafts], row.options.repetition_penalty)
    if row.options.temperature == 0:
        return int(scores.argmax())
    ids, weights = candidates(scores, row.options)
    mass = np.cumsum(weights)
    uniform = np.random.default_rng([row.options.seed or 0, row.number]).random()
    return int(ids[min(np.searchsorted(mass, uniform * mass[-1], side="right"), ids.size - 1)])
