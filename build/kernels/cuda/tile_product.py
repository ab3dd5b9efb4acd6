"""One block's part of a product on tensor cores: a tile of rows of x times columns of W, along some chunks of K.

Copies to shared memory run ahead of the products (`tile_ring.py`), which take float16 and add up in float32. What the
first products of a step need is read during the last of the step before, so that tensor cores have work while the
threads wait at the barrier between steps.

As the order of K within a product does not matter, a lane takes its numbers of W from the 16 bytes in which they are
stored, and x comes in the same order. The warps along the rows, one or two, make float16 of each number of W, in
registers (`pair_weights.py`).
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.async_copy import copy_groups
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS, pair_reader
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.cuda.tile_loads import Fragments, Matrix, in_units, reading, starting
from build.kernels.cuda.tile_ring import AHEAD, STEPS, Ring, shared_parts
from build.kernels.cuda.tiling import THREADS, Tiling
from export.weights.format import Storage


def tile_product(stored: Storage, n: int, k: int, tiling: Tiling, on: Binding, *, source: Callable[[Any, Any], Any]):
    """Inline `multiply(x, members, w, s, z, e, p, m, stop, split, acc)`: one block's sums.

    These are rows m .. m + tiling.rows, below `stop`, times the panels from `p` on of matrix `e` in w, along part
    `split` of K. Row i is row source(members, i) of x, which `rounded_rows` has prepared. Each lane's sums are in acc
    where `Tiling.place` says. A scale per output is left to the caller; group scales are multiplied in.
    """
    ring, chunks = Ring.of(stored, tiling), Chunks.of(stored, k)
    each, parts = -(-chunks.count // tiling.splits), ring.parts  # chunks of a split, steps of a chunk
    start_rows, start_weights = starting(stored, n, k, ring, on)
    close, wait = copy_groups(on)
    read_step, multiply_step = step_product(stored, ring, on)
    x_loads = -(-ring.row_units // THREADS)
    scales, offsets = ring.scales, ring.offsets

    @T.inline
    def place_rows(members, m, stop, rows_at, t):
        """Set rows_at to where the rows that a thread copies are in x; rows past the last are the last again."""
        for c in on.unroll(x_loads):
            rows_at[on.own(t), c] = source(members, T.min(m + (c * THREADS + t) // WORDS, stop - 1))

    @T.inline
    def start(x, rows_at, matrix, first, chunk, part, shared, t):
        """Start a thread's copies for part `part` of a chunk, counted from chunk `first` of K."""
        start_rows(x, rows_at, (first + chunk) * parts + part, (chunk * parts + part) % STEPS, shared, t)
        if part == 0:
            start_weights(matrix, first + chunk, chunk % ring.chunks, shared, t)

    @T.inline
    def start_later(x, rows_at, matrix, first, chunk, later, count, shared, t):
        """The same for the step that is `later` steps behind the first of a chunk, if there is one."""
        if chunk + later // parts < count:
            start(x, rows_at, matrix, first, chunk + later // parts, later % parts, shared, t)
        close()

    @T.inline
    def multiply_chunks(x, rows_at, matrix, first, count, shared, fragments, acc):
        for t in on.threads(THREADS):
            for later in on.unroll(AHEAD):
                start_later(x, rows_at, matrix, first, 0, later, count, shared, t)
        for t in on.threads(THREADS):
            wait(AHEAD - 1)
            read_step(shared, 0, 0, count, fragments, t)
        for chunk in T.serial(count):
            for part in on.unroll(parts):
                for t in on.threads(THREADS):
                    wait(AHEAD - 2)  # this step is there already; so will the next be
                    start_later(x, rows_at, matrix, first, chunk, part + AHEAD, count, shared, t)
                multiply_step(shared, chunk, part, count, fragments, acc)

    @T.inline
    def multiply(x_in, members, w_in, s_in, z_in, e, p, m, stop, split, acc):
        x = T.decl_buffer((chunks.count * parts, x_in.shape[2], WORDS, QUAD), "uint32", data=x_in.data)
        w = T.decl_buffer((*w_in.shape[:3], WORDS), "uint32", data=w_in.data)
        memory = T.alloc_buffer((ring.bytes // 4,), "uint32", scope=on.large_shared)
        a = T.alloc_buffer((on.copies(THREADS), 2 * tiling.row_pieces * mma.A), "uint32", scope=on.private)
        words = T.alloc_buffer((on.copies(THREADS), tiling.column_pieces * ring.words), "uint32", scope=on.private)
        scale = T.alloc_buffer((on.copies(THREADS), tiling.column_pieces), scales.dtype, scope=on.private)
        offset = T.alloc_buffer((on.copies(THREADS), tiling.column_pieces), offsets.dtype, scope=on.private)
        b = T.alloc_buffer((on.copies(THREADS), tiling.column_pieces * mma.B), "uint32", scope=on.private)
        rows_at = T.alloc_buffer((on.copies(THREADS), x_loads), "int32", scope=on.private)
        for t in on.threads(THREADS):
            for i in on.unroll(tiling.sums):
                acc[on.own(t), i] = T.float32(0)
            if m < stop:
                place_rows(members, m, stop, rows_at, t)
        multiply_chunks(
            x,
            rows_at,
            Matrix(w, in_units(scales, s_in), in_units(offsets, z_in), e, p),
            split * each,
            # a tile without rows reads nothing
            T.if_then_else(m < stop, T.min(each, chunks.count - split * each), 0),
            shared_parts(ring, memory),
            Fragments(a, words, scale, offset, b),
            acc,
        )

    return multiply


def step_product(stored: Storage, ring: Ring, on: Binding):
    """Inlines `read_step(shared, chunk, part, count, fragments, t)` and `multiply_step(...)`.

    `read_step` reads what the first products of a step need; none of a chunk that is not below `count`. Then
    `multiply_step(shared, chunk, part, count, fragments, acc)` adds the step's products to the sums, and does the same
    for the next step.
    """
    tiling, words = ring.tiling, ring.words
    read_rows, read_weights = reading(ring, on)
    read_pair, product = pair_reader(stored, on), mma.multiplier(on)

    def weights(fragments, t, part, j, c, i):
        """Pair i of W for product j of a step and column piece c."""
        scale = fragments.scales[on.own(t), c] if ring.scales.exist else None
        offset = fragments.offsets[on.own(t), c] if ring.offsets.exist else None

        def word(at):
            return fragments.words[on.own(t), c * words + at - part * words]

        return read_pair(word, part * WORDS + j * mma.B + i, scale, offset)

    @T.inline
    def place_weights(fragments, part, j, t):
        for c in on.unroll(tiling.column_pieces):
            for i in on.unroll(mma.B):
                fragments.weights[on.own(t), c * mma.B + i] = weights(fragments, t, part, j, c, i)

    @T.inline
    def multiply(fragments, j, acc):
        for t in on.threads(THREADS):
            for r in on.unroll(tiling.row_pieces):
                for c in on.unroll(tiling.column_pieces):
                    product(
                        acc,
                        fragments.rows,
                        fragments.weights,
                        t,
                        tiling.place(r, c),
                        (j * tiling.row_pieces + r) * mma.A,
                        c * mma.B,
                    )

    @T.inline
    def read_step(shared, chunk, part, count, fragments, t):
        if chunk < count:
            read_weights(shared, chunk % ring.chunks, part, fragments, t)
            read_rows(shared, (chunk * ring.parts + part) % STEPS, 0, fragments, t)

    @T.inline
    def multiply_step(shared, chunk, part, count, fragments, acc):
        for t in on.threads(THREADS):
            read_rows(shared, (chunk * ring.parts + part) % STEPS, 1, fragments, t)
            place_weights(fragments, part, 0, t)
        multiply(fragments, 0, acc)
        for t in on.threads(THREADS):
            place_weights(fragments, part, 1, t)
            read_step(shared, chunk + (part + 1) // ring.parts, (part + 1) % ring.parts, count, fragments, t)
        multiply(fragments, 1, acc)

    return read_step, multiply_step
