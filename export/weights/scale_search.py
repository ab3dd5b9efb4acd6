"""The search for the scale, and if requested the zero point, of every group of neighbours that is rounded to 4 bits.

Each group gets the scale and the zero point z that minimise sum_j a_j (w_j - (q_j - z) scale)^2, where q_j is w_j
rounded to the nearest of the 16 numbers and a_j, the importance of column j, says how much an error there costs: the
mean square of the inputs that the column is multiplied with. Without importance every a_j is 1.

For given q and z the best scale is a quotient of sums, s = sum a w (q - z) / sum a (q - z)^2, and what it leaves of
the error is sum a w^2 - (sum a w (q - z))^2 / sum a (q - z)^2. So candidates of scales only propose integers, and the
group takes the proposal that maximises the second term: a least-squares fit, as in llama.cpp's search for its 4-bit
types (https://github.com/ikawrakow/ik_llama.cpp/pull/295).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.weights.format import Float32

LARGEST = 15
MIDDLE = 8  # the zero point of groups without one of their own
# Candidates of the range that a scale covers, relative to what the numbers need: 4 % more to 36 % less. Measured on
# normal numbers of uneven importance: the error is within 5 % of that of the best of 4000 scales.
RANGES = tuple(1.04 - 0.04 * i for i in range(11))
SMALLEST = float(np.finfo(np.float16).tiny)  # a scale is never smaller, so it keeps its 11 bits and is never zero
# Added to every importance, as a share of their mean: a column that the calibration text never used still counts.
FLOOR = 1e-4
AT_ONCE = 2**18  # numbers whose scales are searched together, which keeps them in the CPU's cache


@dataclass(frozen=True)
class GroupScales:
    """Scales (float16) and zero points (uint8) of the groups of some rows, each (N, groups)."""

    size: int  # numbers in a group; the last one of a row may have fewer
    scale: NDArray[np.float16]
    zero: NDArray[np.uint8]

    @property
    def parts(self) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Scales and zero points."""
        return self.scale, self.zero

    def rounded(self, rows: Float32) -> NDArray[np.uint8]:
        """Rows (N, K) as the nearest numbers from 0 to 15, with the zero point added."""
        k = rows.shape[1]
        scale, zero = (np.repeat(values.astype(np.float32), self.size, 1)[:, :k] for values in self.parts)
        with np.errstate(invalid="ignore"):  # of an infinite scale, which whoever stores it must refuse
            numbers = np.rint(rows / scale) + zero
        return np.nan_to_num(numbers.clip(0, LARGEST), copy=False).astype(np.uint8)


def search(rows: Float32, size: int, importance: Float32 | None, *, zero_points: bool) -> GroupScales:
    """The best scales of rows (N, K) in groups of `size`, where `importance` is (K,), not negative; None counts all
    columns alike. A group whose numbers are too large for any scale gets an infinite one.
    """
    count = max(AT_ONCE // rows.shape[1], 1)
    weights = _weights(rows.shape[1], size, importance)
    parts = [_search(rows[i : i + count], weights, zero_points=zero_points) for i in range(0, len(rows), count)]
    return GroupScales(size, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _weights(k: int, size: int, importance: Float32 | None) -> Float32:
    """The importance of each column, by groups (groups, size), relative to the mean; zero where a row has ended."""
    weights = np.zeros(-(-k // size) * size, np.float32)
    mean = 0.0 if importance is None else float(importance.mean(dtype=np.float64))
    weights[:k] = importance / np.float32(mean) + np.float32(FLOOR) if importance is not None and mean > 0 else 1
    return weights.reshape(-1, size)


def _search(rows: Float32, weights: Float32, *, zero_points: bool) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    n, k = rows.shape
    grouped = np.zeros((n, weights.size), np.float32)
    grouped[:, :k] = rows
    grouped = grouped.reshape(n, *weights.shape)
    weighted = grouped * weights
    best_scale = np.full((n, len(weights)), np.inf, np.float16)
    best_zero = np.full(best_scale.shape, MIDDLE, np.uint8)
    best = np.full(best_scale.shape, -1, np.float32)  # how much of the error the fit removes
    for scale, zero in _candidates(grouped, zero_points=zero_points):
        fitted, removed = _fitted(grouped, weighted, weights, scale, zero)
        better = (removed > best) & np.isfinite(fitted)
        best[better], best_scale[better], best_zero[better] = removed[better], fitted[better], zero[better]
    return best_scale, best_zero


def _fitted(
    grouped: Float32, weighted: Float32, weights: Float32, scale: Float32, zero: Float32
) -> tuple[NDArray[np.float16], Float32]:
    """The best scale for the integers that a candidate gives, and how much of the error it removes."""
    numbers = np.rint(grouped / scale[..., None])
    offset = zero[..., None]
    np.clip(numbers, -offset, LARGEST - offset, out=numbers)
    product = np.einsum("ngk,ngk->ng", weighted, numbers)
    np.square(numbers, out=numbers)
    square = np.einsum("ngk,gk->ng", numbers, weights)
    empty = square == 0  # every number was rounded to zero
    quotient = np.where(empty, scale, product / np.where(empty, 1, square))
    with np.errstate(over="ignore"):
        return _representable(quotient), np.where(empty, 0, quotient * product)


def _candidates(grouped: Float32, *, zero_points: bool) -> Iterator[tuple[Float32, Float32]]:
    """Scales and zero points (N, groups) to try.

    Symmetric: the number with the largest magnitude becomes -8, or 7, of a scale that is then stretched or shrunk: less
    than it needs trades its error for that of all others. With zero points, the same is done to the range from the
    smallest to the largest number.
    """
    if zero_points:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        for factor in RANGES:
            scale = np.maximum((high - low) * np.float32(factor / LARGEST), np.float32(SMALLEST))
            yield scale, np.rint(-low * np.float32(factor) / scale).clip(0, LARGEST)
        return
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
    middle = np.full(largest.shape, MIDDLE, np.float32)
    for end in (-MIDDLE, LARGEST - MIDDLE):
        for factor in RANGES:
            scale = largest * np.float32(factor / end)
            yield np.where(np.abs(scale) < SMALLEST, np.float32(SMALLEST), scale), middle


def _representable(scale: Float32) -> NDArray[np.float16]:
    """Scales as float16, never smaller than its smallest normal number."""
    found = scale.astype(np.float16)
    found[np.abs(found) < SMALLEST] = SMALLEST
    return found
