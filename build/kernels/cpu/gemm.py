"""The matrix product (gemm): compute-bound, so sums stay in registers, weights in the L1 cache and x in the L2 cache.

x is packed once per call into tiles (rows / R, K, R), padded with zeros, so that the inner loop reads both operands
in order; it is normalised on the way. A thread takes a panel of outputs and goes
through K in slabs of `depth` steps, which it widens to float32 once; each slab serves all rows.
"""

from tvm.script import tirx as T

from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import output_scale, panel_slab
from build.kernels.cpu.row import prepared_row
from build.kernels.cpu.vector import add_outer_product, clear
from build.kernels.shapes import Linear
from export.weights.plain import FLOAT32
from export.weights.table import format_of
from runtime.artifact.layouts import PANEL


def gemm(level: Level, shape: Linear):
    """Body of `linear` for several rows."""
    rows, k, n = shape.rows, shape.k, shape.n
    tile_rows = min(level.tile.rows, rows)
    tiles = -(-rows // tile_rows)
    panels = -(-shape.n_out // PANEL)
    depth = min(level.tile.depth, k)
    direct = format_of(shape.weight) is FLOAT32  # panels can be read as they are
    fill, scale = panel_slab(level, shape), output_scale(level, shape)
    multiply, pack = _tile_product(level, tile_rows), _packed_row(level, shape)
    lanes, parts = level.lanes, PANEL // level.lanes

    @T.inline
    def product(p, total, packed, w, s, z):
        slab = T.alloc_buffer((depth, PANEL), "float32")
        for i in T.serial(tiles * tile_rows * parts):
            for v in T.vectorized(lanes):
                total[i * lanes + v] = T.float32(0)
        for block in T.serial(-(-k // depth)):
            start = block * depth
            count = T.min(depth, k - start)
            if direct:
                rows_of_w = T.decl_buffer((-(-n // PANEL) * k, PANEL), "float32", data=w.data)
                for m in T.serial(tiles):
                    multiply(packed, rows_of_w, p * k + start, m, start, count, total)
            else:
                fill(w, s, z, p, start, count, slab)
                for m in T.serial(tiles):
                    multiply(packed, slab, 0, m, start, count, total)
        for m in T.serial(rows):
            scale(total, m * PANEL, s, p)

    compute = panel_outputs(level, shape, tiles * tile_rows, product)

    @T.inline
    def body(x, gain, order, w, s, z, residual, y):
        packed = T.alloc_buffer((tiles, k, tile_rows), "float32")
        for m in T.parallel(tiles):
            for r in T.serial(tile_rows):
                pack(x, gain, order, m, r, m * tile_rows + r, packed)
        for p in T.parallel(panels):
            compute(p, residual, y, packed, w, s, z)

    return body


def _packed_row(level: Level, shape: Linear):
    """Inline `pack(x, gain, order, m, r, row, packed)`: set packed[m, :, r] to the x of a row, or to zeros."""
    k = shape.k
    prepare = prepared_row(level, shape)

    @T.inline
    def pack(x, gain, order, m, r, row, packed):
        if row < shape.rows:
            prepared = T.alloc_buffer((k,), "float32")
            prepare(x, row, gain, order, prepared)
            for c in T.serial(k):
                packed[m, c, r] = prepared[c]
        else:
            for c in T.serial(k):
                packed[m, c, r] = T.float32(0)

    return pack


def _tile_product(level: Level, tile_rows: int):
    """Inline `multiply(packed, w, w_start, m, start, count, total)`: add `count` steps of K to the sums of tile m.

    The sums grow by packed[m, start : start + count]^T w[w_start :].
    """
    lanes, columns = level.lanes, level.tile.columns
    parts = columns // lanes

    @T.inline
    def multiply(packed, w, w_start, m, start, count, total):
        for c in T.serial(PANEL // columns):
            sums = T.alloc_buffer((tile_rows * columns,), "float32")
            clear(sums, tile_rows * parts, lanes)
            for d in T.serial(count):
                add_outer_product(
                    sums,
                    0,
                    tile_rows,
                    columns,
                    lanes,
                    lambda r: packed[m, start + d, r],
                    lambda column: w[w_start + d, c * columns + column],
                )
            for r in T.unroll(tile_rows):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        total[(m * tile_rows + r) * PANEL + c * columns + i * lanes + v] = (
                            total[(m * tile_rows + r) * PANEL + c * columns + i * lanes + v]
                            + sums[(r * parts + i) * lanes + v]
                        )

    return multiply
