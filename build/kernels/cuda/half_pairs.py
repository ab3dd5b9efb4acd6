"""Arithmetic of two float16 at once, in one uint32: each operation is one instruction, with one rounding if any."""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding
from build.kernels.cuda.mma import member, pair

BOTH = 0x00010001  # a factor that repeats 16 bits


def repeated(bits: Any) -> Any:
    """A pair of the same number twice, of its 16 bits in a uint32."""
    return bits * T.uint32(BOTH)


def half_bits(number: Any) -> Any:
    """The bits of a float16, in a uint32."""
    return T.Cast("uint32", T.reinterpret("uint16", number))


def difference(on: Binding):
    """Function for a - b of two pairs."""

    def serially(a: Any, b: Any) -> Any:
        return pair(member(a, 0) - member(b, 0), member(a, 1) - member(b, 1))

    return serially if on.serial else lambda a, b: _instruction("__hsub2", a, b)


def product(on: Binding):
    """Function for a * b of two pairs."""

    def serially(a: Any, b: Any) -> Any:
        return pair(member(a, 0) * member(b, 0), member(a, 1) * member(b, 1))

    return serially if on.serial else lambda a, b: _instruction("__hmul2", a, b)


def product_and_sum(on: Binding):
    """Function for a * b + c of three pairs, rounded once on a GPU; in float32 first in the serial form."""

    def serially(a: Any, b: Any, c: Any) -> Any:
        return pair(
            member(a, 0) * member(b, 0) + member(c, 0),
            member(a, 1) * member(b, 1) + member(c, 1),
        )

    return serially if on.serial else lambda a, b, c: _instruction("__hfma2", a, b, c)


def masked_and_flipped(on: Binding):
    """Function for (a & mask) ^ flipped, bit by bit; compilers make two instructions of it if both are constants."""

    def serially(a: Any, mask: int, flipped: int) -> Any:
        return (a & T.uint32(mask)) ^ T.uint32(flipped)

    # 0x6a holds the result for each combination of bits: PTX manual, "lop3"
    source = """
__forceinline__ __device__ unsigned int masked_and_flipped(unsigned int a, unsigned int mask, unsigned int flipped) {
  unsigned int result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(mask), "r"(flipped));
  return result;
}
"""

    def instruction(a: Any, mask: int, flipped: int) -> Any:
        return T.cuda.func_call(
            "masked_and_flipped", a, T.uint32(mask), T.uint32(flipped), source_code=source, return_type="uint32"
        )

    return serially if on.serial else instruction


def _instruction(name: str, *pairs: Any) -> Any:
    """A call of one of CUDA's functions on half2, between uint32: TVM itself would split vectors into their numbers."""
    parameters = [f"p{i}" for i in range(len(pairs))]
    source = f"""
__forceinline__ __device__ unsigned int {name}_of_words({", ".join(f"unsigned int {p}" for p in parameters)}) {{
  __half2 result = {name}({", ".join(f"*reinterpret_cast<__half2*>(&{p})" for p in parameters)});
  return *reinterpret_cast<unsigned int*>(&result);
}}
"""
    return T.cuda.func_call(f"{name}_of_words", *pairs, source_code=source, return_type="uint32")
