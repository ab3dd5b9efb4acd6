"""The matrix product: bound by arithmetic, so sums stay in registers, weights in the first-level cache and x in the second.

x is packed once per call, normed on the way, into tiles (rows / R, K, R), padded with zeros: the inner loop then reads both sides in order. A
thread takes a panel of outputs, goes through K in slabs of `depth` steps that it widens to float32 once, and each slab serves all rows.
"""

from tvm.script import tirx as T

from build.kernels.cpu.gemv import row_factor
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import is_float32, panel_slab, scale_outputs
from build.kernels.cpu.vector import silu
from build.kernels.shapes import Linear
from build.layout import PANEL


def gemm(level: Level, shape: Linear):
    """Body of `linear` for several rows."""
    rows, k, n, n_out = shape.rows, shape.k, shape.n, shape.n_out
    tile_rows = min(level.tile.rows, rows)
    tiles = -(-rows // tile_rows)
    panels = -(-n_out // PANEL)
    depth = min(level.tile.depth, k)
    direct = is_float32(shape.weight)
    fill = panel_slab(level, shape.weight)
    scale = scale_outputs(level, n)
    multiply = tile_product(level, tile_rows)
    pack = _packed_row(level, shape)
    lanes, parts = level.lanes, PANEL // level.lanes

    @T.inline
    def accumulate(packed, w, s, z, slab, p, total):
        """total (tiles * R, PANEL) = x times panel p."""
        for m in T.serial(tiles * tile_rows):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    total[m, i * lanes + v] = T.float32(0)
        for block in T.serial(-(-k // depth)):
            start = block * depth
            count = T.min(depth, k - start)
            if direct:
                panel_view = T.decl_buffer((w.shape[0] * k, PANEL), "float32", data=w.data)
                for m in T.serial(tiles):
                    multiply(packed, panel_view, p * k + start, m, start, count, total)
            else:
                fill(w, s, z, p, start, count, slab)
                for m in T.serial(tiles):
                    multiply(packed, slab, 0, m, start, count, total)
        if shape.weight.scaled:
            for m in T.serial(rows):
                row = T.decl_buffer((tiles * tile_rows * PANEL,), "float32", data=total.data)
                scale(row, m * PANEL, s, p)

    @T.inline
    def store(y, residual, total, m, j, column):
        if shape.residual:
            y[m, column] = residual[m, column] + total[m, j]
        else:
            y[m, column] = total[m, j]

    @T.inline
    def body(x, gain, w, s, z, residual, y):
        packed = T.alloc_buffer((tiles, k, tile_rows), "float32")
        for m in T.parallel(tiles):
            for r in T.serial(tile_rows):
                pack(x, gain, m, r, m * tile_rows + r, packed)
        for p in T.parallel(panels):
            total = T.alloc_buffer((tiles * tile_rows, PANEL), "float32")
            slab = T.alloc_buffer((depth, PANEL), "float32")
            accumulate(packed, w, s, z, slab, p, total)
            if shape.swiglu:
                up = T.alloc_buffer((tiles * tile_rows, PANEL), "float32")
                accumulate(packed, w, s, z, slab, panels + p, up)
                for m in T.serial(rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            total[m, i * lanes + v] = silu(total[m, i * lanes + v]) * up[m, i * lanes + v]
            for m in T.serial(rows):
                if n_out % PANEL == 0:
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            store(y, residual, total, m, i * lanes + v, p * PANEL + i * lanes + v)
                else:
                    for j in T.serial(T.min(PANEL, n_out - p * PANEL)):
                        store(y, residual, total, m, j, p * PANEL + j)

    return body


def _packed_row(level: Level, shape: Linear):
    """Inline `pack(x, gain, m, r, row, packed)`: packed[m, :, r] = the x of row `row`, normed; zeros beyond the last row."""
    k = shape.k
    factor = row_factor(level, shape)

    @T.inline
    def pack(x, gain, m, r, row, packed):
        if row < shape.rows:
            if shape.norm_eps is None:
                for c in T.serial(k):
                    packed[m, c, r] = x[shape.x_row(row), c]
            else:
                inverse_rms = T.alloc_buffer((1,), "float32")
                factor(x, shape.x_row(row), inverse_rms)
                for c in T.serial(k):
                    packed[m, c, r] = x[shape.x_row(row), c] * inverse_rms[0] * gain[c]
        else:
            for c in T.serial(k):
                packed[m, c, r] = T.float32(0)

    return pack


def tile_product(level: Level, tile_rows: int):
    """Inline `multiply(packed, w, w_start, m, start, count, total)`: total[m R :] += packed[m, start : start + count]^T w[w_start :], R x PANEL sums."""
    lanes, columns = level.lanes, level.tile.columns
    parts = columns // lanes

    @T.inline
    def multiply(packed, w, w_start, m, start, count, total):
        for c in T.serial(PANEL // columns):
            sums = T.alloc_buffer((tile_rows * columns,), "float32")
            for i in T.unroll(tile_rows * parts):
                for v in T.vectorized(lanes):
                    sums[i * lanes + v] = T.float32(0)
            for d in T.serial(count):
                for r in T.unroll(tile_rows):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            sums[(r * parts + i) * lanes + v] = (
                                sums[(r * parts + i) * lanes + v] + packed[m, start + d, r] * w[w_start + d, c * columns + i * lanes + v]
                            )
            for r in T.unroll(tile_rows):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        total[m * tile_rows + r, c * columns + i * lanes + v] = (
                            total[m * tile_rows + r, c * columns + i * lanes + v] + sums[(r * parts + i) * lanes + v]
                        )

    return multiply
