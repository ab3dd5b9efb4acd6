"""Rolling attention for rows of one token: three launches that read each visible key and value once for some heads.

The rings are those of `build/kernels/cuda/attention.py`. First, every row's new column is written, so that the ring of
its slot alone holds everything that it sees, other rows of that slot among it. Then each block takes a share of the
columns that one row sees of one key head, in tiles and in order of position, for up to four query heads, whose running
maxima, sums and mixed values it keeps (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Last, the
blocks' results are joined (`decode_join.py`). The split over columns (as in Flash-Decoding, Dao et al. 2023) is what
gives a single sequence enough blocks. The number of shares is the same for any number of rows, and their borders follow
from a row's position: so its sums have one order, whichever step computes them, whatever slot it has and whoever else
is there.

A thread loads pieces of eight numbers, of the same place in every column: it keeps that place of the queries and of the
outputs in registers, and numbers of the rings go from memory to registers alone. What threads share are scores: each
adds its piece's part, and a warp per head makes weights of the sums, one column a lane. While a tile is weighed and
mixed, the keys of the next are on their way.

Bytes per row: 2 * visible * n_kv_heads * head_dim * itemsize; operations: 4 * visible * n_heads * head_dim.
"""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import SHARED_BYTES, WARP, Binding
from build.kernels.cuda.decode_join import joined_shares
from build.kernels.cuda.decode_pieces import Pieces, number_reader
from build.kernels.cuda.decode_shares import TILE_KEYS, heads_of_block, splits, visible
from build.kernels.cuda.ring import HIDDEN, ring_writer, rotated_element
from build.kernels.cuda.warp import warp_maximum
from build.kernels.rotary import query_scale
from build.kernels.shapes import RollingAttention
from runtime.errors import UserError

THREADS = 128  # four warps, for up to as many heads
PADDING = 2  # numbers behind a tile's in shared memory: threads of two columns hit different banks


