"""Drawing an id from a whole vocabulary: float32 finds the few ids that matter, float64 decides.

Weights in float64 for a whole vocabulary, and sorting them, would take longer than everything else that a step does
for a row. So weights are computed in float32, with an error that is bounded, and only those of the ids in question are
computed again in float64. If a decision falls within the bound, the row is drawn in float64 from the start
(`runtime.decoding.filters`). Hence the id that is drawn is always the one that float64 gives, and no result depends on
how float32 was rounded.

The bounds, with u = 2**-24, the rounding of float32, and a score s <= 0 as its distance from the highest score divided
by the temperature, so that its weight is w = exp(s):

- The distance, the factor 1 / temperature and their product are each rounded once, so that s is wrong by at most
  3 u |s|. numpy computes exp within 4 units in the last place (its own tests demand it), which is 8 u. So w is wrong by
  at most w (3 |s| + 8) u. A weight below the least normal number may be lost, which is less than any other rounding.
- Over a set of n ids that weighs W, the sum of w |s| is at most W (ln n - ln W), since the entropy of n
  probabilities w / W is at most ln n.
- A float32 sum of k numbers, in whatever order, is wrong by at most k u of itself (Higham, 2002, section 4.2).
"""

import math

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.filters import (
    FOLD,
    Ids,
    Scores,
    Weights,
    candidates,
    folded,
    heaviest,
    likely_enough,
    pick,
    weights_of,
)
from runtime.decoding.options import SamplingOptions

ROUNDING = 2.0**-24
WEIGHT_ERROR = 2.0**-15  # of one normal weight, above exp(-88): (3 * 88 + 8) u are below 512 u
LEAST_MIN_P = 1e-30  # well above the least normal number
FLOAT64_ROUNDINGS = 4 * 2.0**-52  # for each id: those of all sums and products that the two ways of deciding consist of
SECOND_ORDER = 1.01  # products of the errors above, and the roundings of float64, which are far smaller
TEMPERATURES = (1e-30, 1e30)  # whose inverses are normal numbers in float32
SMALLER_FOLD = 4
BLOCK = 64  # neighbouring ids that share a sum


