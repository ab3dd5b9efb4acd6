"""The matrix-vector product: bound by memory, so every weight is read once, in order, and all else is hidden behind that."""

from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.panels import panel_dot
from build.kernels.cpu.vector import silu
from build.kernels.shapes import Linear
from build.layout import PANEL


def gemv(level: Level, shape: Linear):
    """Body of `linear` for one row."""
    n, k = shape.n_out, shape.k
    panels = -(-n // PANEL)
    last = n - (panels - 1) * PANEL  # outputs in the last panel
    lanes, parts = level.lanes, PANEL // level.lanes
    dot = panel_dot(level, shape.weight, shape.n, k)
    row = shape.x_row(0)
    x_lanes, factor = fitting_lanes(level, k), row_factor(level, shape)

    @T.inline
    def store(y, residual, acc, j, column):
        if shape.residual:
            y[0, column] = residual[0, column] + acc[j]
        else:
            y[0, column] = acc[j]

    @T.inline
    def panel(x, w, s, z, residual, y, p):
        acc = T.alloc_buffer((PANEL,), "float32")
        dot(x, w, s, z, p, acc)
        if shape.swiglu:
            up = T.alloc_buffer((PANEL,), "float32")
            dot(x, w, s, z, panels + p, up)
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    acc[i * lanes + v] = silu(acc[i * lanes + v]) * up[i * lanes + v]
        if last == PANEL:
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    store(y, residual, acc, i * lanes + v, p * PANEL + i * lanes + v)
        else:
            for j in T.serial(T.if_then_else(p == panels - 1, last, PANEL)):
                store(y, residual, acc, j, p * PANEL + j)

    @T.inline
    def body(x_rows, gain, w, s, z, residual, y):
        x = T.alloc_buffer((k,), "float32")
        inverse_rms = T.alloc_buffer((1,), "float32")
        if shape.norm_eps is not None:
            factor(x_rows, row, inverse_rms)
        for c in T.serial(k // x_lanes):
            for v in T.vectorized(x_lanes):
                if shape.norm_eps is None:
                    x[c * x_lanes + v] = x_rows[row, c * x_lanes + v]
                else:
                    x[c * x_lanes + v] = x_rows[row, c * x_lanes + v] * inverse_rms[0] * gain[c * x_lanes + v]
        for p in T.parallel(panels):
            panel(x, w, s, z, residual, y, p)

    return body


def row_factor(level: Level, shape: Linear):
    """Inline `factor(x, row, out)`: out[0] = 1 / sqrt(mean(x[row]^2) + eps)."""
    k, eps = shape.k, shape.norm_eps
    lanes = fitting_lanes(level, k)

    @T.inline
    def factor(x, row, out):
        partial = T.alloc_buffer((lanes,), "float32")
        for v in T.vectorized(lanes):
            partial[v] = T.float32(0)
        for c in T.serial(k // lanes):
            for v in T.vectorized(lanes):
                partial[v] = partial[v] + x[row, c * lanes + v] * x[row, c * lanes + v]
        out[0] = T.float32(0)
        for v in T.unroll(lanes):
            out[0] = out[0] + partial[v]
        out[0] = T.float32(1) / T.sqrt(out[0] / T.float32(k) + T.float32(eps))

    return factor
