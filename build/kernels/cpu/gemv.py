"""The matrix-vector product: bound by memory, so every weight is read once, in order, and all else is hidden behind that."""

from tvm.script import tirx as T

from build.kernels.cpu.epilogue import panel_store
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import panel_dot
from build.kernels.cpu.row import prepared_row
from build.kernels.shapes import Linear
from build.layout import PANEL


def gemv(level: Level, shape: Linear):
    """Body of `linear` for one row."""
    k = shape.k
    panels = -(-shape.n_out // PANEL)
    dot, store = panel_dot(level, shape.weight, shape.n, k), panel_store(level, shape)
    prepare = prepared_row(level, shape)

    @T.inline
    def body(x_rows, gain, w, s, z, residual, y):
        x = T.alloc_buffer((k,), "float32")
        prepare(x_rows, 0, gain, x)
        for p in T.parallel(panels):
            sums = T.alloc_buffer((PANEL,), "float32")
            dot(x, w, s, z, p, sums)
            if shape.swiglu:
                up = T.alloc_buffer((PANEL,), "float32")
                dot(x, w, s, z, panels + p, up)
                store(sums, up, 0, residual, y, 0, p)
            else:
                store(sums, sums, 0, residual, y, 0, p)

    return body
