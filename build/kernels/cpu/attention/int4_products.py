"""The two products of attention with an int4 cache, in whole numbers: queries and shares are rounded to 16 bits.

With numbers n from 0 to 15 and, for each group of elements, a scale s and a minimum m of each column, a score is the
sum over the groups of s (q n) + m sum(q), and a mixed value the sum over the columns of (share s) n + share m.
"""

import operator

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.attention.float_products import fetching
from build.kernels.cpu.attention.int16_dot import PAIR, int16_dot
from build.kernels.cpu.attention.rounded_shares import share_rounding, times
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import clear, reduced
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF, RING_BLOCK

HALVES = 2  # numbers in a byte


def _numbers(pairs: Expr, half: Expr, lanes: int) -> Expr:
    """The low (0) or high (1) numbers of PAIR * lanes bytes, as int16."""
    wide = T.Cast(f"int16x{PAIR * lanes}", pairs)
    return (wide >> T.broadcast(T.Cast("int16", 4 * half), PAIR * lanes)) & T.broadcast(T.int16(15), PAIR * lanes)


def int4_key_product(level: Level, shape: RollingAttention, R: int):
    """`score` of `float_key_product` for int4."""
    D, groups, lanes = shape.head_dim, shape.head_dim // GROUP, fitting_lanes(level, RING_BLOCK)
    add, parts = int16_dot(level.flags, lanes), RING_BLOCK // lanes
    fetch = fetching(shape, D // HALVES, "uint8", WIDTH // RING_BLOCK * groups * (HALF // PAIR))

    @T.inline
    def score(queries, tile, keys, column, blocks, scores):
        for block in T.serial(blocks):
            total = T.alloc_buffer((R * parts * lanes,), "float32")
            clear(total, R * parts, lanes)
            for g in T.serial(groups):
                sums = T.alloc_buffer((R * parts * lanes,), "int32")
                for i in T.unroll(R * parts):
                    sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
                for d in T.serial(HALF // PAIR):
                    fetch(keys.numbers, column, (block * groups + g) * (HALF // PAIR) + d)
                    for half in T.unroll(HALVES):
                        for part in T.unroll(parts):
                            for r in T.unroll(R):
                                sums[T.ramp((r * parts + part) * lanes, 1, lanes)] = add(
                                    sums[T.ramp((r * parts + part) * lanes, 1, lanes)],
                                    _numbers(
                                        keys.numbers[
                                            T.ramp(
                                                (column + block * RING_BLOCK) * (D // HALVES)
                                                + (g * HALF + d * PAIR) * RING_BLOCK
                                                + part * lanes * PAIR,
                                                1,
                                                PAIR * lanes,
                                            )
                                        ],
                                        half,
                                        lanes,
                                    ),
                                    queries.numbers,
                                    (tile * R + r) * D + g * GROUP + half * HALF + d * PAIR,
                                )
                for part in T.unroll(parts):
                    for r in T.unroll(R):
                        for v in T.vectorized(lanes):
                            total[(r * parts + part) * lanes + v] = (
                                total[(r * parts + part) * lanes + v]
                                + T.Cast("float32", sums[(r * parts + part) * lanes + v])
                                * T.Cast(
                                    "float32",
                                    keys.scales[
                                        (column + block * RING_BLOCK) * groups + g * RING_BLOCK + part * lanes + v
                                    ],
                                )
                                + queries.sums[(tile * R + r) * groups + g]
                                * T.Cast(
                                    "float32",
                                    keys.minima[
                                        (column + block * RING_BLOCK) * groups + g * RING_BLOCK + part * lanes + v
                                    ],
                                )
                            )
            for r in T.unroll(R):
                for part in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        scores[r * WIDTH + block * RING_BLOCK + part * lanes + v] = (
                            total[(r * parts + part) * lanes + v] * queries.scales[tile * R + r]
                        )

    return score


def int4_value_product(level: Level, shape: RollingAttention, R: int):
    """`mix` of `float_value_product` for int4: for each group of elements, shares times scales are rounded."""
    D, groups, lanes = shape.head_dim, shape.head_dim // GROUP, fitting_lanes(level, HALF)
    add, round_shares = int16_dot(level.flags, lanes), share_rounding(level, R)
    fetch = fetching(shape, D // HALVES, "uint8", groups * WIDTH // PAIR)
    parts = HALF // lanes  # vectors of bytes in a group

    def of_group(scales, column, g, c):
        """The scale or minimum of group g of column `column` + c, where `column` begins a block."""
        return T.Cast(
            "float32", scales[(column + c // RING_BLOCK * RING_BLOCK) * groups + g * RING_BLOCK + c % RING_BLOCK]
        )

    @T.inline
    def mix(scores, values, column, count, mixed, at, shrink):
        padded = (count + RING_BLOCK - 1) // RING_BLOCK * RING_BLOCK
        for g in T.serial(groups):
            whole = T.alloc_buffer((R * WIDTH,), "int16")
            steps = T.alloc_buffer((R,), "float32")
            lowest = T.alloc_buffer((R,), "float32")  # the sum of shares times minima
            for r in T.serial(R):
                total = T.alloc_buffer((lanes,), "float32")
                clear(total, 1, lanes)
                for n in T.serial(padded // lanes):
                    for v in T.vectorized(lanes):
                        total[v] = total[v] + times(
                            scores[r * WIDTH + n * lanes + v], of_group(values.minima, column, g, n * lanes + v)
                        )
                lowest[r] = reduced(total, lanes, operator.add)
            round_shares(
                lambda r, c: times(scores[r * WIDTH + c], of_group(values.scales, column, g, c)), whole, steps, padded
            )
            sums = T.alloc_buffer((R * parts * HALVES * lanes,), "int32")
            for i in T.unroll(R * parts * HALVES):
                sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for j in T.serial((count + PAIR - 1) // PAIR):
                fetch(values.numbers, column, g * (WIDTH // PAIR) + j)
                for n in T.unroll(parts):
                    for half in T.unroll(HALVES):
                        for r in T.unroll(R):
                            sums[T.ramp(((r * HALVES + half) * parts + n) * lanes, 1, lanes)] = add(
                                sums[T.ramp(((r * HALVES + half) * parts + n) * lanes, 1, lanes)],
                                _numbers(
                                    values.numbers[
                                        T.ramp(
                                            (column + j * PAIR) * (D // HALVES) + (g * HALF + n * lanes) * PAIR,
                                            1,
                                            PAIR * lanes,
                                        )
                                    ],
                                    half,
                                    lanes,
                                ),
                                whole,
                                r * WIDTH + j * PAIR,
                            )
            for r in T.unroll(R):
                for n in T.unroll(HALVES * parts):
                    for v in T.vectorized(lanes):
                        mixed[at + r * D + g * GROUP + n * lanes + v] = mixed[
                            at + r * D + g * GROUP + n * lanes + v
                        ] * shrink[r] + (
                            T.Cast("float32", sums[(r * HALVES * parts + n) * lanes + v]) * steps[r] + lowest[r]
                        )

    return mix
