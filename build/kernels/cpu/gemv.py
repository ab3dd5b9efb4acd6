"""The matrix-vector product (gemv): memory-bound, so each weight is read once, in order, which hides all other work."""

from tvm.script import tirx as T

from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import arranged_row, panel_dot, weight_groups
from build.kernels.cpu.row import prepared_row
from build.kernels.shapes import Linear
from runtime.artifact.layouts import PANEL


def gemv(level: Level, shape: Linear):
    """Body of `linear` for one row."""
    k = shape.k
    panels = -(-shape.n_out // PANEL)
    prepare, compute = prepared_row(level, shape), panel_outputs(level, shape, 1, panel_dot(level, shape))
    arrange = arranged_row(shape)

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        x = T.alloc_buffer((k,), "float32")
        x_sums = T.alloc_buffer((weight_groups(shape),), "float32")
        prepare(x_rows, 0, gain, order, x)
        arrange(x, x_sums)
        for p in T.parallel(panels):
            compute(p, residual, y, x, x_sums, w, s, z)

    return body
