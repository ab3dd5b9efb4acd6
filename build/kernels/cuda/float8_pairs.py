"""8-bit floats (e4m3) as pairs of float16, two at a time.

By their bits, as in `build/kernels/float8.py`, this takes five instructions; sm_89 and later have one for it.
"""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import half_pairs
from build.kernels.cuda.binding import Binding

SIGNS, MAGNITUDES = 0x80008000, 0x3F803F80  # the bits of two e4m3 in the places that float16 has for them
UNIT = 0x5C005C00  # the bits of 256, `E4M3_UNIT`, as float16, twice
UPPER_BYTES = 0x1404  # selector of `__byte_perm`: zero, byte 0, zero, byte 1
# PTX manual, "cvt": the lower byte becomes the lower half of the result
SOURCE = """
__forceinline__ __device__ unsigned int neighbours_of_e4m3(unsigned int word, unsigned int by_bits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned int result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(static_cast<unsigned short>(word)));
  return result;
#else
  return by_bits;
#endif
}
"""


def from_upper_bytes(at_top: Any) -> Any:
    """The numbers in the upper bytes of a word's halves, as a pair of float16 that are 256 times smaller."""
    return (at_top & T.uint32(SIGNS)) | ((at_top >> T.uint32(1)) & T.uint32(MAGNITUDES))


def neighbours(on: Binding):
    """Function for the numbers in the lower two bytes of a word, as a pair of float16."""
    multiply = half_pairs.product(on)

    def in_upper_bytes(word: Any) -> Any:
        if on.serial:
            return ((word & T.uint32(0xFF)) << T.uint32(8)) | ((word & T.uint32(0xFF00)) << T.uint32(16))
        return T.call_pure_extern("uint32", "__byte_perm", word, T.uint32(0), T.uint32(UPPER_BYTES))

    def by_bits(word: Any) -> Any:
        return multiply(from_upper_bytes(in_upper_bytes(word)), T.uint32(UNIT))

    def by_instruction(word: Any) -> Any:
        return T.cuda.func_call("neighbours_of_e4m3", word, by_bits(word), source_code=SOURCE, return_type="uint32")

    return by_bits if on.serial else by_instruction
