"""Rolling attention for rows of one token: three launches that read each visible key and value once for all heads.

The rings are those of `build/kernels/cuda/attention.py`. First, every row's new column is written, so that the ring of
its slot alone holds everything that it sees, other rows of that slot among it. Then each block takes a share of the
columns that one row sees of one key head, in tiles and in order of position: keys pass through shared memory, where
those of int8 and int4 caches are float32, and every query head of the group keeps a running maximum, a sum and mixed
values (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Last, the blocks' results are joined, each
scaled by its maximum. The split over columns (as in Flash-Decoding, Dao et al. 2023) is what gives a single sequence
enough blocks. The number of shares is the same for any number of rows, and their borders follow from a row's position:
so its sums have one order, whichever step computes them, whatever slot it has and whoever else is there.

Bytes per row: 2 * visible * n_kv_heads * head_dim * itemsize; operations: 4 * visible * n_heads * head_dim.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cache_numbers import int4_number
from build.kernels.cuda.binding import SHARED_BYTES, Binding
from build.kernels.cuda.ring import HIDDEN, SMALLEST_TOTAL, ring_writer, rotated_element
from build.kernels.rotary import query_scale
from build.kernels.shapes import RollingAttention
from runtime.artifact.layouts import VECTOR
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError

BLOCKS = 264  # two per multiprocessor of an H200; not yet measured on a GPU
THREADS, TILE_KEYS = 128, 32
PADDING = 2  # numbers behind a key in shared memory: threads that read neighbouring keys hit different banks


def decode_attention(shape: RollingAttention, on: Binding):
    """Body of `rolling_attention` for T = 1."""
    B, KV, D = shape.rows, shape.n_kv_heads, shape.head_dim
    group, count = shape.n_heads // KV, splits(shape)
    write, attend, join = ring_writer(shape, on), _attend(shape, count, on), _join(shape, count, on)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        largest = T.alloc_buffer((B * KV * count, group), "float32")
        total = T.alloc_buffer((B * KV * count, group), "float32")
        mixed = T.alloc_buffer((B * KV * count, group, D), "float32")
        write(qkv, cos, sin, positions, slots, keys, values)
        attend(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed)
        join(positions, largest, total, mixed, out)

    return body


def splits(shape: RollingAttention) -> int:
    """Most blocks that share the columns that a row sees: as many as fill the device, but none without a tile.

    The number of rows has no part in it, so that a row's sums do not depend on it.
    """
    tiles = -(-shape.window // tile_keys(shape))
    return min(tiles, -(-BLOCKS // shape.n_kv_heads))


class Visible(NamedTuple):
    """What a row sees: positions `oldest` .. end - 1, in `blocks` shares of `share` tiles each."""

    oldest: Any
    end: Any
    share: Any
    blocks: Any


def visible(shape: RollingAttention, position: Any) -> Visible:
    """The columns that a row at an int64 position sees, as TIR expressions; padding sees none, in no shares."""
    end = T.Cast("int32", position) + 1
    oldest = T.max(end - shape.window, 0)
    tiles = (end - oldest + tile_keys(shape) - 1) // tile_keys(shape)
    share = T.max((tiles + splits(shape) - 1) // splits(shape), 1)
    return Visible(oldest, end, share, (tiles + share - 1) // share)


def tile_dtype(shape: RollingAttention) -> str:
    """Dtype of keys and values in shared memory: as stored, or widened if they have a scale."""
    return "float32" if shape.stored.scales else shape.cache_dtype


def tile_keys(shape: RollingAttention) -> int:
    """Keys per tile: shared memory holds one tile's keys, values and scores, and the queries of a group."""
    group = shape.n_heads // shape.n_kv_heads
    column = (2 * shape.head_dim + PADDING) * numpy_dtype(tile_dtype(shape)).itemsize + 4 * group
    left = SHARED_BYTES - 4 * group * shape.head_dim
    fitting = [n for n in (TILE_KEYS, 16, 8, 4, 2, 1) if n * column <= left]
    if not fitting:
        raise UserError(
            f"{group} heads of {shape.head_dim} numbers share one key head, and their queries do not fit in the "
            f"{SHARED_BYTES} bytes of a GPU's shared memory; compile for backend.target llvm"
        )
    return fitting[0]


