"""Pieces of a ring's columns: what one thread of `decode_attention.py` loads at once, and the numbers in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cache_numbers import int4_number
from build.kernels.cuda import float8_pairs
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.mma import PAIR, member
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import FLOAT8, GROUP, HALF
from runtime.artifact.layouts import VECTOR
from runtime.artifact.tensor_file import bits_dtype

NUMBERS = 8  # in a piece, at most: places of a query and of an output that a thread keeps, for each head
RUN = 4  # neighbouring float32 that go together to or from shared memory


@dataclass(frozen=True)
class Pieces:
    """How a column of head_dim numbers is cut: `count` pieces of `elements` stored elements, of `numbers` numbers.

    An element is a number or, of int4, a byte with number i of a group and number i + 16.
    """

    elements: int
    count: int
    numbers: int

    @classmethod
    def of(cls, shape: RollingAttention) -> "Pieces":
        """The largest pieces of at most 16 bytes and `NUMBERS` numbers."""
        width, itemsize = next(shape.stored.parts(shape.head_dim)).width, bits_dtype(shape.cache_dtype).itemsize
        each = shape.head_dim // width  # numbers in an element
        fitting = [n for n in (8, 4, 2, 1) if width % n == 0 and n * itemsize <= VECTOR and n * each <= NUMBERS]
        return cls(fitting[0], width // fitting[0], fitting[0] * each)

    @property
    def run(self) -> int:
        """Numbers of a piece that follow each other in a head, and that go together."""
        return min(RUN, self.elements)

    def place(self, piece: Any, i: Any) -> Any:
        """Number of a head that is number i of a piece."""
        if self.numbers == self.elements:
            return piece * self.elements + i
        in_half = HALF // self.elements
        return (
            piece // in_half * GROUP + i // self.elements * HALF + piece % in_half * self.elements + i % self.elements
        )


def number_reader(shape: RollingAttention, pieces: Pieces, on: Binding):
    """How the elements of a piece become numbers: an inline and a function.

    The inline is `load_factors(cache, slot, h, column, piece, factors, t, at)`: factors[t, at] is then the scale, and
    the next one the minimum, if there are any. The function `number(element, i, scale, minimum)` is number i of a piece
    in float32; `element` is a function for an element of the piece.
    """
    scaled, grouped = shape.stored.scales is not None, shape.stored.group is not None
    widen_neighbours = float8_pairs.neighbours(on)

    @T.inline
    def load_factors(cache, slot, h, column, piece, factors, t, at):
        if grouped:
            factors[t, at] = T.Cast("float32", cache.scales[slot, h, column, piece // (HALF // pieces.elements)])
            factors[t, at + 1] = T.Cast("float32", cache.minima[slot, h, column, piece // (HALF // pieces.elements)])
        elif scaled:
            factors[t, at] = cache.scales[slot, h, column, 0]

    def number(element: Callable[[Any], Any], i: Any, scale: Any, minimum: Any) -> Any:
        if grouped:
            return int4_number(element(i % pieces.elements), i // pieces.elements, scale, minimum)
        if shape.cache_dtype == FLOAT8:
            low, high = (T.Cast("uint32", element(i // PAIR * PAIR + which)) for which in range(PAIR))
            return member(widen_neighbours(low | high << T.uint32(8)), i % PAIR)
        found = T.Cast("float32", element(i))
        return found * scale if scaled else found

    return load_factors, number
