"""The second launch of `attention.py` for many tokens on tensor cores, with queries and shares in float16.

Each block takes 64 rows of queries, which are a few tokens times the heads that share a key head, and walks all columns
that any of them sees, 64 at a time, by position. Tiles begin at multiples of 64 positions, and columns that a row does
not see add exactly zero to its sums, so these have one order wherever a chunk begins. Both products are `mma.sync`
(`mma.py`), and the four lanes that hold a row also keep its running maximum and sum (online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867). The sums of the first product are laid out just as the second takes its factor, as
in FlashAttention-2 (Dao 2023, arXiv 2307.08691). While one product is computed, the columns of the next are in flight,
as stored; on their way into shared memory, numbers of a narrower cache become float16.

Bytes per block: the keys and values of all columns that it sees, mostly through the second-level (L2) cache.
Operations: 4 * visible * n_heads * head_dim per token.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.column_pieces import PIECE, WORDS, pair_in_piece, piece_loader, pieces_of, supports
from build.kernels.cuda.mma import PAIR, QUAD, pair
from build.kernels.cuda.ring import HIDDEN, SMALLEST_TOTAL, rotated_element
from build.kernels.rotary import with_position_factor
from build.kernels.shapes import RollingAttention

# A head_dim of 128 takes 32 registers for queries, 64 for the outputs, 32 for scores and 32
# for columns in flight.
WARPS = 4
THREADS = WARPS * WARP
ROWS = WARPS * mma.ROWS  # rows of queries per block
TILE = 64  # columns per tile
# Of head_dim: in multiples of HEAD_STEP, every thread loads equally much of a tile; beyond WIDEST_HEAD, there are not
# enough registers.
HEAD_STEP, WIDEST_HEAD = 32, 128
LEAST_ROWS = 16  # rows of queries that share a key head: fewer would leave most of a product empty
LOG2_E = 1.4426950408889634
# Initial value of a maximum: above HIDDEN, so that the share of a hidden column is exp(HIDDEN - LOWEST) = 0.
LOWEST = -1e30


class Place(NamedTuple):
    """Where a block's columns are: positions `oldest` .. `newest` of one key head in the ring of a slot."""

    slot: Any
    h: Any
    oldest: Any
    newest: Any


def suits(shape: RollingAttention) -> bool:
    """Whether `flash_attention` supports such a shape and is worth using for it."""
    group = shape.n_heads // shape.n_kv_heads
    fits = shape.head_dim % HEAD_STEP == 0 and shape.head_dim <= WIDEST_HEAD and supports(shape)
    return fits and shape.tokens > 1 and shape.tokens * group >= LEAST_ROWS


