"""What tokens bring to attention: queries, rotated and ready for the products, and columns, which are stored.

Against keys that are whole numbers, a query is rounded to whole numbers of 16 bits, relative to its largest.
"""

from operator import add
from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cpu.attention.stored_columns import keeper
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import reduced
from build.kernels.rotary import query_scale
from build.kernels.shapes import RollingAttention
from export.static_model.constants import SMALLEST_PEAK
from runtime.artifact.caches import GROUP
from runtime.artifact.schemes import ROUNDING_LEVELS


def query_levels(head_dim: int) -> float:
    """How many levels a query is rounded to: those of 16 bits, or as many as keep its sum with any key below 2^31."""
    return min(ROUNDING_LEVELS["int16"], (2**31 - 1) // (128 * head_dim))


class Token(NamedTuple):
    """One token of one sequence in the batch, as the kernel receives it."""

    qkv: Any
    cos: Any
    sin: Any
    positions: Any
    b: Any
    i: Any


class Queries(NamedTuple):
    """Rotated and scaled queries: `numbers` is (rows, head_dim).

    Of whole numbers, row r stands for scales[r] times them; sums[r * groups + g] is the sum of those in group g, where
    the cache has groups.
    """

    numbers: Any
    scales: Any
    sums: Any


class QuerySizes(NamedTuple):
    """What `Queries` take: sizes of the three buffers, and the dtype of the numbers."""

    numbers: int
    scales: int
    sums: int
    dtype: str


def query_sizes(shape: RollingAttention, rows: int) -> QuerySizes:
    """Buffers for so many queries; those that the cache has no use for have one element."""
    rounded, group = shape.stored.scales is not None, shape.stored.group
    return QuerySizes(
        rows * shape.head_dim,
        rows if rounded else 1,
        rows * (shape.head_dim // group) if group else 1,
        "int16" if rounded else "float32",
    )


def query_writer(level: Level, shape: RollingAttention):
    """Inline `write(token, h, queries, row)`: rotate, scale and store head h of a token as a row of the queries."""
    D, groups, grouped = shape.head_dim, shape.head_dim // GROUP, shape.stored.group is not None
    lanes = fitting_lanes(level, GROUP if shape.stored.group else D)
    rotate, levels = _rotation(level, shape), query_levels(D)

    def factor(token):
        return query_scale(shape, T.Cast("int32", token.positions[token.b, token.i]))

    @T.inline
    def write_as_it_is(token, h, queries, row):
        rotate(token, h * D, queries.numbers, row * D, factor(token))

    @T.inline
    def write_rounded(token, h, queries, row):
        fresh = T.alloc_buffer((D,), "float32")
        largest = T.alloc_buffer((lanes,), "float32")
        rotate(token, h * D, fresh, 0, factor(token))
        for v in T.vectorized(lanes):
            largest[v] = T.float32(SMALLEST_PEAK)
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                largest[v] = T.max(largest[v], T.abs(fresh[c * lanes + v]))
        largest[0] = reduced(largest, lanes, T.max)
        queries.scales[row] = largest[0] / T.float32(levels)
        largest[0] = T.float32(levels) / largest[0]
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                fresh[c * lanes + v] = T.nearbyint(fresh[c * lanes + v] * largest[0])
                queries.numbers[row * D + c * lanes + v] = T.Cast("int16", fresh[c * lanes + v])
        if grouped:
            for g in T.serial(groups):
                total = T.alloc_buffer((lanes,), "float32")  # of whole numbers below 2^24, hence exact
                for v in T.vectorized(lanes):
                    total[v] = T.float32(0)
                for c in T.unroll(GROUP // lanes):
                    for v in T.vectorized(lanes):
                        total[v] = total[v] + fresh[g * GROUP + c * lanes + v]
                queries.sums[row * groups + g] = reduced(total, lanes, add)

    return write_rounded if shape.stored.scales else write_as_it_is


def query_clearer(level: Level, shape: RollingAttention):
    """Inline `clear(queries, row)`: fill a row of a tile that has fewer queries than rows.

    What lies in memory may be subnormal numbers, with which the whole tile takes several times as long.
    """
    D, groups, grouped = shape.head_dim, shape.head_dim // GROUP, shape.stored.group is not None
    lanes = fitting_lanes(level, D)
    dtype, rounded = query_sizes(shape, 1).dtype, shape.stored.scales is not None

    @T.inline
    def clear(queries, row):
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                queries.numbers[row * D + c * lanes + v] = T.Cast(dtype, 0)
        if rounded:
            queries.scales[row] = T.float32(0)
        if grouped:
            for g in T.serial(groups):
                queries.sums[row * groups + g] = T.float32(0)

    return clear


def column_writer(level: Level, shape: RollingAttention):
    """Inline `write(token, slots, keys, values)`: store a token's keys and values in its slot's ring."""
    H, KV, D, L = shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    lanes = fitting_lanes(level, D)
    rotate = _rotation(level, shape)
    keep_key, keep_value = keeper(level, shape, "keys"), keeper(level, shape, "values")

    @T.inline
    def write(token, slots, keys, values):
        position = T.Cast("int32", token.positions[token.b, token.i])
        if position >= 0:
            fresh = T.alloc_buffer((D,), "float32")
            ring = T.Cast("int32", slots[token.b]) * KV
            for h in T.serial(KV):
                rotate(token, (H + h) * D, fresh, 0, T.float32(1))
                keep_key(fresh, keys, (ring + h) * L + position % L)
                for c in T.serial(D // lanes):
                    for v in T.vectorized(lanes):
                        fresh[c * lanes + v] = token.qkv[token.b, token.i, (H + KV + h) * D + c * lanes + v]
                keep_value(fresh, values, (ring + h) * L + position % L)

    return write


def _rotation(level: Level, shape: RollingAttention):
    """Inline `rotate(token, head, to, at, factor)`: rotate a head of a token and multiply it by `factor`.

    The head begins at qkv[..., head], and its head_dim numbers are written to to[at :].
    """
    half = shape.head_dim // 2
    lanes = fitting_lanes(level, half)

    @T.inline
    def rotate(token, head, to, at, factor):
        for c in T.serial(half // lanes):
            for v in T.vectorized(lanes):
                to[at + c * lanes + v] = factor * (
                    token.qkv[token.b, token.i, head + c * lanes + v] * token.cos[token.b, 0, token.i, c * lanes + v]
                    - token.qkv[token.b, token.i, head + half + c * lanes + v]
                    * token.sin[token.b, 0, token.i, c * lanes + v]
                )
            for v in T.vectorized(lanes):
                to[at + half + c * lanes + v] = factor * (
                    token.qkv[token.b, token.i, head + half + c * lanes + v]
                    * token.cos[token.b, 0, token.i, c * lanes + v]
                    + token.qkv[token.b, token.i, head + c * lanes + v] * token.sin[token.b, 0, token.i, c * lanes + v]
                )

    return rotate
