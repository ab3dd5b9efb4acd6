"""Rolling attention: split qkv, rotate, attend over past and new columns, write the new columns into the ring.

No copy of the cache is made. The graph keeps its cache in order of position and shifts it left at each step; here the
key of position p stays in slot p mod W for good, so a step writes T columns (a key and a value each) and moves none.
Worked example, W = 4, before position 6: slots 0 1 2 3 hold positions 4 5 2 3.

Query heads that share a key head are processed together, so that each key is loaded once for all of them. The softmax
is a running one (Milakov and Gimelshein, 2018; Dao et al., 2022): keys arrive in steps, and the values mixed so far
are scaled down whenever a larger score appears. A step is two products, whose sums stay in registers: scores = q K^T
and out += shares V, where the shares are softmax weights. For the first product, keys are stored in blocks of 16 slots
(`attention_products.py`), so that adjacent numbers belong to adjacent slots and no sum runs across the lanes of a
register.

One token writes its column first and then sees only the ring; its steps are shared among tasks whose results are
joined at the end. Several tokens attend over the ring as it was and over the new columns, and write last, because the
new columns replace positions that the first queries still see.

Bytes per query: at least 2 * visible * n_kv_heads * head_dim * itemsize; operations:
4 * visible * n_heads * head_dim.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cache_numbers import Cache, declared, unused_parameters
from build.kernels.cpu.attention_step import HIDDEN, STEP, Columns, Queries, Softmax, attention_step
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.stored_columns import copier, flat, keeper, new_columns
from build.kernels.cpu.vector import exp
from build.kernels.parameters import without
from build.kernels.rotary import query_scale
from build.kernels.shapes import RING_BLOCK, RollingAttention, ring_block

# Upper limit of tasks that share one token's keys: enough to keep all threads busy where heads do not divide evenly.
SPLITS = 8


def rolling_attention(level: Level, shape: RollingAttention) -> PrimFunc:
    """Kernel from qkv, the rotary cosines and sines, positions and both rings to the attention's output.

    Arguments: qkv (B, T, qkv_dim), cos and sin (B, 1, T, head_dim / 2), positions (B, T), key ring, value ring and,
    for int8 and int4, both rings of scales, then for int4 both of minima. All rings are updated in place. The output
    (B, T, n_heads * head_dim) is a new tensor, which comes before the rings in the results. Positions are consecutive
    in each sequence; negative ones are padding, which is neither written nor seen.
    """
    B, N, H, D = shape.batch, shape.tokens, shape.n_heads, shape.head_dim
    body, ring = (_one_token if N == 1 else _chunk)(level, shape), declared(shape)

    @T.prim_func
    def kernel(
        qkv: T.Buffer((B, N, shape.qkv_dim), "float32"),
        cos: T.Buffer((B, 1, N, D // 2), "float32"),
        sin: T.Buffer((B, 1, N, D // 2), "float32"),
        positions: T.Buffer((B, N), "int64"),
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
            flat(shape, Cache(keys, key_scales, key_minima)),
            flat(shape, Cache(values, value_scales, value_minima)),
            out,
        )

    return without(kernel, unused_parameters(shape))


def _tile_rows(level: Level, rows: int) -> int:
    """Query rows per tile: split as evenly as possible, and no more than the registers can hold."""
    tiles = -(-rows // level.tile.rows)
    return -(-rows // tiles)


def _one_token(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for T = 1."""
    B, H, KV, D, W = shape.batch, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.cache_len
    group, block = H // KV, ring_block(W)
    R = _tile_rows(level, group)
    tiles = -(-group // R)
    steps = -(-W // (STEP * block))
    splits = min(SPLITS, steps)
    lanes = fitting_lanes(level, D)
    rotate = _rotation(shape)
    attend = attention_step(level, shape, R, block)
    keep = keeper(shape)

    @T.inline
    def body(qkv, cos, sin, positions, keys, values, out):
        queries = T.alloc_buffer((B * KV * tiles * D * R,), "float32")
        largest = T.alloc_buffer((B * KV * tiles * splits * R,), "float32")
        total = T.alloc_buffer((B * KV * tiles * splits * R,), "float32")
        mixed = T.alloc_buffer((B * KV * tiles * splits * R * D,), "float32")
        for b in T.serial(B):
            position = T.Cast("int32", positions[b, 0])
            slot = T.max(position, 0) % W
            scale = query_scale(shape, position)
            fresh = T.alloc_buffer((D,), "float32")
            for h in T.serial(KV * tiles * R):
                if h % (tiles * R) < group:
                    head = (h // (tiles * R) * group + h % (tiles * R)) * D
                    rotate(
                        Angles(qkv, cos, sin, b, 0),
                        head,
                        Places(queries, (b * KV * tiles + h // R) * D * R + h % R, R),
                        scale,
                    )
            if position >= 0:
                for h in T.serial(KV):
                    rotate(Angles(qkv, cos, sin, b, 0), (H + h) * D, Places(fresh, 0, 1), T.float32(1))
                    keep(fresh, keys, (b * KV + h) * W + slot, block)
                    for d in T.serial(D):
                        fresh[d] = qkv[b, 0, (H + KV + h) * D + d]
                    keep(fresh, values, (b * KV + h) * W + slot, 1)
        for task in T.parallel(B * KV * tiles * splits):
            b = task // (KV * tiles * splits)
            head = task // (tiles * splits)  # key head, counted over all sequences
            end = T.Cast("int32", positions[b, 0]) + 1  # number of positions that the ring holds or has held
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            used = T.max(T.min(end, W), 0)
            share = (((used + STEP * block - 1) // (STEP * block)) + splits - 1) // splits
            first = task % splits * share
            for r in T.unroll(R):
                oldest[r] = T.max(end - W, 0)
                newest[r] = end - 1
                largest[task * R + r] = T.float32(HIDDEN)
                total[task * R + r] = T.float32(0)
            for d in T.serial(R * D):
                mixed[task * R * D + d] = T.float32(0)
            for step in T.serial(share):
                column = (first + step) * STEP * block
                if column < used:
                    attend(
                        Queries(queries, task // splits * D * R),
                        Columns(keys, values, head * W, end - end % W, end % W),
                        column,
                        T.min(STEP * block, used - column),
                        Softmax(oldest, newest, largest, total, mixed, task * R),
                    )
        for row in T.serial(B * H):  # join the splits
            kv = row // group
            tile = (kv * tiles + row % group // R) * splits
            r = row % group % R
            joined = T.alloc_buffer((2,), "float32")  # the largest score, then the sum of all totals
            joined[0] = T.float32(HIDDEN)
            joined[1] = T.float32(0)
            for s in T.serial(splits):
                joined[0] = T.max(joined[0], largest[(tile + s) * R + r])
            for s in T.serial(splits):
                largest[(tile + s) * R + r] = exp(largest[(tile + s) * R + r] - joined[0])
                joined[1] = joined[1] + largest[(tile + s) * R + r] * total[(tile + s) * R + r]
            joined[1] = T.float32(1) / T.max(joined[1], T.float32(1e-30))
            for c in T.serial(D // lanes):
                sums = T.alloc_buffer((lanes,), "float32")
                for v in T.vectorized(lanes):
                    sums[v] = T.float32(0)
                for s in T.serial(splits):
                    for v in T.vectorized(lanes):
                        sums[v] = (
                            sums[v]
                            + largest[(tile + s) * R + r] * joined[1] * mixed[((tile + s) * R + r) * D + c * lanes + v]
                        )
                for v in T.vectorized(lanes):
                    out[row // H, 0, row % H * D + c * lanes + v] = sums[v]

    return body


def _chunk(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for T > 1."""
    B, N, H, KV, D, W = shape.batch, shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.cache_len
    group, block = H // KV, ring_block(W)
    R = _tile_rows(level, N * group)
    tiles = -(-(N * group) // R)
    columns = -(-N // RING_BLOCK) * RING_BLOCK  # of the new keys and values, rounded up to whole blocks
    rotate = _rotation(shape)
    attend_ring, attend_new = attention_step(level, shape, R, block), attention_step(level, shape, R, RING_BLOCK)
    keep, copy = keeper(shape), copier(shape)

    @T.inline
    def attend(qkv, cos, sin, positions, keys, values, new_keys, new_values, out):
        queries = T.alloc_buffer((B * KV * tiles * D * R,), "float32")
        for token in T.parallel(B * columns):
            b = token // columns
            i = token % columns
            fresh = T.alloc_buffer((D,), "float32")
            if i < N:
                scale = query_scale(shape, T.Cast("int32", positions[b, i]))
                for h in T.serial(H):
                    row = i * group + h % group
                    rotate(
                        Angles(qkv, cos, sin, b, i),
                        h * D,
                        Places(queries, ((b * KV + h // group) * tiles + row // R) * D * R + row % R, R),
                        scale,
                    )
                for h in T.serial(KV):
                    rotate(Angles(qkv, cos, sin, b, i), (H + h) * D, Places(fresh, 0, 1), T.float32(1))
                    keep(fresh, new_keys, (b * KV + h) * columns + i, RING_BLOCK)
            for h in T.serial(KV):
                if i < N and positions[b, T.min(i, N - 1)] >= T.int64(0):
                    for d in T.serial(D):
                        fresh[d] = qkv[b, T.min(i, N - 1), (H + KV + h) * D + d]
                else:
                    for d in T.serial(D):  # unseen values are multiplied by zero, so they must be finite
                        fresh[d] = T.float32(0)
                keep(fresh, new_values, (b * KV + h) * columns + i, 1)
        for task in T.parallel(B * KV * tiles):
            # Late tiles see more keys than early ones: they alternate, so that any run of tasks is balanced.
            folded = task % tiles
            tile = T.if_then_else(folded % 2 == 0, folded // 2, tiles - 1 - folded // 2)
            head = task // tiles
            b = head // KV
            first = T.Cast("int32", positions[b, 0])  # first position of the chunk
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            largest = T.alloc_buffer((R,), "float32")
            total = T.alloc_buffer((R,), "float32")
            mixed = T.alloc_buffer((R * D,), "float32")
            used = T.max(T.min(first, W), 0)
            last = T.min((tile * R + R - 1) // group, N - 1)  # the tile's last token
            for r in T.unroll(R):
                newest[r] = first + (tile * R + r) // group
                oldest[r] = T.max(newest[r] - (W - 1), 0)
                largest[r] = T.float32(HIDDEN)
                total[r] = T.float32(0)
            for d in T.serial(R * D):
                mixed[d] = T.float32(0)
            for step in T.serial((used + STEP * block - 1) // (STEP * block)):
                attend_ring(
                    Queries(queries, (head * tiles + tile) * D * R),
                    Columns(keys, values, head * W, first - first % W, first % W),
                    step * STEP * block,
                    T.min(STEP * block, used - step * STEP * block),
                    Softmax(oldest, newest, largest, total, mixed, 0),
                )
            for step in T.serial(last // (STEP * RING_BLOCK) + 1):
                if (step + 1) * STEP * RING_BLOCK > oldest[0] - first:
                    attend_new(
                        Queries(queries, (head * tiles + tile) * D * R),
                        Columns(new_keys, new_values, head * columns, first, columns),
                        step * STEP * RING_BLOCK,
                        T.min(STEP * RING_BLOCK, columns - step * STEP * RING_BLOCK),
                        Softmax(oldest, newest, largest, total, mixed, 0),
                    )
            for r in T.serial(R):
                row = tile * R + r
                if row < N * group:
                    for d in T.serial(D):
                        out[b, row // group, (head % KV * group + row % group) * D + d] = mixed[r * D + d] / T.max(
                            total[r], T.float32(1e-30)
                        )
        for head in T.parallel(B * KV):
            for i in T.serial(N):
                position = T.Cast("int32", positions[head // KV, i])
                if position >= 0 and i >= N - W:  # a chunk longer than the ring keeps only its last W columns
                    slot = head * W + position % W
                    copy(new_keys, head * columns + i, RING_BLOCK, keys, slot, block)
                    copy(new_values, head * columns + i, 1, values, slot, 1)

    @T.inline
    def body(qkv, cos, sin, positions, keys, values, out):
        attend(
            qkv,
            cos,
            sin,
            positions,
            keys,
            values,
            new_columns(shape, columns),
            new_columns(shape, columns),
            out,
        )

    return body


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