class ScreenedDraw:
    """Draws ids from scores of one vocabulary; it keeps memory for one row, so that it serves one thread."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._padded = np.zeros(-(-vocab_size // FOLD) * FOLD, np.float32)  # weights in float32, then zeros
        self._starts = np.arange(0, vocab_size, BLOCK)

    def draw(self, scores: Scores, highest: float, options: SamplingOptions, uniform: float) -> int:
        """The id that `uniform`, at least 0 and below 1, draws from scores (vocab,), the highest of which is `highest`.

        It is finite, and the temperature is not 0. The ids that may be drawn and their weights are those of
        `runtime.decoding.filters.candidates`.
        """
        least, most = TEMPERATURES
        within_range = least <= options.temperature <= most and not 0 < (options.min_p or 0) < LEAST_MIN_P
        with np.errstate(over="ignore"):  # of distances whose weights are 0
            if options.top_k is None and within_range:
                found = self._screened(scores, highest, options, uniform)
                if found is not None:
                    return found
            return pick(*candidates(scores, options), uniform)

    def _screened(self, scores: Scores, highest: float, options: SamplingOptions, uniform: float) -> int | None:
        """The id, or None where float32 cannot decide it."""
        temperature = options.temperature
        weights = self._padded[: self._vocab_size]
        np.subtract(scores, scores.dtype.type(highest), out=weights, casting="same_kind")
        if temperature != 1:
            weights *= np.float32(1 / temperature)
        np.exp(weights, out=weights)
        if options.top_p is not None and options.top_p < 1:
            kept = self._nucleus(scores, highest, temperature, options.top_p)
            return None if kept is None else pick(*likely_enough(*kept, options.min_p), uniform)
        if options.min_p:
            ids = np.flatnonzero(weights >= np.float32(options.min_p * (1 - 2 * WEIGHT_ERROR)))
            return pick(*likely_enough(ids, weights_of(scores[ids], highest, temperature), options.min_p), uniform)
        return self._pick_among_all(scores, highest, temperature, uniform)

    def _nucleus(self, scores: Scores, highest: float, temperature: float, top_p: float) -> tuple[Ids, Weights] | None:
        """The ids that make up the likeliest `top_p` of the mass, and their weights; None if float32 cannot decide it.

        The ids in question are those of at least a certain weight. The mass of the others is summed up in float32.
        """
        groups = self._padded.reshape(FOLD, -1)
        maxima, sums = groups.max(axis=0), groups.sum(axis=0)
        least = self._least_contender(maxima, float(sums.sum(dtype=np.float64)), top_p)
        hit = np.flatnonzero(maxima >= least)
        of_hit = groups[:, hit]
        contends = of_hit >= least
        rows, columns = contends.nonzero()
        ids = rows * maxima.size + hit[columns]
        of_hit[rows, columns] = 0
        sums[hit] = of_hit.sum(axis=0)
        rest = float(sums.sum(dtype=np.float64))

        weights = weights_of(scores[ids], highest, temperature)
        ascending = np.sort(weights)
        mass = np.cumsum(ascending[::-1])
        total = float(mass[-1]) + rest
        error = _mass_error(scores.size, rest, FOLD) + FLOAT64_ROUNDINGS * scores.size * total
        wanted = top_p * total
        last = int(np.searchsorted(mass, wanted))
        before = mass[last - 1] if last else -math.inf
        if last == ids.size or not before + error < wanted < mass[last] - error:
            return None
        if ascending[-1 - last] <= least * (1 + 2 * WEIGHT_ERROR):  # an id that was left out may be as heavy
            return None
        kept = heaviest(weights, ascending, last + 1)
        return ids[kept], weights[kept]

    def _least_contender(self, maxima: NDArray[np.float32], total: float, top_p: float) -> np.float32:
        """A weight such that the ids that are as heavy probably are the likeliest `top_p` and hardly any more.

        It is looked for among the `maxima` of groups of ids. If they do not suffice, those of smaller groups may, and
        at last it is an equal share of the mass that is left out.
        """
        slack = np.float32(1 - 4 * WEIGHT_ERROR)
        wanted = top_p * total / float(slack)
        least = _lightest_needed(maxima, wanted)
        if least is None:
            least = _lightest_needed(self._padded.reshape(SMALLER_FOLD, -1).max(axis=0), wanted)
        if least is None:
            least = np.float32((1 - top_p) * total / self._vocab_size)
        return least * slack

    def _pick_among_all(self, scores: Scores, highest: float, temperature: float, uniform: float) -> int | None:
        """The id at which the cumulated weights exceed the share `uniform`; None if float32 cannot decide it.

        Sums of blocks of ids find the block, whose weights are then cumulated in float64.
        """
        ends = np.cumsum(np.add.reduceat(self._padded, self._starts), dtype=np.float64)
        target = uniform * ends[-1]
        block = int(np.searchsorted(ends, target, side="right"))
        if block == ends.size:
            return None
        start = ends[block - 1] if block else 0.0
        first = block * BLOCK
        mass = start + np.cumsum(weights_of(scores[first : first + BLOCK], highest, temperature))
        place = int(np.searchsorted(mass, target, side="right"))
        error = 2 * _mass_error(scores.size, ends[-1], BLOCK)  # of a sum, and of the target
        before = mass[place - 1] if place else start
        if place == mass.size or not before + error < target < mass[place] - error:
            return None
        return first + place


def _mass_error(ids: int, mass: float, terms: int) -> float:
    """By how much the mass of at most so many ids may be wrong, if it was summed up in float32 by so many terms."""
    if mass == 0:
        return 0.0
    return SECOND_ORDER * ROUNDING * mass * (3 * (math.log(ids) - math.log(mass)) + 8 + terms)


def _lightest_needed(weights: NDArray[np.float32], wanted: float) -> np.float32 | None:
    """The last of the heaviest weights whose sum is about `wanted`; None if all of them are less."""
    descending = np.sort(weights)[::-1]
    last = int(np.searchsorted(np.cumsum(descending), wanted))
    return None if last == descending.size else descending[last]
