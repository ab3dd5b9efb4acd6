"""One step of attention over some columns with a running softmax: the building block of all CPU attention kernels."""

from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache
from build.kernels.cpu.attention_products import key_product, value_product
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import clear, exp
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK

WIDTH = 4 * RING_BLOCK  # columns of a step: 64 keys and 64 values of 64 numbers take 32 kB
HIDDEN = -1e30  # score of a column that a query does not see


class Queries(NamedTuple):
    """A tile of R query rows: numbers[start :] is (head_dim, R)."""

    numbers: Any
    start: Any


class Columns(NamedTuple):
    """One head's columns in flat buffers of several heads, laid out as in `attention_products.py`.

    Column c is column `start` + c of the buffers. It holds position base + c if c < cut, and base + c - L otherwise, L
    being the ring's length, or a later one that no query of the tile sees, nor the position that it stands for.
    """

    keys: Cache
    values: Cache
    start: Any
    base: Any
    cut: Any


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


def position_of(shape: RollingAttention, columns: Columns, c: Expr) -> Expr:
    """The position that column c stands for."""
    return columns.base + c - T.Select(c >= columns.cut, T.int32(shape.ring_len), T.int32(0))


def may_see(shape: RollingAttention, R: int):
    """Function `sees(columns, column, count, softmax)`: whether a row of the tile may see one of `count` columns."""

    def sees(columns, column, count, softmax):
        first = position_of(shape, columns, column)
        straddles = T.And(column < columns.cut, column + count > columns.cut)
        return T.Or(straddles, T.And(first + count - 1 >= softmax.oldest[0], first <= softmax.newest[R - 1]))

    return sees


def attention_step(level: Level, shape: RollingAttention, R: int):
    """Inline `attend(queries, columns, column, count, softmax)`: attend over `count` columns for one tile of R rows.

    The columns begin at `column`, and there are at most WIDTH of them. Keys are read in whole blocks, but no value past
    the last column is read.
    """
    D, block, width, scaled = shape.head_dim, RING_BLOCK, WIDTH, shape.cache_dtype == "int8"
    add_keys, mix = key_product(level, shape, R, block), value_product(level, shape, R, width)
    lanes = fitting_lanes(level, block)
    parts = block // lanes

    @T.inline
    def score(queries, columns, column, scores, c):
        """Compute scores[:, c : c + block] from the block of keys that begins at `column`."""
        sums = T.alloc_buffer((R * block,), "float32")
        clear(sums, R * parts, lanes)
        add_keys(sums, queries.numbers, queries.start, columns.keys, columns.start + column)
        for r in T.unroll(R):
            for n in T.unroll(parts):
                for v in T.vectorized(lanes):
                    if scaled:
                        scores[r * width + c + n * lanes + v] = (
                            sums[(r * parts + n) * lanes + v]
                            * columns.keys.scales[columns.start + column + n * lanes + v]
                        )
                    else:
                        scores[r * width + c + n * lanes + v] = sums[(r * parts + n) * lanes + v]

    def seen(columns, c, low, high):
        return T.And(position_of(shape, columns, c) >= low, position_of(shape, columns, c) <= high)

    def sees_all(columns, column, count, low, high):
        """Whether positions low .. high cover all `count` columns; False if these straddle the cut."""
        first = position_of(shape, columns, column)
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
                        * columns.values.scales[columns.start + column + n * lanes + v]
                    )
        softmax.total[softmax.at + r] = softmax.total[softmax.at + r] * shrink[r]
        for v in T.unroll(lanes):
            softmax.total[softmax.at + r] = softmax.total[softmax.at + r] + peak[v]

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
        mix(scores, columns.values, columns.start + column, count, softmax.mixed, softmax.at * D, shrink)

    return attend
