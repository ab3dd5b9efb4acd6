"""From logits to token ids, for many sequences at once: greedy or random, each with options of its own, in numpy alone.

A row of logits is drawn by itself: what else is in the call never changes its id.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.constraint import Constraint
from runtime.decoding.filters import Scores, changed_scores
from runtime.decoding.options import SamplingOptions
from runtime.decoding.screened_draw import ScreenedDraw
from runtime.decoding.token_counts import TokenCounts
from runtime.errors import UserError

NOT_FINITE = (
    "the model's logits hold nan or infinity; "
    "check the artifact with `python -m runtime.verify`, or compile with dtype fp32"
)
NO_ID = -1  # in place of the id of a row whose logits hold NaN or infinity
TINY = float(np.finfo(np.float32).tiny)  # a device may flush smaller temperatures to zero, so they count as greedy


class Sampler:
    """Draws the ids of one sequence: its options, the counts of its tokens, and its random numbers.

    Token number i is drawn with number i of the seed's stream, so that it is the same whether tokens are drawn one by
    one or several at once, some of which are discarded (`draw`). A `constraint` rules out what its text must not hold.
    """

    def __init__(
        self, options: SamplingOptions, prompt: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self.options = options
        self.constraint = constraint
        self.generated = 0  # tokens so far, which is also the number of the next one's draw
        self._bits = np.random.PCG64(options.seed)
        self._random = np.random.Generator(self._bits)
        self._next_draw = 0  # that `_random` would give
        self.begin(prompt)

    def begin(self, prompt: Sequence[int]) -> None:
        """Begin a text after this prompt, whose tokens count for the repetition penalty; draws go on."""
        self._counts = TokenCounts(prompt if self.options.repetition_penalty is not None else ())

    def append(self, token_id: int) -> None:
        """Add the next token of the text."""
        self.generated += 1
        if self.options.counts_tokens:
            self._counts.add(token_id)
        if self.constraint is not None:
            self.constraint.append(token_id)

    def draw(self, number: int) -> float:
        """Number `number` of the seed's stream, at least 0 and below 1; it may be asked for again."""
        self._bits.advance(number - self._next_draw)
        self._next_draw = number + 1
        return float(self._random.random())

    def scores(self, logits: NDArray[np.float32], drafts: Sequence[int] = ()) -> Scores:
        """Logits (vocab,) after `logit_bias` and penalties, for the token after the text and `drafts`.

        Those of ids that the constraint does not allow are minus infinity. Raises `UserError` for a bias outside the
        vocabulary, and if the constraint cannot go on.
        """
        scores = self._unconstrained(logits, drafts)
        allowed = None if self.constraint is None else self.constraint.allowed(drafts)
        if allowed is None:
            return scores
        with np.errstate(invalid="ignore"):  # by adding, NaN and infinity stay to be found, as NaN
            return scores + np.where(allowed, scores.dtype.type(0), scores.dtype.type(-np.inf))

    def _unconstrained(self, logits: NDArray[np.float32], drafts: Sequence[int]) -> Scores:
        if not self.options.counts_tokens:
            return changed_scores(logits, self.options, self._counts) if self.options.logit_bias else logits
        with self._counts.assuming(drafts):
            return changed_scores(logits, self.options, self._counts)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draw the next id from logits (vocab,); `append` makes it part of the text.

        Raises `UserError` for NaN or infinity, and like `scores`.
        """
        (token_id,) = sample_rows(logits[None], [SampledRow(self)])
        if token_id == NO_ID:
            raise UserError(NOT_FINITE)
        return int(token_id)

    def device_options(self, ahead: int = 0) -> tuple[float, int, float]:
        """Temperature, top-k and draw of a step for `runtime.engines.loaded_artifact.DeviceSampler`.

        The step draws the token after `ahead` tokens that the text does not have yet. With them it draws the id that
        `sample` would, up to the rounding of float32. Only for options with no filter other than top-k
        (`SamplingOptions.top_k_alone`).
        """
        if self.options.temperature < TINY:
            return 1.0, 1, 0.0
        return self.options.temperature, self.options.top_k or 0, self.draw(self.generated + ahead)


class SampledRow(NamedTuple):
    """Whose next token a row of logits is for: that of the sampler's text, if `drafts` followed it."""

    sampler: Sampler
    drafts: Sequence[int] = ()


def sample_rows(logits: NDArray[np.float32], rows: Sequence[SampledRow]) -> NDArray[np.int64]:
    """Draw an id from each row of logits (n, vocab); returns ids (n,).

    A row is drawn with the number after those of its sampler's text and of its drafts. So rows for the drafts d1, d2,
    ... of a text are the rows with `drafts` (), (d1,), (d1, d2), ...; each gives the id that drawing one by one would,
    for as long as the ids before it equal the drafts. No sampler changes: `Sampler.append` adds what is accepted.

    A row whose logits hold NaN or infinity gets `NO_ID`, and the other rows their ids; logits of minus infinity are
    never drawn. Raises `UserError` for a bias outside the vocabulary, which `SamplingOptions.check_vocabulary` finds
    beforehand, and if a sampler's constraint cannot go on.
    """
    screened = ScreenedDraw(logits.shape[1])
    ids = np.full(len(rows), NO_ID, np.int64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        for place, (row, (sampler, drafts)) in enumerate(zip(logits, rows, strict=True)):
            scores = sampler.scores(row, drafts)
            best = int(scores.argmax())  # of NaN, if there is any
            highest = float(scores[best])
            if not math.isfinite(highest):
                continue
            if sampler.options.temperature == 0:
                ids[place] = best
            else:
                uniform = sampler.draw(sampler.generated + len(drafts))
                ids[place] = screened.draw(scores, highest, sampler.options, uniform)
    return ids


@runtime_checkable
class DrawingModel(Protocol):
    """A model that can draw ids by itself, so that it need not wait for its caller to read them."""

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether it can draw with these options."""

    def draw(self, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """Yield `steps` ids that follow `token_id`, and append each to the sampler's text before it is yielded.

        They are those of alternating decode steps and `Sampler.sample`, up to the rounding of float32.
        """
