"""Panels of numbers of two bytes or more, times x: K is cut into runs, each is summed in order, and then all together.

One row reads all runs at once: the more runs, the more cache lines are in flight from memory. Several rows have too
many sums for that and read fewer at a time, down to one, which changes no sum.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cpu.level import FEW_TILES, Level, sums_beside_prefetches, tile_columns
from build.kernels.cpu.panels import ITEMSIZE, as_read, number, padded_k, steps_together
from build.kernels.cpu.vector import AHEAD, LINE, add_outer_product, prefetch
from build.kernels.shapes import Linear
from export.weights.plain import FLOAT32
from export.weights.table import format_of, panel_layout
from runtime.artifact.layouts import PANEL

FEW_ROWS_DEPTH = 32  # steps of a run that these tiles share while they are in the L1 cache


def run_product(level: Level, shape: Linear, rows: int, tiles: int):
    """Inline `product(p, total, x, x_sums, w, s, z)`: set total[: tiles * R * PANEL] to x times panel p.

    x is (tiles, K as kept, R). Sums past N are garbage, but cause no faults.
    """
    turn, lanes, parts = steps_together(shape.weight), level.lanes, PANEL // level.lanes
    k = padded_k(shape.weight, shape.k)
    runs = next(n for n in (level.in_flight // parts, 2, 1) if k // turn % n == 0)
    few, run = tiles <= FEW_TILES, k // runs
    room = max(sums_beside_prefetches(level) // (rows * parts), 1) if few else 1
    together = next(n for n in (4, 2, 1) if runs % n == 0 and n <= room)
    columns = tile_columns(level, rows * together) if few else level.tile.columns
    depth = run if shape.rows == 1 else min(FEW_ROWS_DEPTH if few else level.tile.depth, run)
    size = tiles * rows * PANEL
    from_slab = not few and format_of(shape.weight) is not FLOAT32  # whose panels can be read as they are
    first_product = _piece_product(level, rows, together, columns, run, turn, _fetched_step(shape, few))
    next_product = _piece_product(level, rows, together, columns, run, turn, _fetched_step(shape, False))

    @T.inline
    def clear_sums(sums):
        for t in T.unroll(together):
            for i in T.serial(size // lanes):
                for v in T.vectorized(lanes):
                    sums[t, i * lanes + v] = T.float32(0)

    @T.inline
    def fill(w, p, start, count, slab):
        for d in T.serial(count // turn):
            for o in T.unroll(turn):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        slab[d * turn + o, i * lanes + v] = number(w, p, start + d * turn + o, i * lanes + v)

    @T.inline
    def multiply(w, p, x, start, count, sums):
        if from_slab:
            slab = T.alloc_buffer((depth, PANEL), "float32")
            fill(w, p, start, count, slab)
            for m in T.serial(tiles):
                next_product(w, p, x, m, start, count, sums, lambda step, column: slab[step - start, column])
        else:
            first_product(w, p, x, 0, start, count, sums, lambda step, column: number(w, p, step, column))
            for m in T.serial(tiles - 1):
                next_product(w, p, x, m + 1, start, count, sums, lambda step, column: number(w, p, step, column))

    @T.inline
    def add_up(sums, first, total):
        for t in T.unroll(together):
            for i in T.serial(size // lanes):
                for v in T.vectorized(lanes):
                    if first * together + t == 0:
                        total[i * lanes + v] = sums[t, i * lanes + v]
                    else:
                        total[i * lanes + v] = total[i * lanes + v] + sums[t, i * lanes + v]

    @T.inline
    def product(p, total, x, x_sums, w, s, z):  # noqa: ARG001
        sums = T.alloc_buffer((together, size), "float32")
        weights = as_read(w)
        for first in T.unroll(runs // together):
            clear_sums(sums)
            for block in T.serial(-(-run // depth)):
                multiply(weights, p, x, first * together * run + block * depth, T.min(depth, run - block * depth), sums)
            add_up(sums, first, total)

    return product


def _fetched_step(shape: Linear, fetches: bool):
    """Inline `fetch(w, p, step)`: prefetch the steps that are read at once AHEAD of this one, for several rows of x.

    One row needs none, since it reads several runs at once.
    """
    turn = steps_together(shape.weight)
    itemsize = turn * ITEMSIZE[panel_layout(shape.weight, shape.n, shape.k).dtype]

    @T.inline
    def fetch(w, p, step):
        if fetches and (shape.rows > 1 or turn > 1):
            for line in T.unroll(PANEL * itemsize // LINE):
                prefetch(w, p, step // turn + AHEAD // (PANEL * itemsize), line * LINE // itemsize)

    return fetch


def _piece_product(level: Level, rows: int, together: int, columns: int, run: int, turn: int, fetch: Callable[..., Any]):
    """Inline `multiply(w, p, x, m, start, count, sums, weight)`: go on with the sums of tile m.

    sums is (runs, tiles * R * PANEL). From `start` on, `count` steps are added, `turn` at a time, and as many of the
    next runs; `weight(step, column)` is a weight.
    """
    lanes, parts, size = level.lanes, columns // level.lanes, rows * columns

    @T.inline
    def multiply(w, p, x, m, start, count, sums, weight):
        for c in T.unroll(PANEL // columns):
            kept = T.alloc_buffer((together * size,), "float32")
            for t in T.unroll(together):
                for r in T.unroll(rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            kept[t * size + r * columns + i * lanes + v] = sums[
                                t, (m * rows + r) * PANEL + c * columns + i * lanes + v
                            ]
            for d in T.serial(count // turn):
                for t in T.unroll(together):
                    if c == 0:
                        fetch(w, p, start + t * run + d * turn)
                    for o in T.unroll(turn):
                        add_outer_product(
                            kept,
                            t * size,
                            rows,
                            columns,
                            lanes,
                            lambda r: x[m, start + t * run + d * turn + o, r],
                            lambda column: weight(start + t * run + d * turn + o, c * columns + column),
                        )
            for t in T.unroll(together):
                for r in T.unroll(rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            sums[t, (m * rows + r) * PANEL + c * columns + i * lanes + v] = kept[
                                t * size + r * columns + i * lanes + v
                            ]

    return multiply
