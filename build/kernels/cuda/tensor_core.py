"""The matrix product on tensor cores, for many rows: y = x W^T, with RMSNorm in front and what comes behind it.

A launch in front rounds x to float16, normed and in the order of W's columns (`rounded_rows.py`). Then each block
computes a tile of the sums (`tile_product.py`), of a part of K where it is split (`split_sums.py`).

int8 and float8 are exact in float16; a scale per output is applied at the end. Weights of groups are rounded to float16
with their scales and offsets, as the graph's float16 weights are.

Bytes per call: W once per tile of rows and x, as float16, once per tile of columns, mostly through the second-level
(L2) cache. Operations: 2 * M * N * K.
"""

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import LARGE_SHARED_BYTES, Binding
from build.kernels.cuda.rounded_rows import Chunks, Prepared, product_of_rounded_rows
from build.kernels.cuda.split_sums import Store, stored_product
from build.kernels.cuda.tile_product import tile_product
from build.kernels.cuda.tile_ring import Ring
from build.kernels.cuda.tiling import MOST_SPLITS, THREADS, Tiling, tilings
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, vector_steps
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
    prepared_as = Prepared(chunks.count, chunks.parts, shape.rows, "pairs")
    tiling = best_tiling(shape.weight, shape.rows, shape.n_out, shape.k, swiglu=shape.swiglu)
    product = stored_product(shape, tiling.splits, on, lambda store: _tiles(shape, tiling, on, store))
    return product_of_rounded_rows(shape, prepared_as, on, product)


def _tiles(shape: Linear, tiling: Tiling, on: Binding, store: Store):
    """A launch, inline `multiply(prepared, w, s, z, residual, target)`, in which a block computes a tile."""
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
