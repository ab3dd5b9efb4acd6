"""`mma.sync.m16n8k16`: the product that one warp computes on a tensor core, and how its lanes hold the numbers.

16 x 16 numbers of a times 16 x 8 of b, both float16, are added to 16 x 8 float32 sums. Each lane holds some of all
three, laid out as in the PTX manual ("Matrix Fragments for mma.m16n8k16 with floating point type"): `fragment_row`
and the comments beside A, B and C describe that layout from a lane's view. No single thread computes such a product:
in the serial form, `multiply_serially` replaces it and finds each number in the lane that holds it.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding

ROWS, COLUMNS, DEPTH = 16, 8, 16
PAIR = 2  # neighbours along the depth, as float16 in one uint32: the registers that `mma.sync` takes
A = 4  # pairs of a that a lane holds: row `fragment_row(t, i)`, depth pair t % 4 + i // 2 * 4
B = 2  # pairs of b: column t % WARP // 4, depth pair t % 4 + i * 4
C = 4  # sums: row `fragment_row(t, i // 2)`, column t % 4 * 2 + i % 2
QUAD = 4  # lanes that together hold a row of the sums
ALL_LANES = T.uint32(0xFFFFFFFF)


def fragment_row(t: Any, i: Any) -> Any:
    """Row of a lane's pair i of a, and of its sums 2 i and 2 i + 1."""
    return t % WARP // QUAD + i % 2 * 8


def multiplier(on: Binding):
    """Inline `multiply(acc, a, b, t, acc_at, a_at, b_at)`: add the warp's a times b to lane t's sums, in registers."""

    @T.inline
    def multiply(acc, a, b, _t, acc_at, a_at, b_at):
        T.evaluate(
            T.ptx_legacy.mma(
                "m16n8k16",
                "row",
                "col",
                "fp16",
                "fp16",
                "fp32",
                a.data,
                a_at,
                b.data,
                b_at,
                acc.data,
                acc_at,
                False,
                dtype="float32",
            )
        )

    return multiply_serially if on.serial else multiply


def matrix_loader(on: Binding):
    """Inline `load(tile, unit, a, t, at)`: four 8 x 8 matrices of float16 from shared memory to a[at : at + 4].

    A row of a matrix is 16 bytes, tile[unit(matrix, row), :]. Register i of a lane gets pair t % 4 of the
    row t % 32 // 4 of matrix i. Each lane brings the address of a row (PTX manual, "ldmatrix").
    """

    @T.inline
    def load(tile, unit, a, t, at):
        T.evaluate(
            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                a[0, at],
                a[0, at + 1],
                a[0, at + 2],
                a[0, at + 3],
                T.address_of(tile[unit(t % WARP // 8, t % 8), 0]),
            )
        )

    @T.inline
    def load_serially(tile, unit, a, t, at):
        for i in T.serial(A):
            a[t, at + i] = tile[unit(i, t % WARP // QUAD), t % QUAD]

    return load_serially if on.serial else load


def quad_reduction(on: Binding, combine: Callable[[Any, Any], Any]):
    """Inline `reduce(source, result, j, t)`: reduce number j of `source` over the lanes of a quad.

    Number j of each lane's `result` is `combine` over number j of `source` in the lanes of its quad.
    """

    @T.inline
    def reduce(source, result, j, _t):
        result[0, j] = source[0, j]
        result[0, j] = combine(result[0, j], T.tvm_warp_shuffle_xor(ALL_LANES, result[0, j], 1, WARP, WARP))
        result[0, j] = combine(result[0, j], T.tvm_warp_shuffle_xor(ALL_LANES, result[0, j], 2, WARP, WARP))

    @T.inline
    def reduce_serially(source, result, j, t):
        result[t, j] = combine(
            combine(source[t // QUAD * QUAD, j], source[t // QUAD * QUAD + 1, j]),
            combine(source[t // QUAD * QUAD + 2, j], source[t // QUAD * QUAD + 3, j]),
        )

    return reduce_serially if on.serial else reduce


def pair(low: Any, high: Any) -> Any:
    """Two numbers as float16, packed in one uint32."""
    bits = [T.Cast("uint32", T.reinterpret("uint16", T.Cast("float16", number))) for number in (low, high)]
    return bits[0] | (bits[1] << T.uint32(16))


def member(pairs: Any, which: Any) -> Any:
    """First or second number of a pair, as float32."""
    return T.Cast(
        "float32",
        T.reinterpret("float16", T.Cast("uint16", (pairs >> T.Cast("uint32", 16 * which)) & T.uint32(0xFFFF))),
    )


@T.inline
def multiply_serially(acc, a, b, t, acc_at, a_at, b_at):
    """Do the work of `mma.sync` for one lane.

    Depth d of row r of a is in lane r % 8 * 4 + d % 8 / 2, and depth d of column c of b in lane c * 4 + d % 8 / 2.
    """
    for i in T.serial(C):
        for d in T.serial(DEPTH):
            acc[t, acc_at + i] = acc[t, acc_at + i] + member(
                a[
                    t // WARP * WARP + (t % WARP // 4 + i // 2 * 8) % 8 * 4 + d % 8 // 2,
                    a_at + d // 8 * 2 + (t % WARP // 4 + i // 2 * 8) // 8,
                ],
                d % 2,
            ) * member(b[t // WARP * WARP + (t % 4 * 2 + i % 2) * 4 + d % 8 // 2, b_at + d // 8], d % 2)
