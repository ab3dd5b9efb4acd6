"""The end of every product: panels of sums become outputs, with SwiGLU and the residual where the shape has them."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import silu
from build.kernels.shapes import Linear
from export.weights.table import scaled_by_rows
from runtime.artifact.layouts import PANEL


def panel_outputs(level: Level, shape: Linear, rows: int, product: Callable[..., Any]):
    """Inline `compute(p, residual, y, s, *operands)`: compute panel p of y.

    `product(p, sums, *operands)` is an inline that fills sums (rows * PANEL,), row by row, with panel p of x W^T;
    with SwiGLU it is called for the panel of gate and for that of up. `rows` may exceed the rows of y; only the rows
    of y are stored. Where the weight has one scale per output, s (N,), sums are multiplied by it here.
    """
    panels = -(-shape.n_out // PANEL)
    store = _store(level, shape)

    @T.inline
    def compute(p, residual, y, s, *operands):
        sums = T.alloc_buffer((rows * PANEL,), "float32")
        product(p, sums, *operands)
        if shape.swiglu:
            up = T.alloc_buffer((rows * PANEL,), "float32")
            product(panels + p, up, *operands)
            for m in T.serial(shape.rows):
                store(sums, up, m * PANEL, residual, y, s, m, p)
        else:
            for m in T.serial(shape.rows):
                store(sums, None, m * PANEL, residual, y, s, m, p)

    return compute


def _store(level: Level, shape: Linear):
    """Inline `store(sums, up, at, residual, y, s, row, p)`: compute panel p of y[row] from sums[at : at + PANEL].

    With SwiGLU, up[at :] is used as well. Each output is one expression of memory, whatever made the sums, so that the
    compiler fuses the same multiplications with additions for every number of rows.
    """
    n, panels = shape.n_out, -(-shape.n_out // PANEL)
    lanes, parts = level.lanes, PANEL // level.lanes
    scaled = scaled_by_rows(shape.weight)

    def output(sums, up, at, residual, s, row, p, column):
        value = sums[at + column] * s[p * PANEL + column] if scaled else sums[at + column]
        if shape.swiglu:
            second = up[at + column] * s[(panels + p) * PANEL + column] if scaled else up[at + column]
            value = silu(value) * second
        return residual[row, p * PANEL + column] + value if shape.residual else value

    @T.inline
    def store(sums, up, at, residual, y, s, row, p):
        if n % PANEL == 0:
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    y[row, p * PANEL + i * lanes + v] = output(sums, up, at, residual, s, row, p, i * lanes + v)
        else:
            for j in T.serial(T.min(PANEL, n - p * PANEL)):
                y[row, p * PANEL + j] = output(sums, up, at, residual, s, row, p, j)

    return store
