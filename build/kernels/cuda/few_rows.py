"""A few rows times a matrix on tensor cores, bound by the reads of the matrix: y = x W^T, with what comes behind it.

An H200 brings 19 bytes per clock to a multiprocessor (4.25 TB/s, 132 of them, 1.7 GHz), which can start 128
instructions of a lane: 13.5 for a weight of float16, 6.8 for one of int8, 3.4 for one of int4. A multiplication for
each weight and row would take as many as there are rows, and x comes from shared memory at 32 numbers per clock. So the
products are those of tensor cores, with weights as the side of 16 and rows as the side of 8: less than one instruction
for a weight, besides those that make it float16.

The order of K within a product does not matter. So a lane takes 16 bytes of an output, as they lie in memory, straight
into the registers of `mma.sync`: lane (g, i) of a warp, eight times four, loads vector 4 c + i of outputs g, g + 8,
g + 16 and g + 24 of a panel, and the same steps of row g of x. A launch before this one has rounded x to float16 and
laid it out for such loads (`rounded_rows`). Warps share K; the loads of a warp's next turn are in flight while it
multiplies. Their sums are added up in shared memory, in one order.

The rows of x are columns of the products, which no other column affects: a row has the same bits whichever rows are
there. Weights of groups are rounded to float16 with their scales and offsets.

Bytes per call: the weights, N * K * itemsize, each read once, and x once for each block, from the second-level (L2)
cache. Operations: 2 * M * N * K.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import MULTIPROCESSORS, WARP, Binding
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS, pair_reader
from build.kernels.cuda.rounded_rows import Chunks, Prepared, product_of_rounded_rows
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import group_of, parts_of, row_scale
from build.kernels.shapes import Linear
from export.weights.table import format_of, scaled_by_rows, vector_layout
from runtime.artifact.layouts import PANEL


@dataclass(frozen=True)
class FewRowsTuning:
    """What only a measurement decides.

    Measured on an H200, 2026-11-26: 2 rows of fp16 from 4096 numbers to 6144 took 17.6 us with 32 words and 2 panels,
    and 19.7 with 48 words and 1 panel; 2 rows of int8 to the 32000 outputs of a head, 39.6 and 41.1. The other products
    of a 7B model, in fp16, int8 and int4, took from 0.9 us less to 0.9 us more. Warps of (4, 8), tried with int4, took
    1.3 us less for those 6144 outputs, but 2.7 us more from 14336 numbers to 4096.
    """

    least_rows: int = 2  # one row takes `gemv.py` instead, which keeps x in float32
    warps: tuple[int, ...] = (8, 16)  # per block: the fewest that make `all_warps` over all blocks
    all_warps: int = 2048
    words: int = 32  # that a thread loads at once, of weights and x; two turns' words are in registers
    wide_panels: int = 2  # panels per block where there are many


TUNING = FewRowsTuning()
MOST_ROWS = 15  # more go to tiles in shared memory
WIDE = 2 * MULTIPROCESSORS  # blocks that a wide product has at least
OUTPUT_GROUPS = PANEL // 8  # of 8 outputs, one per load of a warp
PIECES = PANEL // mma.ROWS  # products of 16 outputs that make a panel
COLUMNS = mma.COLUMNS  # rows of x per product


def suits(shape: Linear) -> bool:
    """Whether `few_rows` supports such a shape and is worth using for it."""
    return TUNING.least_rows <= shape.rows <= MOST_ROWS and format_of(shape.weight).multiplies_float16


def few_rows(shape: Linear, on: Binding):
    """Body of `linear` for a shape that `suits` accepts: two launches."""
    chunks = Chunks.of(shape.weight, shape.k)
    prepared_as = Prepared(chunks.count, chunks.parts, shape.rows, "vectors")
    return product_of_rounded_rows(shape, prepared_as, on, _product(shape, chunks, on))


@dataclass(frozen=True)
class Blocks:
    """The work of one block: some panels, whose K its warps share."""

    panels: int
    warps: int
    count: int
    turns: int
    chunks: int  # per warp and turn

    @classmethod
    def of(cls, shape: Linear, chunks: Chunks) -> "Blocks":
        """With SwiGLU, a panel of gate and one of up; otherwise one, or several of a wide matrix."""
        outputs = -(-shape.n_out // PANEL)
        each = TUNING.wide_panels if outputs >= TUNING.wide_panels * WIDE and not shape.swiglu else 1
        count, halves = -(-outputs // each), shape.n // shape.n_out
        warps = next(
            (n for n in TUNING.warps if count * n >= TUNING.all_warps or 2 * n > chunks.count), TUNING.warps[-1]
        )
        stored = shape.weight
        group_parts = (1 if stored.grouped else 0) + (1 if stored.offsets != "none" else 0)
        weight_words = each * halves * OUTPUT_GROUPS * (WORDS + group_parts)
        words = weight_words + -(-shape.rows // COLUMNS) * chunks.pairs  # of a chunk
        together = min(max(TUNING.words // words, 1), -(-chunks.count // warps))
        return cls(each * halves, warps, count, -(-chunks.count // (warps * together)), together)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    def chunk(self, turn: Any, u: int, t: Any) -> Any:
        """The chunk that a thread's warp loads at place u of a turn."""
        return (turn * self.chunks + u) * self.warps + t // WARP


