"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight; one block per row."""

from collections.abc import Callable
from math import prod
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding

THREADS = 256


def rms_norm(lead: tuple[int, ...], dim: int, eps: float, on: Binding = GPU) -> PrimFunc:
    """Kernel from x (*lead, dim) and weight (dim,) to y (*lead, dim), all float32."""
    rows = prod(lead)
    normalize = normalized_rows(rows, dim, eps, on, column=lambda _order, c: c)

    @T.prim_func
    def kernel(
        x_in: T.Buffer((*lead, dim), "float32"),
        weight: T.Buffer((dim,), "float32"),
        y_out: T.Buffer((*lead, dim), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        x = T.decl_buffer((rows, dim), "float32", data=x_in.data)
        y = T.decl_buffer((rows, dim), "float32", data=y_out.data)
        normalize(x, weight, None, y)

    return kernel


def normalized_rows(rows: int, dim: int, eps: float, on: Binding, *, column: Callable[[Any, Any], Any]):
    """A launch, inline `normalize(x, weight, order, y)`: row i of y = row i of x, normalised.

    Column c of y is column `column(order, c)` of x.
    """
    parts = -(-dim // THREADS)
    measure, inverse = sum_squares(dim, THREADS, on), inverse_rms(dim, eps)

    def normalized(x, weight, order, i, c, factor):
        at = column(order, c)
        return x[i, at] * factor * weight[at]

    @T.inline
    def normalize(x, weight, order, y):
        for i in on.blocks(rows):
            squares = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
            sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
            measure(x, i, squares, sums)
            for t in on.threads(THREADS):
                factor = T.alloc_buffer((1,), "float32", scope=on.private)
                factor[0] = inverse(sums)
                for c in T.serial(parts):
                    if c * THREADS + t < dim:
                        y[i, c * THREADS + t] = normalized(x, weight, order, i, c * THREADS + t, factor[0])

    return normalize


def sum_squares(dim: int, threads: int, on: Binding):
    """Inline `measure(x, i, squares, sums)`: set sums[:] to shares of the sum of squares of row i.

    There is one share per lane of a warp; `squares` holds the intermediate sums of the threads.
    """

    @T.inline
    def measure(x, i, squares, sums):
        for t in on.threads(threads):
            square = T.alloc_buffer((1,), "float32", scope=on.private)
            square[0] = T.float32(0)
            for c in T.serial(-(-dim // threads)):
                if c * threads + t < dim:
                    square[0] = square[0] + x[i, c * threads + t] * x[i, c * threads + t]
            squares[t] = square[0]
        for t in on.threads(threads):
            if t < WARP:
                part = T.alloc_buffer((1,), "float32", scope=on.private)
                part[0] = T.float32(0)
                for c in T.serial(threads // WARP):
                    part[0] = part[0] + squares[c * WARP + t]
                sums[t] = part[0]

    return measure


def inverse_rms(dim: int, eps: float):
    """`inverse(sums)`: 1 / sqrt(mean(x^2) + eps) from the shares of `sum_squares`; a TIR expression."""

    def inverse(sums: Any) -> Any:
        total = sums[0]
        for lane in range(1, WARP):
            total = total + sums[lane]
        return T.float32(1) / T.sqrt(total / T.float32(dim) + T.float32(eps))

    return inverse
