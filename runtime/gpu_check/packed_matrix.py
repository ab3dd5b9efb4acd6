"""A packed matrix of a CUDA library, unpacked to its numbers: `runtime.artifact.layouts`, with numpy alone."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.layouts import PANEL, WORD_ZERO
from runtime.gpu_check.float8 import from_e4m3

Array = NDArray[Any]

EPS = 2.0**-23  # 2 u of float32


MANTISSA = 16  # one row takes an int4 number q as 16 (1 + q / 16), and subtracts this again


@dataclass(frozen=True)
class PackedMatrix:
    """(N, K) numbers as a CUDA library reads them.

    w (panels, vectors, 32, J), scales per row or group, zero points or minimums per group, and the order of columns.
    """

    n: int
    k: int
    group_size: int | None  # numbers of a row that share a scale; None: all
    w: Array
    s: Array | None = None
    z: Array | None = None  # minimums if they are floats
    order: Array | None = None  # column c as it lies here is column order[c] of the matrix

    def rows(self, first: int, last: int) -> Array:
        """The weights of panels first .. last - 1 as float64 (rows, K)."""
        weights = self._numbers(first, last)
        if self._in_words or self.z is not None:
            weights -= self._zero_points(first, last)
        if self.s is not None:
            weights *= self._scales(first, last)
        if self._has_minimums:
            weights += self._minimums(first, last)
        return self._in_own_order(weights)

    def times(self, x: Array, first: int, last: int, *, one_row: bool = False) -> tuple[Array, Array]:
        """x (rows, K) times the transposed rows of some panels, and how far a float32 sum of these products may be off.

        `one_row`: sums of products of the numbers themselves are corrected by sums of x.
        """
        rows = self.rows(first, last)
        terms = self.terms(first, last, one_row=one_row) if one_row or self._has_minimums else np.abs(rows)
        return x @ rows.T, sum_error(self.k) * (np.abs(x) @ terms.T)

    @property
    def grouped(self) -> bool:
        """Whether the weights of groups have scales, which are multiplied in before the sum of a row."""
        return self.s is not None and self.s.ndim > 1

    @property
    def panels(self) -> int:
        """How many panels of 32 rows there are."""
        return -(-self.n // PANEL)

    @property
    def _in_words(self) -> bool:
        """Whether eight 4-bit numbers share an int32."""
        return self.w.dtype == np.int32

    @property
    def _has_minimums(self) -> bool:
        return self.z is not None and self.z.dtype.kind == "f"

    def terms(self, first: int, last: int, *, one_row: bool = False) -> Array:
        """Magnitudes (rows, K) of what a sum takes in for each weight of some panels, without x; see `times`."""
        scales, minimums = self._scales(first, last), np.abs(self._minimums(first, last))
        if one_row and self.grouped and (self._in_words or self.z is not None):
            shift = MANTISSA if self._in_words else 0
            numbers = np.abs(self._numbers(first, last) + shift)
            zero_points = np.abs(self._zero_points(first, last) + shift)
        else:
            numbers = np.abs(self._numbers(first, last) - self._zero_points(first, last))
            zero_points = np.zeros(1)
        return self._in_own_order((numbers + zero_points) * np.abs(scales) + minimums)

    def _numbers(self, first: int, last: int) -> Array:
        """The numbers of some panels as they are stored, as float64 (rows, K)."""
        w = self.w[first:last]
        if self._in_words:
            w = _unpacked(w)
        if w.dtype == np.uint8 and not self._in_words:
            w = from_e4m3(w)
        rows = w.transpose(0, 2, 1, 3).reshape(-1, w.shape[1] * w.shape[3])
        return rows[: self._count(first, last), : self.k].astype(np.float64)

    def _scales(self, first: int, last: int) -> Array:
        """Scales of those rows, (rows, 1) or (rows, K)."""
        if self.s is None:
            return np.ones(1)
        if self.grouped:
            return self._of_groups(self.s, first, last)
        return self.s[first * PANEL : last * PANEL, None].astype(np.float64)

    def _zero_points(self, first: int, last: int) -> Array:
        if self.z is not None and not self._has_minimums:
            return self._of_groups(self.z, first, last)
        return np.full(1, WORD_ZERO if self._in_words and self.z is None else 0)

    def _minimums(self, first: int, last: int) -> Array:
        return self._of_groups(self.z, first, last) if self.z is not None and self._has_minimums else np.zeros(1)

    def _of_groups(self, parts: Array, first: int, last: int) -> Array:
        """Expand (panels, groups, 32) to (rows, K)."""
        rows = parts[first:last].transpose(0, 2, 1).reshape(-1, parts.shape[1])[: self._count(first, last)]
        return np.repeat(rows, self.group_size or self.k, axis=1)[:, : self.k].astype(np.float64)

    def _in_own_order(self, columns: Array) -> Array:
        """Move columns (rows, K) from where they lie to where they belong."""
        if self.order is None:
            return columns
        moved = np.empty_like(columns)
        moved[:, self.order] = columns
        return moved

    def _count(self, first: int, last: int) -> int:
        """How many rows those panels have, without padding."""
        return min(last * PANEL, self.n) - first * PANEL


def sum_error(terms: int) -> float:
    """How far a float32 sum of products in any order may be off, relative to the sum of their magnitudes.

    It is 8 sqrt(K) u, exceeded with a probability below 2 K exp(-32) (Higham and Mary 2019, "A new approach to
    probabilistic rounding error analysis", theorem 3.1, lambda = 8), plus a few roundings around it. K u, which no
    order exceeds, would accept a kernel that leaves out a tenth of a long sum.
    """
    return (8 * sqrt(terms) + 4) * EPS / 2


def _unpacked(words: Array) -> Array:
    """Unpack int32 (panels, vectors, 32, 4) to numbers from 0 to 15, (panels, vectors, 32, 32).

    Byte j of a word has step j in its lower half and step 4 + j in its upper half.
    """
    data = words.view(np.uint8).reshape(*words.shape, 4)
    return np.stack([data & 15, data >> 4], axis=-2).reshape(*words.shape[:3], -1)