def flash_attention(shape: RollingAttention, on: Binding):
    """The launch for a shape that `suits` accepts: one block per 64 rows of each key head.

    Row r is head r % group of token r // group.
    """
    N, H, D, W, L = shape.tokens, shape.n_heads, shape.head_dim, shape.window, shape.ring_len
    KV, group = shape.n_kv_heads, shape.n_heads // shape.n_kv_heads
    rows, pieces = N * group, D // PIECE
    blocks = -(-rows // ROWS)
    # Numbers of products along a head, across the outputs and across the scores.
    depths, d_pieces, c_pieces = D // mma.DEPTH, D // mma.COLUMNS, TILE // mma.COLUMNS
    # Stride of a key in shared memory, in pairs of d: lanes that read neighbouring keys hit different banks.
    key_stride = D // PAIR + 4
    # Stride of two neighbouring values, in pairs of them: likewise for lanes that read neighbouring pairs.
    value_stride = D + 8
    loads = TILE * pieces // THREADS  # pieces that a thread loads, of keys or of values
    load_piece, pair_of_piece = piece_loader(shape), pair_in_piece(shape, on)
    rotated, multiply = rotated_element(shape), mma.multiplier(on)
    largest_of_quad, sum_of_quad = mma.quad_reduction(on, T.max), mma.quad_reduction(on, lambda a, b: a + b)
    scale = T.float32(shape.scale * LOG2_E)  # of scores, which become exponents of two

    def query(qkv, cos, sin, begin, h, r, d):
        """Element d of row r's query."""
        value = rotated(qkv, cos, sin, 0, r // group, (h * group + r % group) * D, d)
        return with_position_factor(shape, begin + r // group, value)

    @T.inline
    def load_queries(qkv, cos, sin, begin, h, m, queries, t):
        """Load a lane's pairs of its warp's 16 rows; rows past the last compute it again."""
        for depth in on.unroll(depths):
            for i in on.unroll(mma.A):
                r = T.min(m + t // WARP * mma.ROWS + mma.fragment_row(t, i), rows - 1)
                d = depth * mma.DEPTH + (t % QUAD + i // 2 * 4) * PAIR
                queries[on.own(t), depth * mma.A + i] = pair(
                    query(qkv, cos, sin, begin, h, r, d), query(qkv, cos, sin, begin, h, r, d + 1)
                )

    @T.inline
    def load_column(ring, place, position, part, loaded, at):
        """Load a piece of the column of a position into loaded[at :].

        For a position that no row sees, it is another column that one does: what lies there may not be a number.
        """
        column = T.max(T.min(position, place.newest), place.oldest) % L
        load_piece(ring, place.slot, place.h, column, part, loaded, at)

    @T.inline
    def fetch_keys(ring, place, first, loaded, t):
        for c in on.unroll(loads):
            u = c * THREADS + t
            load_column(ring, place, first + u // pieces, u % pieces, loaded, (on.own(t) * loads + c) * WORDS)

    @T.inline
    def put_keys(loaded, key_tile, t):
        for c in on.unroll(loads):
            u = c * THREADS + t
            pairs = T.alloc_buffer((WORDS,), "uint32", scope=on.private)
            for v in on.unroll(WORDS):
                pairs[v] = pair_of_piece(loaded, (on.own(t) * loads + c) * WORDS, v, u % pieces)
            for v in T.vectorized(WORDS):
                key_tile[u // pieces * key_stride + u % pieces * WORDS + v] = pairs[v]

    @T.inline
    def fetch_values(ring, place, first, loaded, t):
        """Load the same 8 numbers of two neighbouring positions, alternately."""
        for c in on.unroll(loads):
            u = c // 2 * THREADS + t
            position = first + u // pieces * 2 + c % 2
            load_column(ring, place, position, u % pieces, loaded, (on.own(t) * loads + c) * WORDS)

    @T.inline
    def put_values(loaded, value_tile, t):
        """Store pairs of neighbouring positions, as the second product takes them."""
        for c in on.unroll(loads // 2):
            part = (c * THREADS + t) % pieces
            for half in on.unroll(2):
                mixed = T.alloc_buffer((WORDS,), "uint32", scope=on.private)
                for word in on.unroll(WORDS // 2):
                    even = pair_of_piece(loaded, (on.own(t) * loads + 2 * c) * WORDS, half * 2 + word, part)
                    odd = pair_of_piece(loaded, (on.own(t) * loads + 2 * c + 1) * WORDS, half * 2 + word, part)
                    mixed[2 * word] = (even & T.uint32(0xFFFF)) | (odd << T.uint32(16))
                    mixed[2 * word + 1] = (even >> T.uint32(16)) | (odd & T.uint32(0xFFFF0000))
                for v in T.vectorized(WORDS):
                    value_tile[(c * THREADS + t) // pieces * value_stride + part * PIECE + half * WORDS + v] = mixed[v]

    @T.inline
    def load_key_fragments(key_tile, depth, fragments, t):
        for c in on.unroll(c_pieces):
            for i in on.unroll(mma.B):
                fragments[on.own(t), c * mma.B + i] = key_tile[
                    (c * mma.COLUMNS + t % WARP // QUAD) * key_stride + (depth * (mma.DEPTH // PAIR) + t % QUAD + i * 4)
                ]

    @T.inline
    def load_value_fragments(value_tile, depth, fragments, t):
        for c in on.unroll(d_pieces):
            for i in on.unroll(mma.B):
                fragments[on.own(t), c * mma.B + i] = value_tile[
                    (depth * (mma.DEPTH // PAIR) + t % QUAD + i * 4) * value_stride
                    + (c * mma.COLUMNS + t % WARP // QUAD)
                ]

    @T.inline
    def hide(scores, m, first, begin, t):
        """Hide the scores of columns that a row does not see: those after it and those that have left its window."""
        for c in on.unroll(c_pieces):
            for i in on.unroll(mma.C):
                position = first + c * mma.COLUMNS + t % QUAD * 2 + i % 2
                query = begin + (m + t // WARP * mma.ROWS + mma.fragment_row(t, i // 2)) // group
                if position > query or position <= query - W:
                    scores[on.own(t), c * mma.C + i] = T.float32(HIDDEN)

    @T.inline
    def find_largest(scores, maximum, best, t):
        for j in on.unroll(2):
            best[on.own(t), j] = maximum[on.own(t), j]
            for c in on.unroll(c_pieces):
                for i in on.unroll(2):
                    best[on.own(t), j] = T.max(best[on.own(t), j], scores[on.own(t), c * mma.C + 2 * j + i])

    @T.inline
    def share(scores, largest, maximum, total, mixed, shares, t):
        """Turn scores into shares, powers of two below their row's maximum, and rescale earlier mixed values to it."""
        for j in on.unroll(2):
            shrink = T.alloc_buffer((1,), "float32", scope=on.private)
            shrink[0] = T.exp2((maximum[on.own(t), j] - largest[on.own(t), j]) * scale)
            maximum[on.own(t), j] = largest[on.own(t), j]
            total[on.own(t), j] = total[on.own(t), j] * shrink[0]
            for c in on.unroll(d_pieces):
                for i in on.unroll(2):
                    mixed[on.own(t), c * mma.C + 2 * j + i] = mixed[on.own(t), c * mma.C + 2 * j + i] * shrink[0]
            for c in on.unroll(c_pieces):
                both = T.alloc_buffer((2,), "float32", scope=on.private)
                for i in on.unroll(2):
                    both[i] = T.exp2((scores[on.own(t), c * mma.C + 2 * j + i] - largest[on.own(t), j]) * scale)
                    total[on.own(t), j] = total[on.own(t), j] + both[i]
                shares[on.own(t), c * 2 + j] = pair(both[0], both[1])

    @T.inline
    def store(mixed, total, out, h, m, t):
        for j in on.unroll(2):
            r = m + t // WARP * mma.ROWS + mma.fragment_row(t, j)
            if r < rows:
                factor = T.alloc_buffer((1,), "float32", scope=on.private)
                factor[0] = T.float32(1) / T.max(total[on.own(t), j], T.float32(SMALLEST_TOTAL))
                for c in on.unroll(d_pieces):
                    for i in T.vectorized(2):
                        out[r // group, (h * group + r % group) * (D // 2) + c * (mma.COLUMNS // 2) + t % QUAD, i] = (
                            mixed[on.own(t), c * mma.C + 2 * j + i] * factor[0]
                        )

    @T.inline
    def find_newest(positions, m, newest):
        """Set newest[0] to the last position of the tokens of a block's rows, or to -1 if they are all padding."""
        newest[0] = -1
        for i in T.serial(min(-(-(ROWS - 1) // group) + 1, N)):
            newest[0] = T.max(newest[0], T.Cast("int32", positions[0, T.min(m // group + i, N - 1)]))

    @T.inline
    def attend(qkv, cos, sin, positions, slots, keys, values, out_in):
        out = T.decl_buffer((N, H * D // 2, 2), "float32", data=out_in.data)
        for block in on.blocks(KV * blocks):
            key_tile = T.alloc_buffer((TILE * key_stride,), "uint32", scope=on.shared)
            value_tile = T.alloc_buffer((TILE // PAIR * value_stride,), "uint32", scope=on.shared)
            loaded = T.alloc_buffer((on.copies(THREADS) * loads * WORDS,), "uint32", scope=on.private)
            queries = T.alloc_buffer((on.copies(THREADS), depths * mma.A), "uint32", scope=on.private)
            fragments = T.alloc_buffer(
                (on.copies(THREADS), max(c_pieces, d_pieces) * mma.B), "uint32", scope=on.private
            )
            scores = T.alloc_buffer((on.copies(THREADS), c_pieces * mma.C), "float32", scope=on.private)
            shares = T.alloc_buffer((on.copies(THREADS), c_pieces * 2), "uint32", scope=on.private)
            best = T.alloc_buffer((on.copies(THREADS), 2), "float32", scope=on.private)
            largest = T.alloc_buffer((on.copies(THREADS), 2), "float32", scope=on.private)
            maximum = T.alloc_buffer((on.copies(THREADS), 2), "float32", scope=on.private)
            total = T.alloc_buffer((on.copies(THREADS), 2), "float32", scope=on.private)
            mixed = T.alloc_buffer((on.copies(THREADS), d_pieces * mma.C), "float32", scope=on.private)
            newest = T.alloc_buffer((1,), "int32", scope=on.private)
            h = block // blocks
            m = (blocks - 1 - block % blocks) * ROWS  # the last rows see the most, so they begin first
            slot = T.Cast("int32", slots[0])
            begin = T.Cast("int32", positions[0, 0])  # first position of the chunk
            find_newest(positions, m, newest)
            oldest = T.max(begin + m // group - (W - 1), 0)  # first position that the first query sees
            start = oldest // TILE * TILE
            for t in on.threads(THREADS):
                for j in on.unroll(2):
                    maximum[on.own(t), j] = T.float32(LOWEST)
                    total[on.own(t), j] = T.float32(0)
                for i in on.unroll(d_pieces * mma.C):
                    mixed[on.own(t), i] = T.float32(0)
                load_queries(qkv, cos, sin, begin, h, m, queries, t)
                if newest[0] >= 0:  # rows that are all padding see no column, and the oldest may not be written yet
                    fetch_keys(keys, Place(slot, h, oldest, newest[0]), start, loaded, t)
            for step in T.serial(T.max(newest[0] - start + TILE, 0) // TILE):
                first = start + step * TILE
                for t in on.threads(THREADS):
                    put_keys(loaded, key_tile, t)
                for t in on.threads(THREADS):
                    fetch_values(values, Place(slot, h, oldest, newest[0]), first, loaded, t)
                    for i in on.unroll(c_pieces * mma.C):
                        scores[on.own(t), i] = T.float32(0)
                for depth in on.unroll(depths):
                    for t in on.threads(THREADS):
                        load_key_fragments(key_tile, depth, fragments, t)
                    for t in on.threads(THREADS):
                        for c in on.unroll(c_pieces):
                            multiply(scores, queries, fragments, t, c * mma.C, depth * mma.A, c * mma.B)
                for t in on.threads(THREADS):
                    if first + TILE - 1 > begin + m // group or first <= newest[0] - W:  # some row misses some column
                        hide(scores, m, first, begin, t)
                for t in on.threads(THREADS):
                    find_largest(scores, maximum, best, t)
                for t in on.threads(THREADS):
                    for j in on.unroll(2):
                        largest_of_quad(best, largest, j, t)
                for t in on.threads(THREADS):
                    share(scores, largest, maximum, total, mixed, shares, t)
                    put_values(loaded, value_tile, t)
                for t in on.threads(THREADS):
                    fetch_keys(keys, Place(slot, h, oldest, newest[0]), first + TILE, loaded, t)
                for depth in on.unroll(TILE // mma.DEPTH):
                    for t in on.threads(THREADS):
                        load_value_fragments(value_tile, depth, fragments, t)
                    for t in on.threads(THREADS):
                        for c in on.unroll(d_pieces):
                            multiply(mixed, shares, fragments, t, c * mma.C, depth * mma.A, c * mma.B)
            for t in on.threads(THREADS):
                for j in on.unroll(2):
                    sum_of_quad(total, best, j, t)
            for t in on.threads(THREADS):
                store(mixed, best, out, h, m, t)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        attend(qkv, cos, sin, positions, slots, pieces_of(shape, keys), pieces_of(shape, values), out)

    return body
