"""Panels of numbers of two bytes or more, times x: K is cut into runs, each is summed in order, and then all together.

One row reads all runs at once: the more runs, the more cache lines are in flight from memory. Several rows have too
many sums for that and read fewer at a time, down to one, which changes no sum.
"""

from tvm.script import tirx as T

from build.kernels.cpu.level import Level, sums_in_registers, tile_columns
from build.kernels.cpu.panels import number
from build.kernels.cpu.vector import add_outer_product
from build.kernels.shapes import Linear
from export.weights.plain import FLOAT32
from export.weights.table import format_of
from runtime.artifact.layouts import PANEL


def run_product(level: Level, shape: Linear, rows: int, tiles: int):
    """Inline `product(p, total, x, x_sums, w, s, z)`: set total[: tiles * R * PANEL] to x times panel p.

    x is (tiles, K, R). Sums past N are garbage, but cause no faults.
    """
    k, lanes, parts = shape.k, level.lanes, PANEL // level.lanes
    runs = next(n for n in (level.in_flight // parts, 2, 1) if k % n == 0)
    room = 1 if tiles > 1 else max(sums_in_registers(level) // (rows * parts), 1)
    together = next(n for n in (4, 2, 1) if runs % n == 0 and n <= room)
    columns = tile_columns(level, rows * together)
    run, depth = k // runs, k // runs if rows == 1 else min(level.tile.depth, k // runs)
    vectors = tiles * rows * parts
    from_slab = tiles > 1 and format_of(shape.weight) is not FLOAT32  # whose panels can be read as they are
    multiply = _piece_product(level, rows, together, columns, run)
    size = vectors * lanes

    @T.inline
    def product(p, total, x, x_sums, w, s, z):  # noqa: ARG001
        sums = T.alloc_buffer((together, size), "float32")
        for first in T.unroll(runs // together):
            for t in T.unroll(together):
                for i in T.serial(vectors):
                    for v in T.vectorized(lanes):
                        sums[t, i * lanes + v] = T.float32(0)
            for block in T.serial(-(-run // depth)):
                start = first * together * run + block * depth
                count = T.min(depth, run - block * depth)
                if from_slab:
                    slab = T.alloc_buffer((depth, PANEL), "float32")
                    for d in T.serial(count):
                        for i in T.unroll(parts):
                            for v in T.vectorized(lanes):
                                slab[d, i * lanes + v] = number(w, p, start + d, i * lanes + v)
                    for m in T.serial(tiles):
                        multiply(x, m, start, count, sums, lambda step, column: slab[step - start, column])
                else:
                    for m in T.serial(tiles):
                        multiply(x, m, start, count, sums, lambda step, column: number(w, p, step, column))
            for t in T.unroll(together):
                for i in T.serial(vectors):
                    for v in T.vectorized(lanes):
                        if first * together + t == 0:
                            total[i * lanes + v] = sums[t, i * lanes + v]
                        else:
                            total[i * lanes + v] = total[i * lanes + v] + sums[t, i * lanes + v]

    return product


def _piece_product(level: Level, rows: int, together: int, columns: int, run: int):
    """Inline `multiply(x, m, start, count, sums, weight)`: go on with the sums (together, tiles * R * PANEL) of tile m.

    `count` steps from `start` on, and as many of the next runs, are added. `weight(step, column)` is a weight.
    """
    lanes, parts, size = level.lanes, columns // level.lanes, rows * columns

    @T.inline
    def multiply(x, m, start, count, sums, weight):
        for c in T.serial(PANEL // columns):
            kept = T.alloc_buffer((together * size,), "float32")
            for t in T.unroll(together):
                for r in T.unroll(rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            kept[t * size + r * columns + i * lanes + v] = sums[
                                t, (m * rows + r) * PANEL + c * columns + i * lanes + v
                            ]
            for d in T.serial(count):
                for t in T.unroll(together):
                    add_outer_product(
                        kept,
                        t * size,
                        rows,
                        columns,
                        lanes,
                        lambda r: x[m, start + t * run + d, r],
                        lambda column: weight(start + t * run + d, c * columns + column),
                    )
            for t in T.unroll(together):
                for r in T.unroll(rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            sums[t, (m * rows + r) * PANEL + c * columns + i * lanes + v] = kept[
                                t * size + r * columns + i * lanes + v
                            ]

    return multiply