def _attend(shape: RollingAttention, count: int, on: Binding):
    """The second launch: one block per share of a row and key head, for all query heads of the group together."""
    B, H, KV, D, L = shape.rows, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    group, threads, tile, dtype = H // KV, THREADS, tile_keys(shape), shape.cache_dtype
    kept_dtype, scaled = tile_dtype(shape), shape.stored.scales is not None
    owned = -(-D // threads)  # elements of a head's output per thread
    stride = D + PADDING
    width = next(shape.stored.parts(D)).width
    # Stored elements that a thread loads at once; of int4, the bytes of a group.
    piece = next(n for n in (VECTOR // numpy_dtype(dtype).itemsize, 2, 1) if width % n == 0)
    pieces = width // piece  # per column
    in_piece = D // pieces  # numbers
    rotated = rotated_element(shape)
    load_factors, number = _widening(shape)

    def in_pieces(cache):
        return cache._replace(
            numbers=T.decl_buffer((shape.slots, KV, L, pieces, piece), dtype, data=cache.numbers.data)
        )

    @T.inline
    def load_queries(qkv, cos, sin, positions, b, h, queries, t):
        for c in T.serial(-(-group * D // threads)):
            e = c * threads + t
            if e < group * D:
                queries[e // D, e % D] = query_scale(shape, T.Cast("int32", positions[b, 0])) * rotated(
                    qkv, cos, sin, b, 0, (h * group + e // D) * D, e % D
                )

    @T.inline
    def load_columns(keys, values, slot, h, first, end, key_tile, value_tile, t):
        """Load a tile's keys and values, one piece per thread; what lies from position `end` on stays as it was."""
        for c in T.serial(-(-tile * pieces // threads)):
            q = c * threads + t  # index of a piece in the tile
            column = (first + q // pieces) % L
            if q < tile * pieces and first + q // pieces < end:
                loaded = T.alloc_buffer((2 * piece,), dtype, scope=on.private)
                for v in T.vectorized(piece):
                    loaded[v] = keys.numbers[slot, h, column, q % pieces, v]
                for v in T.vectorized(piece):
                    loaded[piece + v] = values.numbers[slot, h, column, q % pieces, v]
                if scaled:
                    factors = T.alloc_buffer((4,), "float32", scope=on.private)
                    load_factors(keys, slot, h, column, q % pieces, factors, 0)
                    load_factors(values, slot, h, column, q % pieces, factors, 2)
                    for half in on.unroll(in_piece // piece):
                        for v in on.unroll(piece):
                            d = half * piece + v
                            key_tile[q // pieces * stride + q % pieces * in_piece + d] = number(
                                loaded[v], half, factors, 0
                            )
                            value_tile[q * in_piece + d] = number(loaded[piece + v], half, factors, 2)
                else:
                    for v in on.unroll(piece):
                        key_tile[q // pieces * stride + q % pieces * piece + v] = loaded[v]
                    for v in T.vectorized(piece):
                        value_tile[q * piece + v] = loaded[piece + v]

    @T.inline
    def score(queries, key_tile, first, end, scores, t):
        """scores[r, j] = query r . key j, or HIDDEN from position `end` on; one pair per thread."""
        for c in T.serial(-(-group * tile // threads)):
            e = c * threads + t
            if e < group * tile:
                scores[e // tile, e % tile] = T.float32(HIDDEN)
                if first + e % tile < end:
                    sum_ = T.alloc_buffer((1,), "float32", scope=on.private)
                    sum_[0] = T.float32(0)
                    for d in T.serial(D):
                        sum_[0] = sum_[0] + queries[e // tile, d] * T.Cast("float32", key_tile[e % tile * stride + d])
                    scores[e // tile, e % tile] = sum_[0]

    @T.inline
    def mix(value_tile, first, end, scores, maximum, sums, kept, t):
        """Fold one tile into the thread's maxima, sums and outputs for every head."""
        best = T.alloc_buffer((1,), "float32", scope=on.private)
        weight = T.alloc_buffer((1,), "float32", scope=on.private)
        shrink = T.alloc_buffer((1,), "float32", scope=on.private)
        for r in on.unroll(group):
            best[0] = maximum[on.own(t), r]
            for j in T.serial(tile):
                best[0] = T.max(best[0], scores[r, j])
            shrink[0] = T.exp(maximum[on.own(t), r] - best[0])
            maximum[on.own(t), r] = best[0]
            sums[on.own(t), r] = sums[on.own(t), r] * shrink[0]
            for c in on.unroll(owned):
                kept[on.own(t), r * owned + c] = kept[on.own(t), r * owned + c] * shrink[0]
        for j in T.serial(T.max(T.min(tile, end - first), 0)):
            value = T.alloc_buffer((owned,), "float32", scope=on.private)
            for c in on.unroll(owned):
                if c * threads + t < D:
                    value[c] = T.Cast("float32", value_tile[j * D + c * threads + t])
            for r in on.unroll(group):
                weight[0] = T.exp(scores[r, j] - maximum[on.own(t), r])
                sums[on.own(t), r] = sums[on.own(t), r] + weight[0]
                for c in on.unroll(owned):
                    if c * threads + t < D:
                        kept[on.own(t), r * owned + c] = kept[on.own(t), r * owned + c] + weight[0] * value[c]

    @T.inline
    def attend(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed):
        for block in on.blocks(B * KV * count):
            queries = T.alloc_buffer((group, D), "float32", scope=on.shared)
            key_tile = T.alloc_buffer((tile * stride,), kept_dtype, scope=on.shared)
            value_tile = T.alloc_buffer((tile * D,), kept_dtype, scope=on.shared)
            scores = T.alloc_buffer((group, tile), "float32", scope=on.shared)
            maximum = T.alloc_buffer((on.copies(threads), group), "float32", scope=on.private)
            sums = T.alloc_buffer((on.copies(threads), group), "float32", scope=on.private)
            kept = T.alloc_buffer((on.copies(threads), group * owned), "float32", scope=on.private)
            b = block // (KV * count)
            h = block // count % KV
            slot = T.Cast("int32", slots[b])
            oldest, end, share, shares = visible(shape, positions[b, 0])
            begin = oldest + block % count * share * tile
            for t in on.threads(threads):
                for r in on.unroll(group):
                    maximum[on.own(t), r] = T.float32(HIDDEN)
                    sums[on.own(t), r] = T.float32(0)
                    for c in on.unroll(owned):
                        kept[on.own(t), r * owned + c] = T.float32(0)
                load_queries(qkv, cos, sin, positions, b, h, queries, t)
            for step in T.serial(T.if_then_else(block % count < shares, share, 0)):
                for t in on.threads(threads):
                    load_columns(keys, values, slot, h, begin + step * tile, end, key_tile, value_tile, t)
                for t in on.threads(threads):
                    score(queries, key_tile, begin + step * tile, end, scores, t)
                for t in on.threads(threads):
                    mix(value_tile, begin + step * tile, end, scores, maximum, sums, kept, t)
            for t in on.threads(threads):
                if block % count < shares:  # `_join` reads no other
                    for r in on.unroll(group):
                        if t == 0:
                            largest[block, r] = maximum[on.own(t), r]
                            total[block, r] = sums[on.own(t), r]
                        for c in on.unroll(owned):
                            if c * threads + t < D:
                                mixed[block, r, c * threads + t] = kept[on.own(t), r * owned + c]

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed):
        attend(qkv, cos, sin, positions, slots, in_pieces(keys), in_pieces(values), largest, total, mixed)

    return body


def _widening(shape: RollingAttention):
    """How stored elements become numbers: an inline and a function.

    The inline is `load_factors(cache, slot, h, column, group, factors, at)`.
    factors[at] is then the scale, and factors[at + 1] the minimum if there is one; the function
    `number(element, half, factors, at)` is a number in float32, of a byte of int4 that in its low or high half.
    """
    grouped = shape.stored.group is not None

    @T.inline
    def load_factors(cache, slot, h, column, group, factors, at):
        if grouped:
            factors[at] = T.Cast("float32", cache.scales[slot, h, column, group])
            factors[at + 1] = T.Cast("float32", cache.minima[slot, h, column, group])
        else:
            factors[at] = cache.scales[slot, h, column, 0]

    def number(element, half, factors, at):
        if grouped:
            return int4_number(element, half, factors[at], factors[at + 1])
        return T.Cast("float32", element) * factors[at]

    return load_factors, number


def _join(shape: RollingAttention, count: int, on: Binding):
    """The third launch: one block per query head, one thread per element of its output."""
    B, H, KV, D = shape.rows, shape.n_heads, shape.n_kv_heads, shape.head_dim
    group, threads = H // KV, THREADS

    @T.inline
    def body(positions, largest, total, mixed, out):
        for block in on.blocks(B * H):
            for t in on.threads(threads):
                first = block // group * count  # first of the key head's shares
                shares = visible(shape, positions[block // H, 0]).blocks
                r = block % group
                best = T.alloc_buffer((1,), "float32", scope=on.private)
                sum_ = T.alloc_buffer((1,), "float32", scope=on.private)
                best[0] = T.float32(HIDDEN)
                sum_[0] = T.float32(0)
                for s in T.serial(shares):
                    best[0] = T.max(best[0], largest[first + s, r])
                for s in T.serial(shares):
                    sum_[0] = sum_[0] + T.exp(largest[first + s, r] - best[0]) * total[first + s, r]
                for c in on.unroll(-(-D // threads)):
                    if c * threads + t < D:
                        value = T.alloc_buffer((1,), "float32", scope=on.private)
                        value[0] = T.float32(0)
                        for s in T.serial(shares):
                            value[0] = (
                                value[0] + T.exp(largest[first + s, r] - best[0]) * mixed[first + s, r, c * threads + t]
                            )
                        out[block // H, 0, block % H * D + c * threads + t] = value[0] / T.max(
                            sum_[0], T.float32(SMALLEST_TOTAL)
                        )

    return body
