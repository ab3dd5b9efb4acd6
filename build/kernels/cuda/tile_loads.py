"""How tiles of x and W come to a ring in shared memory (`tile_ring.py`), and from there to the registers of a lane."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.async_copy import copier
from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.cuda.tile_ring import Groups, Ring
from build.kernels.cuda.tiling import THREADS
from build.kernels.cuda.weights import group_of
from export.weights.format import Storage
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL


class Matrix(NamedTuple):
    """Matrix `e` of those stacked in w, with a block's first panel of it; all (panels, ..., elements in 16 bytes)."""

    w: Any
    s: Any
    z: Any
    e: Any
    p: Any


def in_units(groups: Groups, numbers: Any) -> Any:
    """Scales or offsets, of which each panel has one for each group and column, as 16 bytes at a time."""
    if not groups.exist:
        return None
    panels, count, _ = numbers.shape
    return T.decl_buffer((panels, count, groups.units, groups.numbers), groups.dtype, data=numbers.data)


def starting(stored: Storage, n: int, k: int, ring: Ring, on: Binding):
    """Inlines `start_rows(x, rows_at, step, slot, shared, t)` and `start_weights(matrix, chunk, slot, shared, t)`.

    They start a thread's copies of a step of x and of a chunk of W to a slot of the ring. In the place of what lies
    beyond a matrix, they copy something within it: there, x is zero, or nobody stores the sums.
    """
    tiling, copy = ring.tiling, copier(on)
    panels, vectors = vector_layout(stored, n, k).shape[0], Chunks.of(stored, k).vectors

    def panel(matrix: Matrix, q: Any) -> Any:
        return matrix.e * panels + T.min(tiling.panel(matrix.p, q, panels // 2), panels - 1)

    def vector(chunk: Any, v: Any) -> Any:
        return T.min(chunk * QUAD + v, vectors - 1)

    @T.inline
    def start_rows(x, rows_at, step, slot, shared, t):
        for c in on.unroll(-(-ring.row_units // THREADS)):
            if c * THREADS + t < ring.row_units:
                copy(
                    x,
                    step,
                    rows_at[on.own(t), c],
                    t % WORDS,
                    shared.x,
                    ring.row_unit(slot, (c * THREADS + t) // WORDS, t % WORDS),
                )

    @T.inline
    def start_vector(matrix, chunk, slot, shared, q, v, column):
        copy(matrix.w, panel(matrix, q), vector(chunk, v), column, shared.w, ring.weight_unit(slot, q, v, column))

    @T.inline
    def start_group(groups, numbers, matrix, chunk, slot, target, q, v, i):
        group = group_of(stored, vector(chunk, v))
        copy(numbers, panel(matrix, q), group, i, target, ring.group_unit(groups, slot, q, v, i))

    @T.inline
    def start_groups(groups, numbers, matrix, chunk, slot, target, t):
        for c in on.unroll(-(-ring.group_units(groups) // THREADS)):
            if c * THREADS + t < ring.group_units(groups):
                start_group(
                    groups,
                    numbers,
                    matrix,
                    chunk,
                    slot,
                    target,
                    (c * THREADS + t) // groups.units // QUAD,
                    (c * THREADS + t) // groups.units % QUAD,
                    (c * THREADS + t) % groups.units,
                )

    @T.inline
    def start_weights(matrix, chunk, slot, shared, t):
        for c in on.unroll(ring.weight_units // THREADS):
            start_vector(
                matrix,
                chunk,
                slot,
                shared,
                (c * THREADS + t) // PANEL // QUAD,
                (c * THREADS + t) // PANEL % QUAD,
                t % PANEL,
            )
        if ring.scales.exist:
            start_groups(ring.scales, matrix.s, matrix, chunk, slot, shared.s, t)
        if ring.offsets.exist:
            start_groups(ring.offsets, matrix.z, matrix, chunk, slot, shared.z, t)

    return start_rows, start_weights


class Fragments(NamedTuple):
    """A lane's registers."""

    rows: Any  # pairs of x, for both products of a step
    words: Any  # of W as stored, for both
    scales: Any  # of the words' groups
    offsets: Any
    weights: Any  # pairs that are made of the words, for one product


def reading(ring: Ring, on: Binding):
    """Inlines `read_rows(shared, slot, j, fragments, t)` and `read_weights(shared, slot, part, fragments, t)`.

    They read what a lane needs: of x for product j of a step, and of part `part` of a chunk of W.
    """
    tiling, words, load_matrices = ring.tiling, ring.words, mma.matrix_loader(on)

    def row_units(slot: Any, j: Any, t: Any, r: Any) -> Callable[[Any, Any], Any]:
        """Where the rows of four matrices lie that make the first factor: 8 rows apart first, then pairs."""
        return lambda i, row: ring.row_unit(slot, tiling.first_row(t, r) + i % 2 * 8 + row, 2 * j + i // 2)

    def column(t: Any, c: Any) -> Any:
        """Column of a lane in piece c, counted through the block's panels."""
        return tiling.first_column(t, c) + t % WARP // QUAD

    @T.inline
    def read_rows(shared, slot, j, fragments, t):
        for r in on.unroll(tiling.row_pieces):
            load_matrices(shared.x, row_units(slot, j, t, r), fragments.rows, t, (j * tiling.row_pieces + r) * mma.A)

    @T.inline
    def read_words(source, unit, first, target, at, t):
        """Read some words of a unit at once. TVM would make vectors of `target` if they went there directly."""
        some = T.alloc_buffer((words,), "uint32", scope=on.private)
        for v in T.vectorized(words):
            some[v] = source[unit, first + v]
        for v in on.unroll(words):
            target[on.own(t), at + v] = some[v]

    @T.inline
    def read_group(groups, numbers, slot, target, t, at, column):
        target[on.own(t), at] = numbers[
            ring.group_unit(groups, slot, column // PANEL, t % QUAD, column % PANEL // groups.numbers),
            column % groups.numbers,
        ]

    @T.inline
    def read_weights(shared, slot, part, fragments, t):
        for c in on.unroll(tiling.column_pieces):
            read_words(
                shared.w,
                ring.weight_unit(slot, column(t, c) // PANEL, t % QUAD, column(t, c) % PANEL),
                part * words,
                fragments.words,
                c * words,
                t,
            )
            if ring.scales.exist:
                read_group(ring.scales, shared.s, slot, fragments.scales, t, c, column(t, c))
            if ring.offsets.exist:
                read_group(ring.offsets, shared.z, slot, fragments.offsets, t, c, column(t, c))

    return read_rows, read_weights