class Loaded(NamedTuple):
    """What a thread has loaded for a turn: words of weights, their groups' scales and offsets, and words of x."""

    words: Any
    scales: Any
    offsets: Any
    x: Any


def _product(shape: Linear, chunks: Chunks, on: Binding):
    """The second launch, inline `product(prepared, w, s, z, residual, y)`."""
    stored, blocks, tiles = shape.weight, Blocks.of(shape, chunks), -(-shape.rows // COLUMNS)
    threads, pieces, loads = blocks.threads, blocks.panels * PIECES, blocks.chunks * blocks.panels * OUTPUT_GROUPS
    load, take = _loading(shape, chunks, blocks, on)
    add_up = _adding_up(shape, blocks, on)
    read, multiply = pair_reader(stored, on), mma.multiplier(on)
    every_chunk = chunks.count == blocks.turns * blocks.chunks * blocks.warps
    parts = parts_of(vector_layout(stored, shape.n, shape.k))
    # numbers per thread; what a storage lacks takes one place
    x_words = blocks.chunks * tiles * chunks.pairs
    scales_size, offsets_size = (loads if stored.grouped else 1), (loads if stored.offsets != "none" else 1)

    def weights(now, t, u, piece, j, i):
        """Register i of product j of a piece: outputs 8 apart first, then pairs."""
        at = (u * pieces + piece) * 2 + i % 2
        scale = now.scales[on.own(t), at] if stored.grouped else None
        offset = now.offsets[on.own(t), at] if stored.offsets != "none" else None
        return read(lambda word: now.words[on.own(t), at * WORDS + word], 2 * j + i // 2, scale, offset)

    @T.inline
    def place(now, a, t, u, j):
        for piece in on.unroll(pieces):
            for i in on.unroll(mma.A):
                a[on.own(t), piece * mma.A + i] = weights(now, t, u, piece, j, i)

    @T.inline
    def multiply_pieces(now, a, acc, t, u, j):
        for tile in on.unroll(tiles):
            for piece in on.unroll(pieces):
                multiply(
                    acc,
                    a,
                    now.x,
                    t,
                    (tile * pieces + piece) * mma.C,
                    piece * mma.A,
                    (u * tiles + tile) * chunks.pairs + mma.B * j,
                )

    @T.inline
    def multiply_chunk(now, a, acc, turn, u, j):
        for t in on.threads(threads):
            if every_chunk:
                place(now, a, t, u, j)
            else:
                if blocks.chunk(turn, u, t) < chunks.count:
                    place(now, a, t, u, j)
        for t in on.threads(threads):
            if every_chunk:
                multiply_pieces(now, a, acc, t, u, j)
            else:  # all lanes of a warp agree
                if blocks.chunk(turn, u, t) < chunks.count:
                    multiply_pieces(now, a, acc, t, u, j)

    @T.inline
    def multiply_turn(now, a, acc, turn):
        for u in on.unroll(blocks.chunks):
            for j in on.unroll(chunks.pairs // mma.B):
                multiply_chunk(now, a, acc, turn, u, j)

    @T.inline
    def body(prepared, w, s, z, residual, y, block, acc, now, next_):
        a = T.alloc_buffer((on.copies(threads), pieces * mma.A), "uint32", scope=on.private)
        partial = T.alloc_buffer((blocks.warps, blocks.panels, COLUMNS, PANEL), "float32", scope=on.shared)
        for t in on.threads(threads):
            for i in on.unroll(tiles * pieces * mma.C):
                acc[on.own(t), i] = T.float32(0)
            load(prepared, w, s, z, block, next_, 0, t)
        for turn in T.serial(blocks.turns, unroll=False):  # unrolled, loads would move to where they are needed
            for t in on.threads(threads):
                take(next_, now, t)
                if turn + 1 < blocks.turns:
                    load(prepared, w, s, z, block, next_, turn + 1, t)
            multiply_turn(now, a, acc, turn)
        for tile in on.unroll(tiles):
            add_up(acc, partial, s, residual, y, block, tile)

    @T.inline
    def product(prepared, w_in, s, z, residual, y):
        w = T.decl_buffer((*w_in.shape[:3], WORDS), "uint32", data=w_in.data)
        for block in on.blocks(blocks.count):
            acc = T.alloc_buffer((on.copies(threads), tiles * pieces * mma.C), "float32", scope=on.private)
            words = T.alloc_buffer((on.copies(threads), loads * WORDS), "uint32", scope=on.private)
            scales = T.alloc_buffer((on.copies(threads), scales_size), parts["s"][1], scope=on.private)
            offsets = T.alloc_buffer((on.copies(threads), offsets_size), parts["z"][1], scope=on.private)
            x = T.alloc_buffer((on.copies(threads), x_words), "uint32", scope=on.private)
            next_words = T.alloc_buffer((on.copies(threads), loads * WORDS), "uint32", scope=on.private)
            next_scales = T.alloc_buffer((on.copies(threads), scales_size), parts["s"][1], scope=on.private)
            next_offsets = T.alloc_buffer((on.copies(threads), offsets_size), parts["z"][1], scope=on.private)
            next_x = T.alloc_buffer((on.copies(threads), x_words), "uint32", scope=on.private)
            body(
                prepared,
                w,
                s,
                z,
                residual,
                y,
                block,
                acc,
                Loaded(words, scales, offsets, x),
                Loaded(next_words, next_scales, next_offsets, next_x),
            )

    return product


def _loading(shape: Linear, chunks: Chunks, blocks: Blocks, on: Binding):
    """Inlines `load(prepared, w, s, z, block, next_, turn, t)` and `take(next_, now, t)`.

    `load` starts a thread's loads of a turn; `take` makes them what is multiplied, and their registers free.
    """
    rows, stored, tiles = shape.rows, shape.weight, -(-shape.rows // COLUMNS)
    each = blocks.panels // (2 if shape.swiglu else 1)  # panels of outputs
    last, half = -(-shape.n_out // PANEL) - 1, -(-shape.n // PANEL) // 2
    every_chunk = chunks.count == blocks.turns * blocks.chunks * blocks.warps
    offsets = stored.offsets != "none"

    def panel(block, q):
        """Panel of the matrix that is panel q of a block; a block past the last panel computes that again."""
        return T.min(block * each + q % each, last) + q // each * half

    @T.inline
    def load_weights(c, w, block, next_, u, t):
        for q in on.unroll(blocks.panels):
            for i in on.unroll(OUTPUT_GROUPS):
                for v in T.vectorized(WORDS):
                    next_.words[on.own(t), ((u * blocks.panels + q) * OUTPUT_GROUPS + i) * WORDS + v] = w[
                        panel(block, q),
                        T.min(c * QUAD + t % QUAD, chunks.vectors - 1),
                        i * 8 + t % WARP // QUAD,
                        v,
                    ]

    @T.inline
    def load_groups(part, of, c, block, u, t):
        for q in on.unroll(blocks.panels):
            for i in on.unroll(OUTPUT_GROUPS):
                of[on.own(t), (u * blocks.panels + q) * OUTPUT_GROUPS + i] = part[
                    panel(block, q),
                    group_of(stored, T.min(c * QUAD + t % QUAD, chunks.vectors - 1)),
                    i * 8 + t % WARP // QUAD,
                ]

    @T.inline
    def load_rows(c, prepared, next_, u, t):
        for tile in on.unroll(tiles):
            for part in on.unroll(chunks.parts):
                if (tile + 1) * COLUMNS <= rows:
                    for v in T.vectorized(WORDS):
                        next_.x[on.own(t), ((u * tiles + tile) * chunks.parts + part) * WORDS + v] = prepared[
                            c, part, tile * COLUMNS + t % WARP // QUAD, t % QUAD, v
                        ]
                else:
                    if tile * COLUMNS + t % WARP // QUAD < rows:
                        for v in T.vectorized(WORDS):
                            next_.x[on.own(t), ((u * tiles + tile) * chunks.parts + part) * WORDS + v] = prepared[
                                c, part, tile * COLUMNS + t % WARP // QUAD, t % QUAD, v
                            ]
                    else:
                        for v in on.unroll(WORDS):
                            next_.x[on.own(t), ((u * tiles + tile) * chunks.parts + part) * WORDS + v] = T.uint32(0)

    @T.inline
    def load_chunk(prepared, w, s, z, block, next_, c, u, t):
        load_rows(c, prepared, next_, u, t)
        load_weights(c, w, block, next_, u, t)
        if stored.grouped:
            load_groups(s, next_.scales, c, block, u, t)
            if offsets:
                load_groups(z, next_.offsets, c, block, u, t)

    @T.inline
    def load(prepared, w, s, z, block, next_, turn, t):
        for u in on.unroll(blocks.chunks):
            if every_chunk:
                load_chunk(prepared, w, s, z, block, next_, blocks.chunk(turn, u, t), u, t)
            else:
                if blocks.chunk(turn, u, t) < chunks.count:
                    load_chunk(prepared, w, s, z, block, next_, blocks.chunk(turn, u, t), u, t)

    @T.inline
    def copy(source, target, t):
        for i in on.unroll(source.shape[1]):
            target[on.own(t), i] = source[on.own(t), i]

    @T.inline
    def take(next_, now, t):
        copy(next_.words, now.words, t)
        copy(next_.x, now.x, t)
        if stored.grouped:
            copy(next_.scales, now.scales, t)
            if offsets:
                copy(next_.offsets, now.offsets, t)

    return load, take


def _adding_up(shape: Linear, blocks: Blocks, on: Binding):
    """Inline `add_up(acc, partial, s, residual, y, block, tile)`: the warps' sums of 8 rows, added one by one."""
    rows, n_out, stored, threads = shape.rows, shape.n_out, shape.weight, blocks.threads
    pieces, halves = blocks.panels * PIECES, 2 if shape.swiglu else 1
    each = blocks.panels // halves
    results = each * COLUMNS * PANEL

    def total(partial, q, row, lane):
        found = partial[0, q, row, lane]
        for warp in range(1, blocks.warps):
            found = found + partial[warp, q, row, lane]
        return found

    def output(partial, s, residual, e, i, j):
        def scaled(half):
            found = total(partial, half * each + e // (COLUMNS * PANEL), e // PANEL % COLUMNS, e % PANEL)
            return found * row_scale(stored, s, half * n_out + j) if scaled_by_rows(stored) else found

        found = gated(scaled(0), scaled(1)) if shape.swiglu else scaled(0)
        return found if residual is None else residual[i, j] + found

    @T.inline
    def keep(acc, partial, tile, t):
        for piece in on.unroll(pieces):
            for i in on.unroll(mma.C):
                partial[
                    t // WARP,
                    piece // PIECES,
                    t % QUAD * 2 + i % 2,
                    piece % PIECES * mma.ROWS + mma.fragment_row(t, i // 2),
                ] = acc[on.own(t), (tile * pieces + piece) * mma.C + i]

    @T.inline
    def add_up(acc, partial, s, residual, y, block, tile):
        for t in on.threads(threads):
            keep(acc, partial, tile, t)
        for t in on.threads(threads):
            for c in T.serial(-(-results // threads)):
                e = c * threads + t
                i = tile * COLUMNS + e // PANEL % COLUMNS
                j = (block * each + e // (COLUMNS * PANEL)) * PANEL + e % PANEL
                if e < results and i < rows and j < n_out:
                    y[i, j] = output(partial, s, residual, e, i, j)

    return add_up
