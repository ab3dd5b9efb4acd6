"""8-bit floats (e4m3) as pairs of float16, two at a time, by their bits (`build/kernels/float8.py`)."""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import half_pairs
from build.kernels.cuda.binding import Binding

SIGNS, MAGNITUDES = 0x80008000, 0x3F803F80  # the bits of two e4m3 in the places that float16 has for them
UNIT = 0x5C005C00  # the bits of 256, `E4M3_UNIT`, as float16, twice


def of_word(at_top: Any) -> Any:
    """The numbers in the upper bytes of a word's halves, as a pair of float16 that are 256 times smaller."""
    return (at_top & T.uint32(SIGNS)) | ((at_top >> T.uint32(1)) & T.uint32(MAGNITUDES))


def neighbours(on: Binding):
    """Function for the numbers in the lower two bytes of a word, as a pair of float16."""
    multiply = half_pairs.product(on)

    def widen(word: Any) -> Any:
        upper = ((word & T.uint32(0xFF)) << T.uint32(8)) | ((word & T.uint32(0xFF00)) << T.uint32(16))
        return multiply(of_word(upper), T.uint32(UNIT))

    return widen
