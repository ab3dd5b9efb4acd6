"""The end of every product: a panel of sums becomes outputs, through SwiGLU and with the residual where the shape says so."""

from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import silu
from build.kernels.shapes import Linear
from build.layout import PANEL


def panel_store(level: Level, shape: Linear):
    """Inline `store(sums, up, at, residual, y, row, p)`: panel p of y[row] from sums[at : at + PANEL], with SwiGLU from up[at :] too."""
    n = shape.n_out
    lanes, parts = level.lanes, PANEL // level.lanes

    @T.inline
    def finish(sums, residual, y, row, j, column):
        if shape.residual:
            y[row, column] = residual[row, column] + sums[j]
        else:
            y[row, column] = sums[j]

    @T.inline
    def store(sums, up, at, residual, y, row, p):
        if shape.swiglu:
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    sums[at + i * lanes + v] = silu(sums[at + i * lanes + v]) * up[at + i * lanes + v]
        if n % PANEL == 0:
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    finish(sums, residual, y, row, at + i * lanes + v, p * PANEL + i * lanes + v)
        else:
            for j in T.serial(T.min(PANEL, n - p * PANEL)):
                finish(sums, residual, y, row, at + j, p * PANEL + j)

    return store
