"""The end of every product: panels of sums become outputs, with SwiGLU and the residual where the shape has them."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import silu
from build.kernels.shapes import Linear
from runtime.artifact.layouts import PANEL


def panel_outputs(level: Level, shape: Linear, rows: int, product: Callable[..., Any]):
    """Inline `compute(p, residual, y, *operands)`: compute panel p of y.

    `product(p, sums, *operands)` is an inline that fills sums (rows * PANEL,), row by row, with panel p of x W^T;
    with SwiGLU it is called for the panel of gate and for that of up. `rows` may exceed the rows of y; only the rows
    of y are stored.
    """
    panels = -(-shape.n_out // PANEL)
    store = _store(level, shape)

    @T.inline
    def compute(p, residual, y, *operands):
        sums = T.alloc_buffer((rows * PANEL,), "float32")
        product(p, sums, *operands)
        if shape.swiglu:
            up = T.alloc_buffer((rows * PANEL,), "float32")
            product(panels + p, up, *operands)
            for m in T.serial(shape.rows):
                store(sums, up, m * PANEL, residual, y, m, p)
        else:
            for m in T.serial(shape.rows):
                store(sums, None, m * PANEL, residual, y, m, p)

    return compute


def _store(level: Level, shape: Linear):
    """Inline `store(sums, up, at, residual, y, row, p)`: compute panel p of y[row] from sums[at : at + PANEL].

    With SwiGLU, up[at :] is used as well.
    """
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
