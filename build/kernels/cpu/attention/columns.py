"""Which columns of a ring a tile of queries sees, and the state of the softmax over those that it has seen."""

from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK

WIDTH = 4 * RING_BLOCK  # columns of a step: 64 keys and 64 values of 64 numbers take 32 kB
HIDDEN = -1e30  # score of a column that a query does not see


class Columns(NamedTuple):
    """One head's columns in flat buffers of several heads, laid out as in `stored_columns.py`.

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


def sees_all(shape: RollingAttention, R: int):
    """Function `sees(columns, column, count, softmax)`: whether all rows see all columns; False at the cut."""

    def sees(columns, column, count, softmax):
        first = position_of(shape, columns, column)
        together = T.Or(column >= columns.cut, column + count <= columns.cut)
        return T.And(together, T.And(first >= softmax.oldest[R - 1], first + count - 1 <= softmax.newest[0]))

    return sees
