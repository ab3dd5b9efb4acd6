"""What comes behind the sums of a product on tensor cores: those of parts of K are added up, and outputs are stored.

Where too few tiles would be left for the multiprocessors, K is split into parts, whose sums another launch adds up,
always in the same order.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import row_scale
from build.kernels.shapes import Linear
from export.weights.table import scaled_by_rows

THREADS = 256  # per block of the launch that adds up

Store = Callable[..., Any]  # inline `store(found, split, s, residual, target, row, column)`; found(half) is a sum
Tiles = Callable[
    [Store], Any
]  # makes a launch, inline `multiply(prepared, w, s, z, residual, target)`, which stores so


def stored_product(shape: Linear, splits: int, on: Binding, tiles: Tiles):
    """Inline `product(prepared, w, s, z, residual, y)`: a launch of tiles, and one that adds up `splits` parts of K."""
    return _whole_product(shape, tiles) if splits == 1 else _split_product(shape, splits, on, tiles)


def _whole_product(shape: Linear, tiles: Tiles):
    finished = _finished_output(shape)

    @T.inline
    def store(found, _split, s, residual, y, row, column):
        y[row, column] = finished(found, s, residual, row, column)

    return tiles(store)


def _split_product(shape: Linear, splits: int, on: Binding, tiles: Tiles):
    @T.inline
    def store(found, split, _s, _residual, partial, row, column):
        for half in on.unroll(shape.n // shape.n_out):
            partial[split, row, half * shape.n_out + column] = found(half)

    multiply, add_up = tiles(store), _sum_of_splits(shape, splits, on)

    @T.inline
    def product(prepared, w, s, z, residual, y):
        partial = T.alloc_buffer((splits, shape.rows, shape.n), "float32")
        multiply(prepared, w, s, z, None, partial)
        add_up(partial, s, residual, y)

    return product


def _sum_of_splits(shape: Linear, splits: int, on: Binding):
    """A launch, inline `add_up(partial, s, residual, y)`, one thread per output: the parts' sums, one by one."""
    rows, n_out, parts = shape.rows, shape.n_out, -(-shape.n_out // THREADS)
    finished = _finished_output(shape)

    def sums(partial, row, column):
        def found(half):
            total = partial[0, row, half * n_out + column]
            for split in range(1, splits):
                total = total + partial[split, row, half * n_out + column]
            return total

        return found

    @T.inline
    def store(found, s, residual, y, row, column):
        y[row, column] = finished(found, s, residual, row, column)

    @T.inline
    def add_up(partial, s, residual, y):
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                j = block % parts * THREADS + t
                if j < n_out:
                    store(sums(partial, i, j), s, residual, y, i, j)

    return add_up


def _finished_output(shape: Linear):
    """Function `finished(found, s, residual, row, column)`: an output from its sum, or those of gate and up.

    found(half) is a sum, without the scale that belongs to its whole row of W.
    """
    stored = shape.weight

    def finished(found: Callable[[int], Any], s: Any, residual: Any, row: Any, column: Any) -> Any:
        def scaled(half: int) -> Any:
            total = found(half)
            return total * row_scale(stored, s, half * shape.n_out + column) if scaled_by_rows(stored) else total

        result = gated(scaled(0), scaled(1)) if shape.swiglu else scaled(0)
        return result if residual is None else residual[row, column] + result

    return finished
