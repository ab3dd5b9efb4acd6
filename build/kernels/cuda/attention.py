"""Rolling attention of several tokens: split qkv, rotate, write the new columns into the ring, attend over the ring.

No copy of the cache is made. The rings are those of `build/kernels/cpu/attention/kernel.py`: the key of position p is
in column p mod ring_len of its slot, and a ring has room for the new columns beside all that their tokens still see. So
there are two launches: first, all new columns are written, and then the tokens attend over the ring alone, which they
read in order of position. Columns that a ring still holds from positions beyond a query's own, such as those of tokens
that were taken back, are never read. In the second launch, a block handles one query of one head. It walks its keys in
tiles with a running maximum and sum (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867), so that no row of
scores is ever stored. Where `flash_attention.py` suits, it is the second launch.

Bytes per query and head: 2 * visible * head_dim * itemsize; operations: 4 * visible * head_dim.
"""

from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cache_numbers import Cache, declared, unused_parameters
from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.decode_attention import decode_attention
from build.kernels.cuda.flash_attention import flash_attention, suits
from build.kernels.cuda.ring import HIDDEN, SMALLEST_TOTAL, ring_writer, rotated_element, stored_number
from build.kernels.parameters import without
from build.kernels.rotary import query_scale
from build.kernels.shapes import RollingAttention


@dataclass(frozen=True)
class Tile:
    """Blocking: `threads` per block, `keys` per tile; threads / keys of them share the dot product of one key."""

    threads: int
    keys: int


# 32 keys of head_dim 128 take 16.5 kB of shared memory.
TILE = Tile(threads=128, keys=32)


