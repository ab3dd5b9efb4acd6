"""Rolling attention: split qkv, rotate, write the new columns into the ring, attend over the ring.

No copy of the cache is made. The graph keeps its cache in order of position and shifts it left at each step; here the
key of position p is in column p mod L of its slot's ring for good, L being the ring's length, so a call writes one
column (a key and a value) for each of its tokens and moves none. All columns are written before any query attends. A
query at position p sees positions p - W + 1 .. p, and a ring holds as many more columns than the window W as a call
writes, less one, so no column that is still seen is overwritten (`ModelConfig.ring_lens`).
Worked example, W = 4, L = 5, two tokens at positions 6 and 7: columns 1 and 2 receive them, after which columns
0 1 2 3 4 hold positions 5 6 7 3 4. Query 6 sees 3 4 5 6, and query 7 sees 4 5 6 7.

The sums of a query have an order of their own: the ring is divided into `SPLITS` parts, whose borders depend on nothing
but the ring, each part is summed in steps of the same columns, and then the parts are added up. Columns that a query
does not see add exactly zero. So what a token attends to gives the same bits in every function: as one row of a step,
as one of a prompt's tokens, and whatever else the call or the ring holds.

Query heads that share a key head are processed together, so that each key is loaded once for all of them. The softmax
is a running one (Milakov and Gimelshein, 2018; Dao et al., 2022): keys arrive in steps, and the values mixed so far
are scaled down whenever a larger score appears. A step is two products, whose sums stay in registers: scores = q K^T
and out += shares V, where the shares are softmax weights. For the first product, keys are stored in blocks of 16
columns (`attention_products.py`), so that adjacent numbers belong to adjacent columns and no sum runs across the lanes
of a register.

Bytes per query: at least 2 * visible * n_kv_heads * head_dim * itemsize; operations:
4 * visible * n_heads * head_dim.
"""

from math import gcd
from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cache_numbers import Cache, declared, unused_parameters
from build.kernels.cpu.attention_step import HIDDEN, WIDTH, Columns, Queries, Softmax, attention_step, may_see
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.stored_columns import flat, keeper
from build.kernels.cpu.vector import exp
from build.kernels.parameters import without
from build.kernels.rotary import query_scale
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK

# Parts of a ring, which tasks share where a row has one token: enough to keep all threads busy where heads do not
# divide evenly.
SPLITS = 8
ROWS_AT_ONCE = 4  # rows whose columns are written by one thread sooner than several threads start


