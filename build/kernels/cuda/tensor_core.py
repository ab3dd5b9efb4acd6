"""The matrix product on tensor cores, for many rows: y = x W^T, with RMSNorm in front and what comes behind it.

A launch in front rounds x to float16, normed and in the order of W's columns (`rounded_rows.py`). Then each block
computes a tile of the sums (`tile_product.py`). Where too few tiles would be left for the multiprocessors, K is split
into parts, whose sums a third launch adds up, always in the same order.

int8 and float8 are exact in float16; a scale per output is applied at the end. Weights of groups are rounded to float16
with their scales and offsets, as the graph's float16 weights are.

Bytes per call: W once per tile of rows and x, as float16, once per tile of columns, mostly through the second-level
(L2) cache. Operations: 2 * M * N * K.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import LARGE_SHARED_BYTES, Binding
from build.kernels.cuda.rounded_rows import Chunks, product_of_rounded_rows
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.tile_product import tile_product
from build.kernels.cuda.tile_ring import Ring
from build.kernels.cuda.tiling import MOST_SPLITS, THREADS, Tiling, tilings
from build.kernels.cuda.weights import row_scale
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, scaled_by_rows, vector_steps
from runtime.artifact.layouts import PANEL, VECTOR

LEAST_ROWS = 16  # fewer would leave most of a product empty


def fits(stored: Storage, rows: int) -> bool:
    """Whether `tile_product` supports such a product and is worth using for it."""
    return rows >= LEAST_ROWS and format_of(stored).multiplies_float16


def suits(shape: Linear) -> bool:
    """Whether `tensor_core_gemm` supports such a shape and is worth using for it."""
    return fits(shape.weight, shape.rows)


def best_tiling(
    stored: Storage, rows: int, outputs: int, k: int, *, swiglu: bool = False, most_splits: int = MOST_SPLITS
) -> Tiling:
    """The tiling with the lowest estimate, among those whose ring fits and whose parts of K are not empty."""
    chunks, weight_bytes = Chunks.of(stored, k).count, VECTOR / vector_steps(stored)
    fitting = [
        tiling
        for tiling in tilings(swiglu=swiglu, most_splits=most_splits)
        if Ring.of(stored, tiling).bytes <= LARGE_SHARED_BYTES
        and (tiling.splits - 1) * -(-chunks // tiling.splits) < chunks
    ]
    return min(fitting, key=lambda tiling: tiling.clocks(rows, outputs, k, weight_bytes))


def tensor_core_gemm(shape: Linear, on: Binding):
    """Body of `linear` for a shape that `suits` accepts: two launches, or three where K is split."""
    chunks = Chunks.of(shape.weight, shape.k)
    tiling = best_tiling(shape.weight, shape.rows, shape.n_out, shape.k, swiglu=shape.swiglu)
    product = _product(shape, tiling, on) if tiling.splits == 1 else _split_product(shape, tiling, on)
    return product_of_rounded_rows(shape, chunks, on, product, by_pairs=True)


def _product(shape: Linear, tiling: Tiling, on: Binding):
    """A launch, inline `product(prepared, w, s, z, residual, y)`: sums over all of K, and what comes behind them."""
    finished = _finished_output(shape)

    @T.inline
    def store(found, _split, s, residual, y, row, column):
        y[row, column] = finished(found, s, residual, row, column)

    return _tiles(shape, tiling, on, store)


def _split_product(shape: Linear, tiling: Tiling, on: Binding):
    """Two launches, inline `product(prepared, w, s, z, residual, y)`: sums over parts of K, then as `_product`."""
    halves = tiling.halves

    @T.inline
    def store(found, split, _s, _residual, partial, row, column):
        for half in on.unroll(halves):
            partial[split, row, half * shape.n_out + column] = found(half)

    multiply, add_up = _tiles(shape, tiling, on, store), _sum_of_splits(shape, tiling, on)

    @T.inline
    def product(prepared, w, s, z, residual, y):
        partial = T.alloc_buffer((tiling.splits, shape.rows, shape.n), "float32")
        multiply(prepared, w, s, z, None, partial)
        add_up(partial, s, residual, y)

    return product


def _tiles(shape: Linear, tiling: Tiling, on: Binding, store: Callable[..., Any]):
    """A launch, inline `multiply(prepared, w, s, z, residual, target)`, in which a block computes a tile.

    It calls the inline `store(found, split, s, residual, target, row, column)` for each output; found(half) is a sum.
    """
    rows, n_out = shape.rows, shape.n_out
    row_blocks, column_blocks = tiling.row_blocks(rows), -(-n_out // tiling.outputs)
    # Without partial tiles, no store needs a guard; with guards, each store would wait for the one before.
    whole = rows % tiling.rows == 0 and n_out % tiling.outputs == 0
    width = 2 if n_out % 2 == 0 else 1  # neighbouring outputs of a lane that are stored at once
    multiply_tile = tile_product(shape.weight, shape.n, shape.k, tiling, on, source=lambda _members, i: i)

    def sums(acc, t, r, c, i):
        return lambda half: acc[on.own(t), tiling.place(r, c, i, half)]

    @T.inline
    def store_together(acc, m, j, split, s, residual, target, t, r, c, first):
        for v in T.vectorized(width):
            store(
                sums(acc, t, r, c, first + v),
                split,
                s,
                residual,
                target,
                m + tiling.row(t, r, first),
                j + tiling.output(t, c, first + v),
            )

    @T.inline
    def store_tile(acc, m, j, split, s, residual, target, t):
        for r in on.unroll(tiling.row_pieces):
            for c in on.unroll(tiling.output_pieces):
                for i in on.unroll(mma.C // width):
                    if whole:
                        store_together(acc, m, j, split, s, residual, target, t, r, c, i * width)
                    else:
                        if m + tiling.row(t, r, i * width) < rows and j + tiling.output(t, c, i * width) < n_out:
                            store_together(acc, m, j, split, s, residual, target, t, r, c, i * width)

    @T.inline
    def multiply_block(prepared, w, s, z, residual, target, m, j, split):
        acc = T.alloc_buffer((on.copies(THREADS), tiling.sums), "float32", scope=on.private)
        multiply_tile(prepared, None, w, s, z, 0, j // PANEL, m, rows, split, acc)
        for t in on.threads(THREADS):
            store_tile(acc, m, j, split, s, residual, target, t)

    @T.inline
    def multiply(prepared, w, s, z, residual, target):
        for block in on.blocks(tiling.blocks(rows, n_out)):
            # neighbouring blocks share their part of W
            multiply_block(
                prepared,
                w,
                s,
                z,
                residual,
                target,
                block % row_blocks * tiling.rows,
                block // row_blocks % column_blocks * tiling.outputs,
                block // (row_blocks * column_blocks),
            )

    return multiply


def _sum_of_splits(shape: Linear, tiling: Tiling, on: Binding):
    """A launch, inline `add_up(partial, s, residual, y)`, one thread per output: the parts' sums, one by one."""
    rows, n_out, parts = shape.rows, shape.n_out, -(-shape.n_out // THREADS)
    finished = _finished_output(shape)

    def sums(partial, row, column):
        def found(half):
            total = partial[0, row, half * n_out + column]
            for split in range(1, tiling.splits):
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
