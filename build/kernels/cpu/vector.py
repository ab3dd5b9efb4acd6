"""Arithmetic shared by the CPU kernels: tiles of sums, an exp that vectorises, SiLU, and stored numbers as float32."""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.float8 import from_e4m3

LOG2_E = 1.44269504088896341
LN2_HIGH = 0.693359375  # ln 2 in two parts, so that x - n ln 2 stays exact (Cody and Waite)
LN2_LOW = -2.12194440e-4
# Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, from Cephes' expf (Moshier):
# error below 2 ulp of float32.
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LINE = 64  # bytes in a cache line
# How many bytes ahead weights are prefetched, because the hardware prefetcher stops at the end of a page; `panels` has
# more for float32 arithmetic. Measured with all products of a decode step on 2 Zen 3 cores: int8 25 GB/s with 2048
# ahead, 24 with 1024, 17 without; int4 25 with 256, 20 without.
AHEAD, NEAR = 2048, 256
READ, SOON, DATA = T.int32(0), T.int32(3), T.int32(1)  # operands of LLVM's prefetch
INFINITY = 0x7F800000  # the bits of float32's
SMALLEST, LARGEST = -87.33, 88.37  # the argument is clamped: beyond, the result would not be a normal number


def odd_lines(words: int) -> int:
    """So many words of 32 bits, rounded up to an odd number of cache lines.

    Rows that lie so far apart lie in different sets of the L1 cache.
    """
    return (-(-words * 4 // LINE) | 1) * LINE // 4


def exp(x: Expr) -> Expr:
    """exp(x) in float32 from multiplications and one bit shift; `T.exp` would call the C library once per lane."""
    clamped = T.min(T.max(x, T.float32(SMALLEST)), T.float32(LARGEST))
    n = T.floor(clamped * T.float32(LOG2_E) + T.float32(0.5))
    r = clamped - n * T.float32(LN2_HIGH) - n * T.float32(LN2_LOW)
    polynomial = T.float32(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        polynomial = polynomial * r + T.float32(coefficient)
    power_of_two = T.reinterpret("float32", (T.Cast("int32", n) + 127) << 23)
    return (polynomial * r * r + r + T.float32(1)) * power_of_two


def silu(x: Expr) -> Expr:
    """x / (1 + exp(-x))."""
    return x / (T.float32(1) + exp(T.float32(0) - x))


def exact_quotient(x: Expr, divisor: Expr, inverse: Expr) -> Expr:
    """x / divisor, correctly rounded, from `inverse`, 1 / divisor; needs fused multiply-adds.

    Five multiply-adds take less time than a division. Markstein, "Computation of elementary functions on the IBM RISC
    System/6000 processor" (1990): if the inverse is correctly rounded and an estimate is off by less than one unit
    in the last place, then estimate + inverse * (x - estimate * divisor) is the correctly rounded quotient. The first
    such step brings the product x * inverse, which may be off by two units, so close. The quotient must not overflow,
    nor matter where it is subnormal.
    """
    quotient = x * inverse
    for _ in range(2):
        quotient = T.fma(T.fma(quotient, T.float32(0) - divisor, x), inverse, quotient)
    return quotient


@T.inline
def clear(sums, n, lanes):
    """Set the first n vectors of sums, which stay in registers, to zero."""
    for i in T.unroll(n):
        for v in T.vectorized(lanes):
            sums[i * lanes + v] = T.float32(0)


@T.inline
def clear_memory(numbers, n, lanes):
    """Set the first n vectors of numbers, of which there may be many, to zero."""
    for i in T.serial(n):
        for v in T.vectorized(lanes):
            numbers[i * lanes + v] = T.float32(0)


def reduced(x: Any, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """x[0 : lanes] combined into one number, halves of a vector at a time, always in the same order."""
    vector = x[T.ramp(0, 1, lanes)] if lanes > 1 else x[0]
    while lanes > 1:
        lanes //= 2
        vector = combine(T.Shuffle([vector], list(range(lanes))), T.Shuffle([vector], list(range(lanes, 2 * lanes))))
    return vector


@T.inline
def add_outer_product(sums, at, rows, columns, lanes, left, right):
    """sums[at :], (rows, columns), += left(row) * right(column): one step of a tile that stays in registers.

    left and right are Python functions.
    """
    for r in T.unroll(rows):
        for n in T.unroll(columns // lanes):
            for v in T.vectorized(lanes):
                sums[at + r * columns + n * lanes + v] = sums[at + r * columns + n * lanes + v] + left(r) * right(
                    n * lanes + v
                )


@T.inline
def prefetch(buffer, *index):
    """Prefetch the cache line of buffer[index], which need not exist."""
    T.evaluate(
        T.call_llvm_intrin(
            T.llvm_lookup_intrinsic_id("llvm.prefetch"), T.address_of(buffer[index]), READ, SOON, DATA, dtype="void"
        )
    )


def as_bfloat16(x: Expr) -> Expr:
    """A float32 rounded to bfloat16, half to even, as float32; a TIR expression.

    What the lower half of the bits holds is carried into the upper half, or cut off. A NaN, which a carry could turn
    into a number, becomes a quiet one.
    """
    bits = T.reinterpret("uint32", x)
    carried = bits + T.uint32(0x7FFF) + (bits >> T.uint32(16) & T.uint32(1))
    kept = T.Select((bits & T.uint32(0x7FFFFFFF)) > T.uint32(INFINITY), bits | T.uint32(0x400000), carried)
    return T.reinterpret("float32", kept & T.uint32(0xFFFF0000))


def widened(x: Expr) -> Expr:
    """A stored number as float32.

    uint16 holds the bits of a bfloat16, which are the upper half of a float32, and uint8 those of an e4m3.
    """
    dtype = str(x.ty.dtype)
    if dtype.startswith("uint16"):
        return T.reinterpret("float32", T.Cast("uint32", x) << T.uint32(16))
    if dtype.startswith("uint8"):
        return from_e4m3(x)
    return T.Cast("float32", x)
