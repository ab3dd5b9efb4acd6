"""The matrix product on the tensor cores of sm_90a, for many rows: y = x W^T, with its neighbours in a layer.

As in `tensor_core.py`, a launch in front rounds x to float16, and outputs are stored as `split_sums.py` says. Between
these, each block computes a tile (`product.py`). It has no serial form: its threads do not all do the same.

Bytes per call: W once per tile of rows, and x, as float16, once per cluster of blocks, mostly through the second-level
(L2) cache. Operations: 2 * M * N * K.
"""

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding
from build.kernels.cuda.rounded_rows import product_of_rounded_rows
from build.kernels.cuda.split_sums import Store, stored_product
from build.kernels.cuda.warpgroups import wgmma
from build.kernels.cuda.warpgroups.cluster import blocks_of_cluster
from build.kernels.cuda.warpgroups.product import prepared_for, stages_of, warpgroup_product
from build.kernels.cuda.warpgroups.ring import Stage
from build.kernels.cuda.warpgroups.tiling import THREADS, WarpgroupTiling, tilings
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import vector_steps
from runtime.artifact.layouts import PANEL, VECTOR


def best_tiling(stored: Storage, rows: int, outputs: int, k: int, *, swiglu: bool = False) -> WarpgroupTiling:
    """The tiling with the lowest estimate, among those whose ring fits and whose parts of K have as many stages.

    If their number were not known when the kernel is compiled, ptxas would let each product wait for the one before.
    """
    weight_bytes = VECTOR / vector_steps(stored)
    fitting = [
        tiling
        for tiling in tilings(rows, swiglu=swiglu)
        if Stage.of(stored, tiling).fits and stages_of(stored, k, tiling) % tiling.splits == 0
    ]
    return min(fitting, key=lambda tiling: tiling.clocks(rows, outputs, k, weight_bytes))


def warpgroup_gemm(shape: Linear, on: Binding):
    """Body of `linear` for a shape that `tensor_core.suits` accepts: two launches, or three where K is split."""
    tiling = best_tiling(shape.weight, shape.rows, shape.n_out, shape.k, swiglu=shape.swiglu)
    product = stored_product(shape, tiling.splits, on, lambda store: _tiles(shape, tiling, on, store))
    return product_of_rounded_rows(shape, prepared_for(shape.weight, shape.rows, shape.k, tiling), on, product)


def _tiles(shape: Linear, tiling: WarpgroupTiling, on: Binding, store: Store):
    """A launch, inline `multiply(prepared, w, s, z, residual, target)`, in which a block computes a tile."""
    rows, n_out = shape.rows, shape.n_out
    row_blocks, column_blocks = tiling.row_blocks(rows), tiling.column_blocks(n_out)
    whole = rows % tiling.rows == 0 and n_out % (tiling.outputs * tiling.cluster) == 0
    multiply_tile = warpgroup_product(shape.weight, shape.n, shape.k, tiling, on)

    def sums(acc, piece, i, c):
        """Those of gate and up, or of column c."""
        return lambda half: acc[0, wgmma.place(piece, half if tiling.halves > 1 else c, i)]

    @T.inline
    def store_tile(acc, m, j, split, s, residual, target, t):
        for piece in on.unroll(tiling.rows // wgmma.COLUMN_STEP):
            for i in on.unroll(2):
                for c in on.unroll(wgmma.THREAD_ROWS // tiling.halves):
                    row = m + wgmma.column(t, piece, i)
                    column = j + tiling.output(t, c)
                    if whole:
                        store(sums(acc, piece, i, c), split, s, residual, target, row, column)
                    else:
                        if row < rows and column < n_out:
                            store(sums(acc, piece, i, c), split, s, residual, target, row, column)

    @T.inline
    def multiply_block(prepared, w, s, z, residual, target, m, j, rank, split):
        acc = T.alloc_buffer((1, wgmma.sums(tiling.rows)), "float32", scope=on.private)
        multiply_tile(prepared, w, s, z, j // PANEL, m, rank, split, acc)
        for t in on.threads(THREADS):
            store_tile(acc, m, j, split, s, residual, target, t)

    @T.inline
    def multiply(prepared, w, s, z, residual, target):
        for _ in blocks_of_cluster(tiling.cluster):
            for block in on.blocks(tiling.blocks(rows, n_out)):
                # neighbouring clusters share their part of W
                multiply_block(
                    prepared,
                    w,
                    s,
                    z,
                    residual,
                    target,
                    block // tiling.cluster % row_blocks * tiling.rows,
                    (block // (tiling.cluster * row_blocks) * tiling.cluster + block % tiling.cluster)
                    % column_blocks
                    * tiling.outputs,
                    block % tiling.cluster,
                    block // (row_blocks * column_blocks),
                )

    return multiply
