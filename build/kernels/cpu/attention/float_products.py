"""The two products of attention on a CPU where the cache holds floats: queries with keys, and shares with values."""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.level import Level, fitting_lanes, sums_beside_prefetches
from build.kernels.cpu.panels import ITEMSIZE
from build.kernels.cpu.vector import LINE, add_outer_product, clear, prefetch, widened
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK


def at_once(room: int, of_each: int, choices: tuple[int, ...]) -> int:
    """The first of the choices that needs no more than `room` registers, `of_each` for one; the last if none does."""
    return next((n for n in choices if n * of_each <= room), choices[-1])


def sums_at_once(level: Level, shape: RollingAttention) -> int:
    """Vectors of sums that stay in registers; there are fewer where a loop prefetches."""
    if shape.tokens == 1:
        return sums_beside_prefetches(level)
    return level.tile.rows * level.tile.columns // level.lanes


def fetching(shape: RollingAttention, width: int, dtype: str):
    """Inline `fetch(numbers, column, turn, turns, columns)`: prefetch what the next step reads of keys or values.

    A column has `width` numbers. `columns` are read in `turns` turns of a loop, from `column` on, of which this is one.
    Nothing is fetched for chunks, whose tiles read the same columns one after the other.
    """
    line = LINE // ITEMSIZE[dtype]

    @T.inline
    def fetch(numbers, column, turn, turns, columns):
        if shape.tokens == 1:
            for i in T.unroll(max(columns * width // turns // line, 1)):
                prefetch(numbers, (column + WIDTH) * width + turn * (columns * width // turns) + i * line)

    return fetch


def float_key_product(level: Level, shape: RollingAttention, R: int):
    """Inline `score(queries, tile, keys, column, blocks, scores)`: scores (R, WIDTH) = queries times keys.

    These are tile `tile` of the queries, R rows, and `blocks` whole blocks of keys from `column` on. As many blocks are
    multiplied together as registers hold sums of; scores past the last block are undefined.
    """
    D, lanes = shape.head_dim, fitting_lanes(level, RING_BLOCK)
    parts = RING_BLOCK // lanes
    together = at_once(sums_at_once(level, shape), R * parts, (4, 2, 1))
    fetch = fetching(shape, D, shape.cache_dtype)

    @T.inline
    def score(queries, tile, keys, column, blocks, scores):
        for c in T.serial((blocks + together - 1) // together):
            sums = T.alloc_buffer((together * R * RING_BLOCK,), "float32")
            clear(sums, together * R * RING_BLOCK // lanes, lanes)
            for d in T.serial(D):
                fetch(keys.numbers, column + c * together * RING_BLOCK, d, D, together * RING_BLOCK)
                for r in T.unroll(R):
                    for n in T.unroll(together):
                        for i in T.unroll(parts):
                            for v in T.vectorized(lanes):
                                sums[((r * together + n) * parts + i) * lanes + v] = sums[
                                    ((r * together + n) * parts + i) * lanes + v
                                ] + queries.numbers[(tile * R + r) * D + d] * widened(
                                    keys.numbers[
                                        (column + T.min(c * together + n, blocks - 1) * RING_BLOCK) * D
                                        + d * RING_BLOCK
                                        + i * lanes
                                        + v
                                    ]
                                )
            for r in T.unroll(R):
                for n in T.unroll(together * parts):
                    for v in T.vectorized(lanes):
                        scores[r * WIDTH + c * together * RING_BLOCK + n * lanes + v] = sums[
                            (r * together * parts + n) * lanes + v
                        ]

    return score


def float_value_product(level: Level, shape: RollingAttention, R: int):
    """Inline `mix(scores, values, column, count, mixed, at, shrink)`: mixed = mixed * shrink + shares times values.

    The shares are in scores (R, WIDTH), of which the first `count` columns are multiplied by as many values from
    `column` on; mixed[at :] is (R, head_dim).
    """
    D, lanes = shape.head_dim, fitting_lanes(level, shape.head_dim)
    room, fetch = sums_at_once(level, shape), fetching(shape, D, shape.cache_dtype)
    parts = at_once(room, R, tuple(n for n in (8, 4, 2, 1) if D % (n * lanes) == 0))  # vectors of a row

    @T.inline
    def mix(scores, values, column, count, mixed, at, shrink):
        for c in T.serial(D // (parts * lanes)):
            sums = T.alloc_buffer((R * parts * lanes,), "float32")
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        sums[(r * parts + n) * lanes + v] = (
                            mixed[at + r * D + (c * parts + n) * lanes + v] * shrink[r]
                        )
            for j in T.serial(count):
                if c == 0:
                    fetch(values.numbers, column, j, WIDTH, WIDTH)
                add_outer_product(
                    sums,
                    0,
                    R,
                    parts * lanes,
                    lanes,
                    lambda r: scores[r * WIDTH + j],
                    lambda d: widened(values.numbers[(column + j) * D + c * parts * lanes + d]),
                )
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        mixed[at + r * D + (c * parts + n) * lanes + v] = sums[(r * parts + n) * lanes + v]

    return mix