def rolling_attention(shape: RollingAttention, on: Binding = GPU, *, tensor_cores: bool = False) -> PrimFunc:
    """Kernel from qkv, the rotary cosines and sines, positions, slots and both rings to the attention's output.

    Arguments: qkv (B, T, qkv_dim), cos and sin (B, 1, T, head_dim / 2), positions (B, T), the slot of each row (B,),
    key ring, value ring and, for int8 and int4, both rings of scales, then for int4 both of minima. All rings are
    updated in place. The output (B, T, n_heads * head_dim) is a new tensor, which comes before the rings in the
    results. Either B or T is 1. The tokens of a row have consecutive positions, and those of -1 may follow, which are
    neither written nor seen. With `tensor_cores`, queries, shares (softmax weights) and the numbers of int8 and int4
    rings may be rounded to float16 for several tokens.
    """
    B, N, H, D = shape.rows, shape.tokens, shape.n_heads, shape.head_dim
    half, ring = D // 2, declared(shape)
    body = _body(shape, on, tensor_cores=tensor_cores)

    @T.prim_func
    def kernel(
        qkv: T.Buffer((B, N, shape.qkv_dim), "float32"),
        cos: T.Buffer((B, 1, N, half), "float32"),
        sin: T.Buffer((B, 1, N, half), "float32"),
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
        T.func_attr(ATTRIBUTES)
        body(
            qkv,
            cos,
            sin,
            positions,
            slots,
            Cache(keys, key_scales, key_minima),
            Cache(values, value_scales, value_minima),
            out,
        )

    return without(kernel, unused_parameters(shape))


def _body(shape: RollingAttention, on: Binding, *, tensor_cores: bool):
    """Inline `body(qkv, cos, sin, positions, slots, keys, values, out)`: the launches that the shape needs."""
    if shape.tokens == 1:
        return decode_attention(shape, on)
    attend = (flash_attention if tensor_cores and suits(shape) else _attend)(shape, on)
    write = ring_writer(shape, on)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        write(qkv, cos, sin, positions, slots, keys, values)
        attend(qkv, cos, sin, positions, slots, keys, values, out)

    return body


def _attend(shape: RollingAttention, on: Binding):
    """The second launch: one block per query of each head, of one row's tokens."""
    N, H, D, W, L = shape.tokens, shape.n_heads, shape.head_dim, shape.window, shape.ring_len
    group = shape.n_heads // shape.n_kv_heads
    threads, tile = TILE.threads, TILE.keys
    sharing = threads // tile  # threads per dot product
    piece = -(-D // sharing)  # elements of a dot product per thread
    owned = -(-D // threads)  # elements of the output per thread
    # Stride of a key in shared memory: threads that read neighbouring keys hit different banks.
    # The buffer is flat, because TVM would trim the padding.
    stride = D + 1
    rotated, number = rotated_element(shape), stored_number(shape)

    @T.inline
    def load_keys(keys, key_tile, slot, h, first, end, t):
        """Load the keys of positions first .. first + tile - 1 into key_tile; those from `end` on stay as they are."""
        for c in T.serial(-(-tile * D // threads)):
            e = c * threads + t
            if e < tile * D and first + e // D < end:
                key_tile[e // D * stride + e % D] = number(keys, slot, h, (first + e // D) % L, e % D)

    @T.inline
    def score(query, key_tile, partial, first, end, t):
        """partial[:, j] = pieces of query . key_tile[j], as far as keys were loaded."""
        if first + t % tile < end:
            total = T.alloc_buffer((1,), "float32", scope=on.private)
            total[0] = T.float32(0)
            for c in T.serial(piece):
                if t // tile * piece + c < D:
                    total[0] = (
                        total[0] + query[t // tile * piece + c] * key_tile[t % tile * stride + t // tile * piece + c]
                    )
            partial[t // tile, t % tile] = total[0]

    @T.inline
    def sum_scores(partial, scores, first, end, t):
        """Set scores[j] to the sum of its pieces, or to HIDDEN from position `end` on."""
        if t < tile:
            if first + t < end:
                scores[t] = T.float32(0)
                for c in T.serial(sharing):
                    scores[t] = scores[t] + partial[c, t]
            else:
                scores[t] = T.float32(HIDDEN)

    @T.inline
    def mix(values, scores, maximum, total, mixed, slot, h, first, end, t):
        """Fold one tile into the thread's running maximum, sum and outputs."""
        best = T.alloc_buffer((1,), "float32", scope=on.private)
        weight = T.alloc_buffer((1,), "float32", scope=on.private)
        best[0] = maximum[on.own(t)]
        for j in T.serial(tile):
            best[0] = T.max(best[0], scores[j])
        weight[0] = T.exp(maximum[on.own(t)] - best[0])
        maximum[on.own(t)] = best[0]
        total[on.own(t)] = total[on.own(t)] * weight[0]
        for c in on.unroll(owned):
            mixed[on.own(t), c] = mixed[on.own(t), c] * weight[0]
        for j in T.serial(T.min(tile, end - first)):
            weight[0] = T.exp(scores[j] - best[0])
            total[on.own(t)] = total[on.own(t)] + weight[0]
            for c in on.unroll(owned):
                if c * threads + t < D:
                    mixed[on.own(t), c] = mixed[on.own(t), c] + weight[0] * number(
                        values, slot, h, (first + j) % L, c * threads + t
                    )

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        for block in on.blocks(N * H):
            query = T.alloc_buffer((D,), "float32", scope=on.shared)
            key_tile = T.alloc_buffer((tile * stride,), "float32", scope=on.shared)
            partial = T.alloc_buffer((sharing, tile), "float32", scope=on.shared)
            scores = T.alloc_buffer((tile,), "float32", scope=on.shared)
            maximum = T.alloc_buffer((on.copies(threads),), "float32", scope=on.private)
            total = T.alloc_buffer((on.copies(threads),), "float32", scope=on.private)
            mixed = T.alloc_buffer((on.copies(threads), owned), "float32", scope=on.private)
            i = block // H
            head = block % H
            h = head // group
            slot = T.Cast("int32", slots[0])
            end = T.Cast("int32", positions[0, i]) + 1  # past the positions that this query sees; 0 for padding
            oldest = T.max(end - W, 0)
            for t in on.threads(threads):
                maximum[on.own(t)] = T.float32(HIDDEN)
                total[on.own(t)] = T.float32(0)
                for c in on.unroll(owned):
                    mixed[on.own(t), c] = T.float32(0)
                    if c * threads + t < D:
                        query[c * threads + t] = query_scale(shape, end - 1) * rotated(
                            qkv, cos, sin, 0, i, head * D, c * threads + t
                        )
            for step in T.serial((end - oldest + tile - 1) // tile):
                first = oldest + step * tile
                for t in on.threads(threads):
                    load_keys(keys, key_tile, slot, h, first, end, t)
                for t in on.threads(threads):
                    score(query, key_tile, partial, first, end, t)
                for t in on.threads(threads):
                    sum_scores(partial, scores, first, end, t)
                for t in on.threads(threads):
                    mix(values, scores, maximum, total, mixed, slot, h, first, end, t)
            for t in on.threads(threads):
                for c in on.unroll(owned):
                    if c * threads + t < D:
                        out[0, i, head * D + c * threads + t] = mixed[on.own(t), c] / T.max(
                            total[on.own(t)], T.float32(SMALLEST_TOTAL)
                        )

    return body