def rolling_attention(level: Level, shape: RollingAttention) -> PrimFunc:
    """Kernel from qkv, the rotary cosines and sines, positions, slots and both rings to the attention's output.

    Arguments: qkv (B, T, qkv_dim), cos and sin (B, 1, T, head_dim / 2), positions (B, T), the slot of each row (B,),
    key ring, value ring and, for int8 and int4, both rings of scales, then for int4 both of minima. All rings are
    updated in place. The output (B, T, n_heads * head_dim) is a new tensor, which comes before the rings in the
    results. Either B or T is 1. The tokens of a row have consecutive positions, and those of -1 may follow, which are
    neither written nor seen.
    """
    B, N, H, D = shape.rows, shape.tokens, shape.n_heads, shape.head_dim
    body, ring = (_steps if N == 1 else _chunk)(level, shape), declared(shape)

    @T.prim_func
    def kernel(
        qkv: T.Buffer((B, N, shape.qkv_dim), "float32"),
        cos: T.Buffer((B, 1, N, D // 2), "float32"),
        sin: T.Buffer((B, 1, N, D // 2), "float32"),
        positions: T.Buffer((B, N), "int64"),
        slots: T.Buffer((B,), "int64"),
        keys: T.Buffer(ring.numbers.shape, ring.numbers.dtype),
        values: T.Buffer(ring.numbers.shape, ring.numbers.dtype),
        key_scales: T.Buffer(ring.scales.shape, ring.scales.dtype),
        value_scales: T.Buffer(ring.scales.shape, ring.scales.dtype),
        key_minima: T.Buffer(ring.minima.shape, ring.minima.dtype),
        value_minima: T.Buffer(ring.minima.shape, ring.minima.dtype),
        out: T.Buffer((B, N, H * D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        body(
            qkv,
            cos,
            sin,
            positions,
            slots,
            flat(shape, Cache(keys, key_scales, key_minima)),
            flat(shape, Cache(values, value_scales, value_minima)),
            out,
        )

    return without(kernel, unused_parameters(shape))


def _tile_rows(level: Level, rows: int) -> int:
    """Query rows per tile: split as evenly as possible, and no more than the registers can hold."""
    tiles = -(-rows // level.tile.rows)
    return -(-rows // tiles)


def _parts(shape: RollingAttention) -> tuple[int, int]:
    """How many parts a ring is divided into, and the steps of each."""
    steps = -(-shape.ring_len // WIDTH)
    share = -(-steps // min(SPLITS, steps))
    return -(-steps // share), share


def _spread(count: int) -> int:
    """A stride that visits all of `count` places, so that any run of turns meets any run of places about equally often.

    It is the golden section of the count, or the next number without a common divisor (Knuth, TAOCP 3, 6.4).
    """
    return next(n for n in range(max(round(0.618 * count), 1), 2 * count + 1) if gcd(n, count) == 1)


def _steps(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for rows of one token."""
    B, H, KV, D, L = shape.rows, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    group = H // KV
    R = _tile_rows(level, group)
    tiles = -(-group // R)
    parts, _ = _parts(shape)
    rotate, write = _rotation(shape), _column_writer(shape)
    attend, clear, join = _part(level, shape, R), _cleared(R, D), _joined(level, shape, R)
    clear_query = _cleared_query(R, D)
    loop = T.parallel if B > ROWS_AT_ONCE else T.serial

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        queries = T.alloc_buffer((B * KV * tiles * D * R,), "float32")
        largest = T.alloc_buffer((B * KV * tiles * parts * R,), "float32")
        total = T.alloc_buffer((B * KV * tiles * parts * R,), "float32")
        mixed = T.alloc_buffer((B * KV * tiles * parts * R * D,), "float32")
        for b in loop(B):
            for h in T.serial(KV * tiles * R):
                if h % (tiles * R) < group:
                    rotate(
                        Angles(qkv, cos, sin, b, 0),
                        (h // (tiles * R) * group + h % (tiles * R)) * D,
                        Places(queries, (b * KV * tiles + h // R) * D * R + h % R, R),
                        query_scale(shape, T.Cast("int32", positions[b, 0])),
                    )
                else:
                    clear_query(queries, b * KV * tiles + h // R, h % R)
            write(Angles(qkv, cos, sin, b, 0), positions, slots, keys, values)
        for turn in T.parallel(B * KV * tiles * parts):
            # Only the first parts of a ring that is not full have work: they are spread over all turns.
            place = turn * _spread(B * KV * tiles * parts) % (B * KV * tiles * parts)
            task = place % (B * KV * tiles) * parts + place // (B * KV * tiles)
            b = task // (KV * tiles * parts)
            kv = task // (tiles * parts) % KV
            end = T.Cast("int32", positions[b, 0]) + 1  # number of positions that the ring holds or has held
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            for r in T.unroll(R):
                oldest[r] = T.max(end - shape.window, 0)
                newest[r] = end - 1
            clear(largest, total, mixed, task)
            attend(
                Queries(queries, task // parts * D * R),
                Columns(keys, values, (T.Cast("int32", slots[b]) * KV + kv) * L, end - end % L, end % L),
                task % parts,
                T.min(end, L),
                Softmax(oldest, newest, largest, total, mixed, task * R),
            )
        for row in T.serial(B * H):
            tile = row // group * tiles + row % group // R
            join(largest, total, mixed, tile * parts, parts, row % group % R, out, row * D)

    return body


def _chunk(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for several tokens of one slot."""
    N, H, KV, D, L = shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    group = H // KV
    R = _tile_rows(level, N * group)
    tiles = -(-(N * group) // R)
    parts, share = _parts(shape)
    rotate, write = _rotation(shape), _column_writer(shape)
    attend, clear, join = _part(level, shape, R), _cleared(R, D), _joined(level, shape, R)
    clear_query = _cleared_query(R, D)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        queries = T.alloc_buffer((KV * tiles * D * R,), "float32")
        count = T.alloc_buffer((1,), "int32")  # tokens before the padding
        count[0] = 0
        for i in T.serial(N):
            if positions[0, i] >= T.int64(0):
                count[0] = i + 1
        for i in T.parallel(N):
            if i < count[0]:
                for h in T.serial(H):
                    row = i * group + h % group
                    rotate(
                        Angles(qkv, cos, sin, 0, i),
                        h * D,
                        Places(queries, (h // group * tiles + row // R) * D * R + row % R, R),
                        query_scale(shape, T.Cast("int32", positions[0, i])),
                    )
                write(Angles(qkv, cos, sin, 0, i), positions, slots, keys, values)
        for i in T.serial(KV * R):
            row = count[0] * group + i % R
            if row // R == (count[0] * group - 1) // R:
                clear_query(queries, i // R * tiles + row // R, row % R)
        for task in T.parallel(KV * tiles):
            # Late tiles see more keys than early ones: they alternate, so that any run of tasks is balanced.
            folded = task % tiles
            tile = T.if_then_else(folded % 2 == 0, folded // 2, tiles - 1 - folded // 2)
            kv = task // tiles
            first = T.Cast("int32", positions[0, 0])
            last = T.min((tile * R + R - 1) // group, count[0] - 1)  # the tile's last token
            end = first + last + 1  # number of positions that its queries may see
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            largest = T.alloc_buffer((parts * R,), "float32")
            total = T.alloc_buffer((parts * R,), "float32")
            mixed = T.alloc_buffer((parts * R * D,), "float32")
            if tile * R // group < count[0]:
                for r in T.unroll(R):
                    newest[r] = T.min(first + (tile * R + r) // group, end - 1)
                    oldest[r] = T.max(newest[r] - (shape.window - 1), 0)
                used = T.min(end, L)
                used_parts = (used + share * WIDTH - 1) // (share * WIDTH)
                for part in T.serial(used_parts):
                    clear(largest, total, mixed, part)
                    attend(
                        Queries(queries, (kv * tiles + tile) * D * R),
                        Columns(keys, values, (T.Cast("int32", slots[0]) * KV + kv) * L, end - end % L, end % L),
                        part,
                        used,
                        Softmax(oldest, newest, largest, total, mixed, part * R),
                    )
                for r in T.serial(R):
                    row = tile * R + r
                    if row < N * group:
                        join(
                            largest,
                            total,
                            mixed,
                            0,
                            used_parts,
                            r,
                            out,
                            row // group * H * D + (kv * group + row % group) * D,
                        )
            else:
                for r in T.serial(R):
                    row = tile * R + r
                    if row < N * group:
                        for d in T.serial(D):  # what follows must be finite, though nothing reads it in the end
                            out[0, row // group, (kv * group + row % group) * D + d] = T.float32(0)

    return body


def _part(level: Level, shape: RollingAttention, R: int):
    """Inline `attend(queries, columns, part, used, softmax)`: attend over one part of the ring for a tile of R rows.

    Only the first `used` columns of the ring have ever been written.
    """
    _, share = _parts(shape)
    attend_step, sees = attention_step(level, shape, R), may_see(shape, R)

    @T.inline
    def attend(queries, columns, part, used, softmax):
        for step in T.serial(share):
            column = (part * share + step) * WIDTH
            if column < used:
                count = T.min(WIDTH, used - column)
                if sees(columns, column, count, softmax):
                    attend_step(queries, columns, column, count, softmax)

    return attend


def _cleared_query(R: int, D: int):
    """Inline `clear_query(queries, tile, r)`: fill row r of a tile that has fewer queries than rows.

    What lies in memory may be subnormal numbers, with which the whole tile takes several times as long.
    """

    @T.inline
    def clear_query(queries, tile, r):
        for d in T.serial(D):
            queries[(tile * D + d) * R + r] = T.float32(0)

    return clear_query


def _cleared(R: int, D: int):
    """Inline `clear(largest, total, mixed, i)`: the state of R rows that have seen nothing yet, as the i-th."""

    @T.inline
    def clear(largest, total, mixed, i):
        for r in T.unroll(R):
            largest[i * R + r] = T.float32(HIDDEN)
            total[i * R + r] = T.float32(0)
        for d in T.serial(R * D):
            mixed[i * R * D + d] = T.float32(0)

    return clear


def _joined(level: Level, shape: RollingAttention, R: int):
    """Inline `join(largest, total, mixed, first, parts, r, out, at)`: set a head's output to the sum of its parts.

    They are the states of row r that begin with number `first`; the output's head_dim numbers begin at `at`.
    """
    D, lanes = shape.head_dim, fitting_lanes(level, shape.head_dim)

    @T.inline
    def join(largest, total, mixed, first, parts, r, out, at):
        flat_out = T.decl_buffer((shape.rows * shape.tokens * shape.n_heads * D,), "float32", data=out.data)
        joined = T.alloc_buffer((2,), "float32")  # the largest score, then the sum of all totals
        joined[0] = T.float32(HIDDEN)
        joined[1] = T.float32(0)
        for s in T.serial(parts):
            joined[0] = T.max(joined[0], largest[(first + s) * R + r])
        for s in T.serial(parts):
            largest[(first + s) * R + r] = exp(largest[(first + s) * R + r] - joined[0])
            joined[1] = joined[1] + largest[(first + s) * R + r] * total[(first + s) * R + r]
        joined[1] = T.float32(1) / T.max(joined[1], T.float32(1e-30))
        for c in T.serial(D // lanes):
            sums = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                sums[v] = T.float32(0)
            for s in T.serial(parts):
                for v in T.vectorized(lanes):
                    sums[v] = (
                        sums[v]
                        + largest[(first + s) * R + r] * joined[1] * mixed[((first + s) * R + r) * D + c * lanes + v]
                    )
            for v in T.vectorized(lanes):
                flat_out[at + c * lanes + v] = sums[v]

    return join


def _column_writer(shape: RollingAttention):
    """Inline `write(token, positions, slots, keys, values)`: store a token's keys and values in its slot's ring."""
    H, KV, D, L = shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    rotate, keep = _rotation(shape), keeper(shape)

    @T.inline
    def write(token, positions, slots, keys, values):
        position = T.Cast("int32", positions[token.b, token.i])
        if position >= 0:
            fresh = T.alloc_buffer((D,), "float32")
            ring = T.Cast("int32", slots[token.b]) * KV
            for h in T.serial(KV):
                rotate(token, (H + h) * D, Places(fresh, 0, 1), T.float32(1))
                keep(fresh, keys, (ring + h) * L + position % L, RING_BLOCK)
                for d in T.serial(D):
                    fresh[d] = token.qkv[token.b, token.i, (H + KV + h) * D + d]
                keep(fresh, values, (ring + h) * L + position % L, 1)

    return write


class Angles(NamedTuple):
    """One token of one sequence in the batch, as the kernel receives it."""

    qkv: Any
    cos: Any
    sin: Any
    b: Any
    i: Any


class Places(NamedTuple):
    """Every `stride`-th number of a buffer, starting at `start`."""

    numbers: Any
    start: Any
    stride: int


def _rotation(shape: RollingAttention):
    """Inline `rotate(token, head, to, factor)`: rotate a head of a token, multiply it by `factor` and store it at `to`.

    The head begins at qkv[..., head].
    """
    half = shape.head_dim // 2

    @T.inline
    def rotate(token, head, to, factor):
        for d in T.serial(half):
            to.numbers[to.start + d * to.stride] = T.Cast(
                to.numbers.dtype,
                factor
                * (
                    token.qkv[token.b, token.i, head + d] * token.cos[token.b, 0, token.i, d]
                    - token.qkv[token.b, token.i, head + half + d] * token.sin[token.b, 0, token.i, d]
                ),
            )
            to.numbers[to.start + (half + d) * to.stride] = T.Cast(
                to.numbers.dtype,
                factor
                * (
                    token.qkv[token.b, token.i, head + half + d] * token.cos[token.b, 0, token.i, d]
                    + token.qkv[token.b, token.i, head + d] * token.sin[token.b, 0, token.i, d]
                ),
            )

    return rotate
