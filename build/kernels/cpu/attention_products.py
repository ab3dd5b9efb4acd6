"""The two products of attention on a CPU, queries with keys and shares with values, for each format of a cache.

Keys are stored in blocks of slots, (slots / block, width, block), so that adjacent numbers belong to adjacent slots;
so are the scales and minima of int4 keys. Values, with theirs, are (slots, width).
"""

from tvm.script import tirx as T

from build.kernels.cache_numbers import int4_number
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import add_outer_product, widened
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF


def key_product(level: Level, shape: RollingAttention, R: int, block: int):
    """Inline `add(sums, queries, start, keys, column)`: sums (R, block) += queries times a block of keys.

    queries[start :] is (head_dim, R). The block begins at `column` of the buffers in `keys`. Levels of int8 are
    multiplied as they are.
    """
    D, lanes = shape.head_dim, fitting_lanes(level, block)

    @T.inline
    def add(sums, queries, start, keys, column):
        for d in T.serial(D):
            add_outer_product(
                sums,
                0,
                R,
                block,
                lanes,
                lambda r: queries[start + d * R + r],
                lambda key: widened(keys.numbers[column * D + d * block + key]),
            )

    @T.inline
    def add_int4(sums, queries, start, keys, column):
        for g in T.serial(D // GROUP):
            start_of_group = column * (D // GROUP) + g * block
            scale = T.alloc_buffer((block,), "float32")
            minimum = T.alloc_buffer((block,), "float32")
            for n in T.unroll(block // lanes):
                for v in T.vectorized(lanes):
                    scale[n * lanes + v] = T.Cast("float32", keys.scales[start_of_group + n * lanes + v])
                    minimum[n * lanes + v] = T.Cast("float32", keys.minima[start_of_group + n * lanes + v])
            for d in T.serial(HALF):
                for half in T.unroll(2):
                    add_outer_product(
                        sums,
                        0,
                        R,
                        block,
                        lanes,
                        lambda r: queries[start + (g * GROUP + half * HALF + d) * R + r],
                        lambda key: int4_number(
                            keys.numbers[column * (D // 2) + (g * HALF + d) * block + key],
                            half,
                            scale[key],
                            minimum[key],
                        ),
                    )

    return add_int4 if shape.stored.group else add


def value_product(level: Level, shape: RollingAttention, R: int, width: int):
    """Inline `mix(scores, values, column, count, mixed, at, shrink)`: mixed = mixed * shrink + scores times values.

    scores is (R, width), of which the first `count` columns are multiplied by as many values from `column` on, and
    mixed[at :] is (R, head_dim). Levels of int8 are multiplied as they are.
    """
    D = shape.head_dim
    grouped = shape.stored.group is not None
    lanes = fitting_lanes(level, HALF if grouped else D)
    # Vectors of sums per row, which one pass over the columns fills; of int4, those of the two halves of bytes.
    parts = 2 if grouped else next(n for n in (2, 1) if D % (n * lanes) == 0)
    passes = D // (parts * lanes)

    def first(c, n):
        """The first number of vector n in pass c."""
        if grouped:
            return c // (HALF // lanes) * GROUP + n * HALF + c % (HALF // lanes) * lanes
        return (c * parts + n) * lanes

    @T.inline
    def add(sums, scores, values, column, j, c):
        add_outer_product(
            sums,
            0,
            R,
            parts * lanes,
            lanes,
            lambda r: scores[r * width + j],
            lambda d: widened(values.numbers[(column + j) * D + first(c, 0) + d]),
        )

    @T.inline
    def add_int4(sums, scores, values, column, j, c):
        group = (column + j) * (D // GROUP) + c // (HALF // lanes)
        scale = T.Cast("float32", values.scales[group])
        minimum = T.Cast("float32", values.minima[group])
        for n in T.unroll(2):
            for r in T.unroll(R):
                for v in T.vectorized(lanes):
                    sums[(r * 2 + n) * lanes + v] = sums[(r * 2 + n) * lanes + v] + scores[r * width + j] * int4_number(
                        values.numbers[group * HALF + c % (HALF // lanes) * lanes + v], n, scale, minimum
                    )

    add_column = add_int4 if grouped else add

    @T.inline
    def mix(scores, values, column, count, mixed, at, shrink):
        for c in T.serial(passes):
            sums = T.alloc_buffer((R * parts * lanes,), "float32")
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        sums[(r * parts + n) * lanes + v] = mixed[at + r * D + first(c, n) + v] * shrink[r]
            for j in T.serial(count):
                add_column(sums, scores, values, column, j, c)
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        mixed[at + r * D + first(c, n) + v] = sums[(r * parts + n) * lanes + v]

    return mix
