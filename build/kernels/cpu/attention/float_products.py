"""The two products of attention on a CPU where the cache holds floats: queries with keys, and shares with values."""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.level import Level, fitting_lanes, sums_beside_prefetches
from build.kernels.cpu.panels import ITEMSIZE
from build.kernels.cpu.vector import LINE, add_outer_product, clear, prefetch, widened
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK

L1_SHARE = 2**14  # bytes: keys and values of two steps take four times as much, and an L1 cache has 32 to 64 kB


def at_once(room: int, of_each: int, choices: tuple[int, ...]) -> int:
    """The first of the choices that needs no more than `room` registers, `of_each` for one; the last if none does."""
    return next((n for n in choices if n * of_each <= room), choices[-1])


def sums_at_once(level: Level, shape: RollingAttention) -> int:
    """Vectors of sums that stay in registers; there are fewer where a loop prefetches."""
    if shape.tokens == 1:
        return sums_beside_prefetches(level)
    return level.tile.rows * level.tile.columns // level.lanes


def fetching(shape: RollingAttention, width: int, dtype: str, turns: int):
    """Inline `fetch(numbers, column, turn)`: prefetch what the next step will read of keys or of values.

    `column` is where this step begins, whose columns of `width` numbers are read in `turns` turns. Nothing is fetched
    if a step does not fit in the L1 cache beside the next, and for chunks, whose tiles read the same columns by turns.
    """
    line, each = LINE // ITEMSIZE[dtype], WIDTH * width // turns

    @T.inline
    def fetch(numbers, column, turn):
        if shape.tokens == 1 and WIDTH * width * ITEMSIZE[dtype] <= L1_SHARE:
            for i in T.unroll(max(each // line, 1)):
                prefetch(numbers, (column + WIDTH) * width + turn * each + i * line)

    return fetch


def float_key_product(level: Level, shape: RollingAttention, R: int):
    """Inline `score(queries, tile, keys, column, blocks, scores)`: scores (R, WIDTH) = queries times keys.

    These are tile `tile` of the queries, R rows, and `blocks` whole blocks of keys from `column` on. As many blocks are
    multiplied together as registers hold sums of; scores past the last block are undefined.
    """
    D, lanes = shape.head_dim, fitting_lanes(level, RING_BLOCK)
    parts = RING_BLOCK // lanes
    together = at_once(sums_at_once(level, shape), R * parts, (4, 2, 1))
    fetch = fetching(shape, D, shape.element_dtype, D * WIDTH // (together * RING_BLOCK))

    @T.inline
    def score(queries, tile, keys, column, blocks, scores):
        for c in T.serial((blocks + together - 1) // together):
            sums = T.alloc_buffer((together * R * RING_BLOCK,), "float32")
            clear(sums, together * R * RING_BLOCK // lanes, lanes)
            for d in T.serial(D):
                fetch(keys.numbers, column, c * D + d)
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
    # vectors of a row
    parts = at_once(sums_at_once(level, shape), R, tuple(n for n in (8, 4, 2, 1) if D % (n * lanes) == 0))
    passes = D // (parts * lanes)
    fetch = fetching(shape, D, shape.element_dtype, passes * WIDTH)

    @T.inline
    def mix(scores, values, column, count, mixed, at, shrink):
        for c in T.serial(passes):
            sums = T.alloc_buffer((R * parts * lanes,), "float32")
            for r in T.unroll(R):
                for n in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        sums[(r * parts + n) * lanes + v] = mixed[at + r * D + (c * parts + n) * lanes + v] * shrink[r]
            for j in T.serial(count):
                fetch(values.numbers, column, c * WIDTH + j)
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
