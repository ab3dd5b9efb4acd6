"""One step of attention over some columns with a running softmax: the building block of all CPU attention kernels."""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import add_outer_product, clear, exp, widened
from build.kernels.shapes import RollingAttention

STEP = 4  # blocks per step: 64 keys and 64 values of 64 numbers take 32 kB
HIDDEN = -1e30  # score of a column that a query does not see


class Queries(NamedTuple):
    """A tile of R query rows: numbers[start :] is (head_dim, R)."""

    numbers: Any
    start: Any


class Columns(NamedTuple):
    """One head's columns: keys[start :] is (columns / block, head_dim, block), values[start :] is (columns, head_dim).

    Column c holds position base + c if c < cut, and base + c - W otherwise.
    """

    keys: Any
    values: Any
    start: Any
    base: Any
    cut: Any
    key_scales: Any  # for int8: one per column, from scale_start on; otherwise None
    value_scales: Any
    scale_start: Any


class Softmax(NamedTuple):
    """State of R rows so far: largest score and total of shares at [at + r], mixed values at [(at + r) * head_dim :].

    Row r sees positions oldest[r] .. newest[r]; neither bound decreases from one row to the next.
    """

    oldest: Any
    newest: Any
    largest: Any
    total: Any
    mixed: Any
    at: Any


