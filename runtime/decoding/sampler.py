"""From logits to a token id: greedy or random, with the usual filters, in numpy alone.

The filters and their order are those of Hugging Face transformers: repetition penalty, temperature, top-k, top-p,
min-p.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

NOT_FINITE = (
    "the model's logits hold nan or infinity; "
    "check the artifact with `python -m runtime.verify`, or compile with dtype fp32"
)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; None omits a filter, temperature 0 takes the highest logit.

    Raises `UserError` for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    @property
    def top_k_alone(self) -> bool:
        """Whether no filter other than top-k is set, so that a device can draw ids by itself."""
        return self.top_p is None and self.min_p is None and self.repetition_penalty is None

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            0 <= self.temperature < math.inf,
            "a finite number of at least 0 (0 is greedy)",
        )
        if self.top_k is not None:
            _require("top_k", self.top_k, self.top_k >= 1, "at least 1")
        if self.top_p is not None:
            _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        if self.min_p is not None:
            _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        if self.repetition_penalty is not None:
            _require(
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            )
        if self.seed is not None:
            _require("seed", self.seed, self.seed >= 0, "at least 0")


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"the sampling option {name} is {value}, expected {expected}")


GREEDY = SamplingOptions()
TINY = float(np.finfo(np.float32).tiny)  # a device may flush smaller temperatures to zero, so they count as greedy


class Sampler:
    """Draws token ids; the same seed and the same calls give the same ids."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._returned: list[float] = []

    def sample(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """Draw one id from logits (vocab,); `history` is every id so far, including the prompt's.

        Raises `UserError` for NaN or infinity.
        """
        if not np.isfinite(logits.max()):
            raise UserError(NOT_FINITE)
        scores = penalized(logits, history, self.options.repetition_penalty)
        if self.options.temperature == 0:
            return int(scores.argmax())
        ids, weights = candidates(scores, self.options)
        mass = np.cumsum(weights)
        drawn = np.searchsorted(mass, self._uniform() * mass[-1], side="right")
        return int(ids[min(drawn, ids.size - 1)])  # the product may round up to the whole mass

    def device_options(self) -> tuple[float, int, float]:
        """Temperature, top-k and draw of a step for `runtime.engines.loaded_artifact.DeviceSampler`.

        With them it draws the id that `sample` would, up to the rounding of float32. Only for options with no filter
        other than top-k (`SamplingOptions.top_k_alone`).
        """
        if self.options.temperature < TINY:
            return 1.0, 1, 0.0
        return self.options.temperature, self.options.top_k or 0, self._uniform()

    def take_back(self, options: Sequence[tuple[float, int, float]]) -> None:
        """Take back options from `device_options` with which nothing was drawn.

        Their draws are handed out again, so that the next ids are the same as without drawing ahead.
        """
        self._returned[:0] = [draw for _, top_k, draw in options if (top_k, draw) != (1, 0.0)]

    def _uniform(self) -> float:
        return self._returned.pop(0) if self._returned else self._random.random()


@runtime_checkable
class DrawingModel(Protocol):
    """A model that can draw ids by itself, so that it need not wait for its caller to read them."""

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether it can draw with these options."""

    def draw(self, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """Yield `steps` ids that follow `token_id`.

        They are those of alternating decode steps and `Sampler.sample`, up to the rounding of float32.
        """


def penalized(logits: NDArray[np.float32], history: Sequence[int], penalty: float | None) -> NDArray[np.float64]:
    """Logits (vocab,) in float64, with ids of `history` made less likely (Keskar et al., 2019: CTRL, section 4.1)."""
    scores = logits.astype(np.float64)
    if penalty is not None:
        ids = np.unique(np.asarray(history, dtype=np.int64))
        seen = ids[ids < scores.size]
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def candidates(scores: NDArray[np.float64], options: SamplingOptions) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that top-k, top-p and min-p keep from scores (vocab,), and their weights.

    A weight is the id's probability divided by that of the likeliest id.
    """
    ids = np.arange(scores.size)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        scores = (scores - scores.max()) / options.temperature
    if options.top_k is not None and options.top_k < scores.size:
        lowest = scores.size - options.top_k
        ids = np.flatnonzero(scores >= np.partition(scores, lowest)[lowest])
    weights = np.exp(scores[ids])
    if options.top_p is not None:
        kept = _nucleus(weights, options.top_p)
        ids, weights = ids[kept], weights[kept]
    if options.min_p is not None:
        kept = weights >= options.min_p
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """A mask of the ids that make up the likeliest `top_p` of the mass (Holtzman et al., 2020).

    The likeliest id is always among them. Ids lighter than an equal share of the excluded mass are dropped without
    sorting: together they cannot exceed it.
    """
    excluded = (1 - top_p) * weights.sum()
    kept: NDArray[np.bool_] = weights >= excluded / weights.size
    contenders = np.flatnonzero(kept)
    ascending = contenders[np.argsort(weights[contenders], kind="stable")]
    mass = weights[~kept].sum() + np.cumsum(weights[ascending])
    kept[ascending[:-1]] = mass[:-1] > excluded
    return kept


def top_logprobs(logits: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    """The `k` likeliest ids of logits (vocab,), best first, with their log probabilities before any filter."""
    scores = logits.astype(np.float64)
    highest = scores.max()
    log_sum = highest + math.log(np.exp(scores - highest).sum())
    lowest = max(scores.size - k, 0)
    best = np.argpartition(scores, lowest)[lowest:]
    best = best[np.lexsort((best, -scores[best]))]
    return [(int(token_id), float(scores[token_id] - log_sum)) for token_id in best]