def decode_attention(shape: RollingAttention, on: Binding):
    """Body of `rolling_attention` for T = 1."""
    heads, count = heads_of_block(shape), splits(shape)
    if Pieces.of(shape).count > THREADS or shared_bytes(shape) > SHARED_BYTES:
        raise UserError(
            f"heads of {shape.head_dim} numbers do not fit in the {SHARED_BYTES} bytes of a GPU's shared memory that "
            "attention uses; compile for backend.target llvm"
        )
    results = shape.rows * (shape.n_heads // heads) * count
    write, attend, join = ring_writer(shape, on), _attend(shape, on), joined_shares(shape, on)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        largest = T.alloc_buffer((results, heads), "float32")
        total = T.alloc_buffer((results, heads), "float32")
        mixed = T.alloc_buffer((results, heads, shape.head_dim), "float32")
        write(qkv, cos, sin, positions, slots, keys, values)
        attend(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed)
        join(positions, largest, total, mixed, out)

    return body


@dataclass(frozen=True)
class Places:
    """Where a block's threads are in a tile: `columns` at once, `passes` times, a thread for each piece of a column."""

    pieces: Pieces
    columns: int
    passes: int

    @classmethod
    def of(cls, shape: RollingAttention) -> "Places":
        """As many columns at once as there are threads."""
        pieces = Pieces.of(shape)
        columns = min(max(THREADS // pieces.count, 1), TILE_KEYS)
        return cls(pieces, columns, -(-TILE_KEYS // columns))

    @property
    def all_busy(self) -> bool:
        """Whether every thread has a column in every pass."""
        return self.columns * self.pieces.count == THREADS and self.columns * self.passes == TILE_KEYS

    def column(self, c: Any, t: Any) -> Any:
        """The column of a tile that a thread has in pass c."""
        return c * self.columns + t // self.pieces.count

    def busy(self, c: Any, t: Any) -> Any:
        """Whether a thread has a column in pass c."""
        return T.And(t < self.columns * self.pieces.count, self.column(c, t) < TILE_KEYS)


def shared_bytes(shape: RollingAttention) -> int:
    """Shared memory of a block of the second launch."""
    heads, places = heads_of_block(shape), Places.of(shape)
    kept = heads * places.pieces.numbers * places.pieces.count * places.columns
    scores = heads * places.pieces.count * (TILE_KEYS + PADDING)
    return 4 * (heads * shape.head_dim + scores + TILE_KEYS * heads + heads + THREADS + kept)


def _attend(shape: RollingAttention, on: Binding):
    """The second launch: one block per share of a row and of a key head, for some query heads."""
    B, H, KV, D, L = shape.rows, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    heads, count, places, dtype = heads_of_block(shape), splits(shape), Places.of(shape), shape.element_dtype
    pieces, passes, parts = places.pieces, places.passes, H // heads
    kept_numbers, stride = heads * pieces.numbers, TILE_KEYS + PADDING
    factor_count = 2 * passes if shape.stored.scales else 1
    rotated, maximum_of = rotated_element(shape), warp_maximum(on)
    load_factors, number = number_reader(shape, pieces, on)

    def in_pieces(cache):
        sizes = (shape.slots, KV, L, pieces.count, pieces.elements)
        return cache._replace(numbers=T.decl_buffer(sizes, dtype, data=cache.numbers.data))

    @T.inline
    def load_queries(qkv, cos, sin, positions, b, first_head, queries, t):
        for c in T.serial(-(-heads * D // THREADS)):
            e = c * THREADS + t
            if e < heads * D:
                queries[e] = query_scale(shape, T.Cast("int32", positions[b, 0])) * rotated(
                    qkv, cos, sin, b, 0, first_head * D + e // D * D, e % D
                )

    @T.inline
    def take_queries(queries, own, t):
        """The places of a thread's piece, for every head."""
        for r in on.unroll(heads):
            for i in on.unroll(pieces.numbers // pieces.run):
                for v in T.vectorized(pieces.run):
                    own[on.own(t), r * pieces.numbers + i * pieces.run + v] = queries[
                        r * D + pieces.place(t % pieces.count, i * pieces.run) + v
                    ]

    @T.inline
    def load(cache, slot, h, first, end, loaded, factors, t):
        """A thread's pieces of a tile, if any is seen; columns from `end` on are the last one again, of no weight.

        The condition also keeps the loads together: nvcc would move them to where they are needed.
        """
        if first < end:
            for c in on.unroll(passes):
                for v in T.vectorized(pieces.elements):
                    loaded[on.own(t), c * pieces.elements + v] = cache.numbers[
                        slot, h, T.min(first + places.column(c, t), end - 1) % L, t % pieces.count, v
                    ]
                load_factors(
                    cache,
                    slot,
                    h,
                    T.min(first + places.column(c, t), end - 1) % L,
                    t % pieces.count,
                    factors,
                    on.own(t),
                    2 * c,
                )

    def loaded_number(loaded, factors, t, c, i):
        def element(j):
            return loaded[on.own(t), c * pieces.elements + j]

        if shape.stored.scales is None:
            return number(element, i, None, None)
        at = 2 * c
        minimum = factors[on.own(t), at + 1] if shape.stored.group else None
        return number(element, i, factors[on.own(t), at], minimum)

    @T.inline
    def score_piece(loaded, factors, queries, parts_of_scores, t, c):
        dot = T.alloc_buffer((heads,), "float32", scope=on.private)
        key = T.alloc_buffer((1,), "float32", scope=on.private)
        for r in on.unroll(heads):
            dot[r] = T.float32(0)
        for i in on.unroll(pieces.numbers):
            key[0] = loaded_number(loaded, factors, t, c, i)
            for r in on.unroll(heads):
                dot[r] = dot[r] + queries[on.own(t), r * pieces.numbers + i] * key[0]
        for r in on.unroll(heads):
            parts_of_scores[(r * pieces.count + t % pieces.count) * stride + places.column(c, t)] = dot[r]

    @T.inline
    def score(loaded, factors, queries, parts_of_scores, t):
        for c in on.unroll(passes):
            if places.all_busy:
                score_piece(loaded, factors, queries, parts_of_scores, t, c)
            else:
                if places.busy(c, t):
                    score_piece(loaded, factors, queries, parts_of_scores, t, c)

    @T.inline
    def add_scores(parts_of_scores, first, end, scores, t):
        """scores = query . key for the head of a thread's warp and the column of its lane; HIDDEN from `end` on."""
        scores[on.own(t), 0] = T.float32(HIDDEN)
        if t // WARP < heads and first + t % WARP < end:
            scores[on.own(t), 0] = T.float32(0)
            for q in on.unroll(pieces.count):
                scores[on.own(t), 0] = (
                    scores[on.own(t), 0] + parts_of_scores[(t // WARP * pieces.count + q) * stride + t % WARP]
                )

    @T.inline
    def weigh(scores, best, maximum, sums, weights, shrinks, t):
        """weights[column, head] = exp(score - maximum), of the largest score so far; what came before shrinks."""
        if t // WARP < heads:
            largest = T.alloc_buffer((1,), "float32", scope=on.private)
            shrink = T.alloc_buffer((1,), "float32", scope=on.private)
            weight = T.alloc_buffer((1,), "float32", scope=on.private)
            largest[0] = T.max(maximum[on.own(t), 0], best[on.own(t), 0])
            shrink[0] = T.exp(maximum[on.own(t), 0] - largest[0])
            weight[0] = T.exp(scores[on.own(t), 0] - largest[0])
            maximum[on.own(t), 0] = largest[0]
            sums[on.own(t), 0] = sums[on.own(t), 0] * shrink[0] + weight[0]
            weights[t % WARP * heads + t // WARP] = weight[0]
            if t % WARP == 0:
                shrinks[t // WARP] = shrink[0]

    @T.inline
    def mix_piece(loaded, factors, weights, mixed, t, c):
        value = T.alloc_buffer((1,), "float32", scope=on.private)
        weight = T.alloc_buffer((heads,), "float32", scope=on.private)
        for r in on.unroll(heads):
            weight[r] = weights[places.column(c, t) * heads + r]
        for i in on.unroll(pieces.numbers):
            value[0] = loaded_number(loaded, factors, t, c, i)
            for r in on.unroll(heads):
                mixed[on.own(t), r * pieces.numbers + i] = (
                    mixed[on.own(t), r * pieces.numbers + i] + weight[r] * value[0]
                )

    @T.inline
    def mix(loaded, factors, weights, shrinks, mixed, t):
        shrink = T.alloc_buffer((heads,), "float32", scope=on.private)
        for r in on.unroll(heads):
            shrink[r] = shrinks[r]
        for i in on.unroll(kept_numbers):
            mixed[on.own(t), i] = mixed[on.own(t), i] * shrink[i // pieces.numbers]
        for c in on.unroll(passes):
            if places.all_busy:
                mix_piece(loaded, factors, weights, mixed, t, c)
            else:
                if places.busy(c, t):
                    mix_piece(loaded, factors, weights, mixed, t, c)

    @T.inline
    def keep(own, sums, all_, totals, t):
        """Every thread's outputs and sums, for `store`."""
        if t < places.columns * pieces.count:
            for i in on.unroll(kept_numbers):
                all_[(t // pieces.count * kept_numbers + i) * pieces.count + t % pieces.count] = own[on.own(t), i]
        totals[t] = sums[on.own(t), 0]

    @T.inline
    def store(all_, totals, maximum, block, largest, total, mixed, t):
        for c in T.serial(-(-kept_numbers * pieces.count // THREADS)):
            e = c * THREADS + t  # of head r, number i of piece q
            if e < kept_numbers * pieces.count:
                found = T.alloc_buffer((1,), "float32", scope=on.private)
                found[0] = T.float32(0)
                for column in T.serial(places.columns):
                    found[0] = found[0] + all_[column * (kept_numbers * pieces.count) + e]
                mixed[
                    block,
                    e // (pieces.numbers * pieces.count),
                    pieces.place(e % pieces.count, e // pieces.count % pieces.numbers),
                ] = found[0]
        if t % WARP == 0 and t // WARP < heads:
            sum_ = T.alloc_buffer((1,), "float32", scope=on.private)
            sum_[0] = T.float32(0)
            for lane in T.serial(WARP):
                sum_[0] = sum_[0] + totals[t + lane]
            largest[block, t // WARP] = maximum[on.own(t), 0]
            total[block, t // WARP] = sum_[0]

    @T.inline
    def attend(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed):
        for block in on.blocks(B * parts * count):
            queries = T.alloc_buffer((heads * D,), "float32", scope=on.shared)
            parts_of_scores = T.alloc_buffer((heads * pieces.count * stride,), "float32", scope=on.shared)
            weights = T.alloc_buffer((TILE_KEYS * heads,), "float32", scope=on.shared)
            shrinks = T.alloc_buffer((heads,), "float32", scope=on.shared)
            totals = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
            all_ = T.alloc_buffer((places.columns * kept_numbers * pieces.count,), "float32", scope=on.shared)
            own_queries = T.alloc_buffer((on.copies(THREADS), kept_numbers), "float32", scope=on.private)
            own_mixed = T.alloc_buffer((on.copies(THREADS), kept_numbers), "float32", scope=on.private)
            own_keys = T.alloc_buffer((on.copies(THREADS), passes * pieces.elements), dtype, scope=on.private)
            own_values = T.alloc_buffer((on.copies(THREADS), passes * pieces.elements), dtype, scope=on.private)
            key_factors = T.alloc_buffer((on.copies(THREADS), factor_count), "float32", scope=on.private)
            value_factors = T.alloc_buffer((on.copies(THREADS), factor_count), "float32", scope=on.private)
            scores = T.alloc_buffer((on.copies(THREADS), 1), "float32", scope=on.private)
            best = T.alloc_buffer((on.copies(THREADS), 1), "float32", scope=on.private)
            maximum = T.alloc_buffer((on.copies(THREADS), 1), "float32", scope=on.private)
            sums = T.alloc_buffer((on.copies(THREADS), 1), "float32", scope=on.private)
            b = block // (parts * count)
            first_head = block // count % parts * heads
            h = block // count % parts * heads // (H // KV)
            slot = T.Cast("int32", slots[b])
            oldest, end, share, shares = visible(shape, positions[b, 0])
            begin = oldest + block % count * share * TILE_KEYS
            for t in on.threads(THREADS):
                maximum[on.own(t), 0] = T.float32(HIDDEN)
                sums[on.own(t), 0] = T.float32(0)
                for i in on.unroll(kept_numbers):
                    own_mixed[on.own(t), i] = T.float32(0)
                if block % count < shares:
                    load(keys, slot, h, begin, end, own_keys, key_factors, t)
                load_queries(qkv, cos, sin, positions, b, first_head, queries, t)
            for t in on.threads(THREADS):
                take_queries(queries, own_queries, t)
            for step in T.serial(T.if_then_else(block % count < shares, share, 0)):
                for t in on.threads(THREADS):
                    load(values, slot, h, begin + step * TILE_KEYS, end, own_values, value_factors, t)
                    score(own_keys, key_factors, own_queries, parts_of_scores, t)
                    load(keys, slot, h, begin + (step + 1) * TILE_KEYS, end, own_keys, key_factors, t)
                for t in on.threads(THREADS):
                    add_scores(parts_of_scores, begin + step * TILE_KEYS, end, scores, t)
                for t in on.threads(THREADS):
                    maximum_of(scores, best, t)
                for t in on.threads(THREADS):
                    weigh(scores, best, maximum, sums, weights, shrinks, t)
                for t in on.threads(THREADS):
                    mix(own_values, value_factors, weights, shrinks, own_mixed, t)
            for t in on.threads(THREADS):
                keep(own_mixed, sums, all_, totals, t)
            for t in on.threads(THREADS):
                if block % count < shares:  # `joined_shares` reads no other
                    store(all_, totals, maximum, block, largest, total, mixed, t)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, largest, total, mixed):
        attend(qkv, cos, sin, positions, slots, in_pieces(keys), in_pieces(values), largest, total, mixed)

    return body
