"""A packed matrix of a CUDA library, unpacked to its numbers: `runtime.artifact.layouts`, with numpy alone."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.layouts import PANEL, WORD_ZERO

Array = NDArray[Any]

EPS = 2.0**-23  # 2 u of float32


@dataclass(frozen=True)
class PackedMatrix:
    """(N, K) numbers as a CUDA library reads them: w (panels, vectors, 32, J), scales per row or group, zero points."""

    n: int
    k: int
    group_size: int | None  # numbers of a row that share a scale; None: all
    w: Array
    s: Array | None = None
    z: Array | None = None

    def rows(self, first: int, last: int) -> Array:
        """The numbers of panels first .. last - 1 as float64 (rows, K)."""
        rows = self.numbers(first, last)
        return rows * self.scales(first, last) if self.s is not None else rows

    def numbers(self, first: int, last: int) -> Array:
        """Like `rows`, before the scales."""
        w = self.w[first:last]
        if self.in_words:
            w = _unpacked(w)
        count = min(last * PANEL, self.n) - first * PANEL
        rows = w.transpose(0, 2, 1, 3).reshape(-1, w.shape[1] * w.shape[3])[:count, : self.k].astype(np.float64)
        if self.in_words:
            rows -= WORD_ZERO if self.z is None else self._of_groups(self.z, first, last)
        return rows

    def scales(self, first: int, last: int) -> Array:
        """Scales of those rows, (rows, 1) or (rows, K)."""
        assert self.s is not None
        if self.s.ndim > 1:  # one per group
            return self._of_groups(self.s, first, last)
        return self.s[first * PANEL : last * PANEL, None].astype(np.float64)

    def _of_groups(self, parts: Array, first: int, last: int) -> Array:
        """Expand (panels, groups, 32) to (rows, K)."""
        count = min(last * PANEL, self.n) - first * PANEL
        rows = parts[first:last].transpose(0, 2, 1).reshape(-1, parts.shape[1])[:count]
        return np.repeat(rows, self.group_size or self.k, axis=1)[:, : self.k].astype(np.float64)

    def times(self, x: Array, first: int, last: int, *, mantissas: bool = False) -> tuple[Array, Array]:
        """x (rows, K) times the transposed rows of some panels, and how far a float32 sum of these products may be off.

        If int4 goes into the sum as `mantissas`, 16 (1 + q / 16) x is summed and (16 + zero) x is subtracted again,
        each at most 31 |x| times the scale.
        """
        rows = self.rows(first, last)
        size = 62 * self.scales(first, last) if mantissas and self.in_words else np.abs(rows)
        return x @ rows.T, sum_error(self.k) * (np.abs(x) @ size.T)

    @property
    def in_words(self) -> bool:
        """Whether eight 4-bit numbers share an int32."""
        return self.w.dtype == np.int32

    @property
    def panels(self) -> int:
        """How many panels of 32 rows there are."""
        return -(-self.n // PANEL)


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
