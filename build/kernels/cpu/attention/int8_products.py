"""The two products of attention with an int8 cache, in whole numbers: queries and shares are rounded to 16 bits.

The sum of a step is at most WIDTH * 128 * 32512, which is below 2^31; `query_levels` sees to that of a key.
"""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.attention.float_products import at_once, fetching, sums_at_once
from build.kernels.cpu.attention.int16_dot import PAIR, int16_dot
from build.kernels.cpu.attention.rounded_shares import share_rounding, times
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK


def int8_key_product(level: Level, shape: RollingAttention, R: int):
    """`score` of `float_key_product` for int8."""
    D, lanes = shape.head_dim, fitting_lanes(level, RING_BLOCK)
    add, parts = int16_dot(level.flags, lanes), RING_BLOCK // lanes
    together = at_once(sums_at_once(level, shape), R * parts, (4, 2, 1))
    fetch = fetching(shape, D, "int8", D // PAIR * WIDTH // (together * RING_BLOCK))

    @T.inline
    def score(queries, tile, keys, column, blocks, scores):
        for c in T.serial((blocks + together - 1) // together):
            sums = T.alloc_buffer((together * parts * R * lanes,), "int32")
            for i in T.unroll(together * parts * R):
                sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for d in T.serial(D // PAIR):
                fetch(keys.numbers, column, c * (D // PAIR) + d)
                for r in T.unroll(R):
                    for n in T.unroll(together):
                        for i in T.unroll(parts):
                            sums[T.ramp(((r * together + n) * parts + i) * lanes, 1, lanes)] = add(
                                sums[T.ramp(((r * together + n) * parts + i) * lanes, 1, lanes)],
                                T.Cast(
                                    f"int16x{PAIR * lanes}",
                                    keys.numbers[
                                        T.ramp(
                                            (column + T.min(c * together + n, blocks - 1) * RING_BLOCK) * D
                                            + (d * RING_BLOCK + i * lanes) * PAIR,
                                            1,
                                            PAIR * lanes,
                                        )
                                    ],
                                ),
                                queries.numbers,
                                (tile * R + r) * D + d * PAIR,
                            )
            for r in T.unroll(R):
                for n in T.unroll(together):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            scores[r * WIDTH + (c * together + n) * RING_BLOCK + i * lanes + v] = (
                                T.Cast("float32", sums[((r * together + n) * parts + i) * lanes + v])
                                * queries.scales[tile * R + r]
                                * keys.scales[column + T.min(c * together + n, blocks - 1) * RING_BLOCK + i * lanes + v]
                            )

    return score


def int8_value_product(level: Level, shape: RollingAttention, R: int):
    """`mix` of `float_value_product` for int8: shares are multiplied by the scales of their values, then rounded."""
    D, lanes = shape.head_dim, fitting_lanes(level, shape.head_dim)
    add, round_shares = int16_dot(level.flags, lanes), share_rounding(level, R)
    parts = at_once(sums_at_once(level, shape), R, tuple(n for n in (8, 4, 2, 1) if D % (n * lanes) == 0))
    passes = D // (parts * lanes)
    fetch = fetching(shape, D, "int8", passes * WIDTH // PAIR)

    @T.inline
    def mix(scores, values, column, count, mixed, at, shrink):
        whole = T.alloc_buffer((R * WIDTH,), "int16")
        steps = T.alloc_buffer((R,), "float32")
        padded = (count + RING_BLOCK - 1) // RING_BLOCK * RING_BLOCK
        round_shares(lambda r, c: times(scores[r * WIDTH + c], values.scales[column + c]), whole, steps, padded)
        for c in T.serial(passes):
            sums = T.alloc_buffer((R * parts * lanes,), "int32")
            for i in T.unroll(R * parts):
                sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for j in T.serial((count + PAIR - 1) // PAIR):
                fetch(values.numbers, column, c * (WIDTH // PAIR) + j)
                for r in T.unroll(R):
                    for n in T.unroll(parts):
                        sums[T.ramp((r * parts + n) * lanes, 1, lanes)] = add(
                            sums[T.ramp((r * parts + n) * lanes, 1, lanes)],
                            T.Cast(
                                f"int16x{PAIR * lanes}",
                                values.numbers[
                                    T.ramp((column + j * PAIR) * D + (c * parts + n) * lanes * PAIR, 1, PAIR * lanes)
                                ],
                            ),
                            whole,
                            r * WIDTH + j * PAIR,
                        )
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        mixed[at + r * D + (c * parts + n) * lanes + v] = (
                            mixed[at + r * D + (c * parts + n) * lanes + v] * shrink[r]
                            + T.Cast("float32", sums[(r * parts + n) * lanes + v]) * steps[r]
                        )

    return mix
