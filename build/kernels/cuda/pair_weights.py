"""Packed weights as pairs of float16, from the words that a thread loads: the factors of a tensor core.

Whole numbers become float16 by their bits: 1024 has the bits 0x6400, and the last bits of its mantissa count ones. So
0x6400 with a number's bits in the last places is 1024 + the number, and a subtraction leaves the number, less its zero
point, exactly. Numbers that one shift and one mask put into both halves of a word form a pair: steps 0 and 2, 1 and 3
of four bytes. The order along K does not matter, as long as x has the same one (`pair_steps`).

A weight of a group is rounded once to float16, as a graph's float16 weights are; a scale of a row is left to the sum.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import float8_pairs, half_pairs
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.half_pairs import BOTH, half_bits, repeated
from build.kernels.cuda.mma import PAIR, member, pair
from build.kernels.cuda.weights import FLIPPED_SIGNS, number
from export.weights.format import Storage
from export.weights.table import vector_steps
from runtime.artifact.layouts import DOT, WORD, WORD_ZERO

WORDS = 4  # uint32 in the 16 bytes that a thread loads
ABOVE = 0x64006400  # the bits of 1024, twice
NIBBLES, BYTES = 0x000F000F, 0x00FF00FF  # the places of a number in both halves of a word
BIAS = 128  # by which flipped signs make int8 numbers larger

Word = Callable[[Any], Any]


def pairs_in_vector(stored: Storage) -> int:
    """Pairs in the 16 bytes that a thread loads at once."""
    return vector_steps(stored) // PAIR


def _of_neighbours(i: Any) -> tuple[Any, Any]:
    return PAIR * i, PAIR * i + 1


def _of_bytes(i: Any) -> tuple[Any, Any]:
    first = i // PAIR * DOT + i % PAIR
    return first, first + PAIR


def _of_halves_of_bytes(i: Any) -> tuple[Any, Any]:
    first = i // DOT * WORD + i % DOT // PAIR * DOT + i % PAIR
    return first, first + PAIR


STEPS = {"float16": _of_neighbours, "int8": _of_bytes, "float8": _of_bytes, "int4": _of_halves_of_bytes}  # by format


def pair_steps(stored: Storage, i: Any) -> tuple[Any, Any]:
    """The two steps of a vector that pair i holds."""
    return STEPS[stored.dtype](i)


def pair_reader(stored: Storage, on: Binding):
    """Function `read(word, i, scale, offset)`: pair i of a vector of which `word(j)` is word j.

    `scale` and `offset` are those of its group, as stored.
    """
    subtract, multiply, add = half_pairs.difference(on), half_pairs.product(on), half_pairs.product_and_sum(on)
    masked_and_flipped = half_pairs.masked_and_flipped(on)

    def from_float8(word: Word, i: Any) -> Any:
        at_top = word(i // PAIR) << T.Cast("uint32", 8 - i % PAIR * 8)
        return float8_pairs.from_upper_bytes(at_top)

    def from_int8(word: Word, i: Any, offset: Any) -> Any:
        both = word(i // PAIR) >> T.Cast("uint32", i % PAIR * 8)
        above = masked_and_flipped(both, BYTES, ABOVE | FLIPPED_SIGNS & BYTES)
        return less(above, T.int32(BIAS) + T.Cast("int32", offset) if stored.zero_points else BIAS)

    def from_int4(word: Word, i: Any, offset: Any) -> Any:
        shift = T.Cast("uint32", i % PAIR * 8 + i % DOT // PAIR * 4)
        above = masked_and_flipped(word(i // DOT) >> shift, NIBBLES, ABOVE)
        usual = 0 if stored.minimums else WORD_ZERO
        return less(above, T.Cast("int32", offset) if stored.zero_points else usual)

    def less(above: Any, zero: Any) -> Any:
        """Pairs of 1024 + a number, less 1024 and the number that stands for zero."""
        if isinstance(zero, int):  # TVM itself would compute this on the host, and give it to kernels as a parameter
            return subtract(above, T.uint32(ABOVE | zero * BOTH))
        return subtract(above, repeated(T.Cast("uint32", zero) | T.uint32(ABOVE & 0xFFFF)))

    numbers = {
        "float16": lambda word, i, _offset: word(i),
        "float8": lambda word, i, _offset: from_float8(word, i),
        "int8": from_int8,
        "int4": from_int4,
    }[stored.dtype]

    def read(word: Word, i: Any, scale: Any, offset: Any) -> Any:
        found = numbers(word, i, offset)
        if not stored.grouped:
            return found
        if stored.scales == "float16":
            factor = repeated(half_bits(scale))
            return add(found, factor, repeated(half_bits(offset))) if stored.minimums else multiply(found, factor)
        factor = scale * T.float32(number(stored).unit)
        added = offset if stored.minimums else T.float32(0)
        return pair(member(found, 0) * factor + added, member(found, 1) * factor + added)

    return read