def attention_step(level: Level, shape: RollingAttention, R: int, block: int):
    """Inline `attend(queries, columns, column, count, softmax)`: attend over `count` columns for one tile of R rows.

    The columns begin at `column`, and there are at most STEP * `block` of them. Keys are read in whole blocks, but no
    value past the last column is read.
    """
    D, W, scaled = shape.head_dim, shape.cache_len, shape.cache_dtype == "int8"
    lanes = fitting_lanes(level, block)
    parts = block // lanes
    width = STEP * block
    d_lanes = fitting_lanes(level, D)
    d_parts = next(n for n in (2, 1) if D % (n * d_lanes) == 0)
    d_columns = d_lanes * d_parts

    @T.inline
    def score(queries, columns, column, scores, c):
        """Compute scores[:, c : c + block] from the block of keys that begins at `column`."""
        keys, start = columns.keys, columns.start + column * D
        sums = T.alloc_buffer((R * block,), "float32")
        clear(sums, R * parts, lanes)
        for d in T.serial(D):
            add_outer_product(
                sums,
                0,
                R,
                block,
                lanes,
                lambda r: queries.numbers[queries.start + d * R + r],
                lambda key: widened(keys[start + d * block + key]),
            )
        for r in T.unroll(R):
            for n in T.unroll(parts):
                for v in T.vectorized(lanes):
                    if scaled:
                        scores[r * width + c + n * lanes + v] = (
                            sums[(r * parts + n) * lanes + v]
                            * columns.key_scales[columns.scale_start + column + n * lanes + v]
                        )
                    else:
                        scores[r * width + c + n * lanes + v] = sums[(r * parts + n) * lanes + v]

    def position(columns, c):
        return columns.base + c - T.Select(c >= columns.cut, T.int32(W), T.int32(0))

    def seen(columns, c, low, high):
        return T.And(position(columns, c) >= low, position(columns, c) <= high)

    def sees_all(columns, column, count, low, high):
        """Whether positions low .. high cover all `count` columns; False if these straddle the cut."""
        first = position(columns, column)
        return T.And(
            T.Or(column >= columns.cut, column + count <= columns.cut), T.And(first >= low, first + count - 1 <= high)
        )

    @T.inline
    def soften(scores, r, columns, column, count, softmax, shrink, hides):
        """Turn row r's scores into exp(score - largest so far), or into zero where hidden, and set shrink[r].

        The values mixed so far must then be multiplied by shrink[r]. `hides`, a Python bool, says whether there may
        be columns that the row does not see.
        """
        peak = T.alloc_buffer((lanes,), "float32")
        top = T.alloc_buffer((1,), "float32")
        for v in T.vectorized(lanes):
            peak[v] = T.float32(HIDDEN)
        for n in T.serial(count // lanes):
            if hides:
                for v in T.vectorized(lanes):
                    scores[r * width + n * lanes + v] = T.Select(
                        seen(columns, column + n * lanes + v, softmax.oldest[r], softmax.newest[r]),
                        scores[r * width + n * lanes + v],
                        T.float32(HIDDEN),
                    )
            for v in T.vectorized(lanes):
                peak[v] = T.max(peak[v], scores[r * width + n * lanes + v])
        top[0] = softmax.largest[softmax.at + r]
        for v in T.unroll(lanes):
            top[0] = T.max(top[0], peak[v])
        shrink[r] = exp(softmax.largest[softmax.at + r] - top[0])
        softmax.largest[softmax.at + r] = top[0]
        for v in T.vectorized(lanes):
            peak[v] = T.float32(0)
        for n in T.serial(count // lanes):
            for v in T.vectorized(lanes):
                if hides:
                    scores[r * width + n * lanes + v] = T.Select(
                        scores[r * width + n * lanes + v] > T.float32(HIDDEN),
                        exp(scores[r * width + n * lanes + v] - top[0]),
                        T.float32(0),
                    )
                else:
                    scores[r * width + n * lanes + v] = exp(scores[r * width + n * lanes + v] - top[0])
            for v in T.vectorized(lanes):
                peak[v] = peak[v] + scores[r * width + n * lanes + v]
            if scaled:  # apply the scale of the value that the share will be multiplied by
                for v in T.vectorized(lanes):
                    scores[r * width + n * lanes + v] = (
                        scores[r * width + n * lanes + v]
                        * columns.value_scales[columns.scale_start + column + n * lanes + v]
                    )
        softmax.total[softmax.at + r] = softmax.total[softmax.at + r] * shrink[r]
        for v in T.unroll(lanes):
            softmax.total[softmax.at + r] = softmax.total[softmax.at + r] + peak[v]

    @T.inline
    def mix(scores, values, start, count, shrink, softmax):
        """Compute mixed = mixed * shrink + scores[:, : count] values[start :]."""
        for c in T.serial(D // d_columns):
            sums = T.alloc_buffer((R * d_columns,), "float32")
            for r in T.unroll(R):
                for n in T.unroll(d_parts):
                    for v in T.vectorized(d_lanes):
                        sums[(r * d_parts + n) * d_lanes + v] = (
                            softmax.mixed[(softmax.at + r) * D + c * d_columns + n * d_lanes + v] * shrink[r]
                        )
            for j in T.serial(count):
                add_outer_product(
                    sums,
                    0,
                    R,
                    d_columns,
                    d_lanes,
                    lambda r: scores[r * width + j],
                    lambda d: widened(values[start + j * D + c * d_columns + d]),
                )
            for r in T.unroll(R):
                for n in T.unroll(d_parts):
                    for v in T.vectorized(d_lanes):
                        softmax.mixed[(softmax.at + r) * D + c * d_columns + n * d_lanes + v] = sums[
                            (r * d_parts + n) * d_lanes + v
                        ]

    @T.inline
    def attend(queries, columns, column, count, softmax):
        scores = T.alloc_buffer((R * width,), "float32")
        shrink = T.alloc_buffer((R,), "float32")
        blocks = (count + block - 1) // block
        for c in T.serial(blocks):
            score(queries, columns, column + c * block, scores, c * block)
        if sees_all(columns, column, blocks * block, softmax.oldest[R - 1], softmax.newest[0]):
            for r in T.serial(R):
                soften(scores, r, columns, column, blocks * block, softmax, shrink, False)
        else:
            for r in T.serial(R):
                soften(scores, r, columns, column, blocks * block, softmax, shrink, True)
        mix(scores, columns.values, columns.start + column * D, count, shrink, softmax)

    return attend
