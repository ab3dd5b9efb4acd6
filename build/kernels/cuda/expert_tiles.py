"""The products of a mixture's experts on tensor cores: tiles of the pairs that chose an expert (`tile_product.py`).

Bytes per call: the matrices of the chosen experts, once per tile of pairs. Operations: 2 * pairs * N * K.
"""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.rounded_rows import Chunks, Prepared, rounded_rows
from build.kernels.cuda.tensor_core import best_tiling
from build.kernels.cuda.tile_product import tile_product
from build.kernels.cuda.tiling import THREADS
from build.kernels.cuda.weights import row_scale
from build.kernels.shapes import Linear, Mixture
from runtime.artifact.layouts import PANEL


def expert_tiles(shape: Mixture, n: int, k: int, pairs_per_row: int, on: Binding):
    """Two launches, inline `product(x, w, s, chosen, count, members, out)`, for weights and tokens that `fits` accepts.

    The first rounds x. Row i of out is the chosen expert's matrix (n, k) times row i // pairs_per_row of x. A block
    takes a tile of an expert's columns and of the pairs that chose it.
    """
    stored, chunks = shape.weight, Chunks.of(shape.weight, k)
    rows = Linear((shape.pairs // pairs_per_row,), n, k, stored)
    tiling = best_tiling(stored, shape.tokens, n, k, most_splits=1)  # as if all tokens chose the same expert
    row_blocks, column_blocks = tiling.row_blocks(shape.tokens), -(-n // tiling.outputs)
    prepared_as = Prepared(chunks.count, chunks.parts, rows.rows, "pairs")
    prepare = rounded_rows(rows, prepared_as, on)
    multiply = tile_product(stored, n, k, tiling, on, source=lambda place, i: place[0][place[1], i] // pairs_per_row)

    def scaled(found: Any, s: Any, row: Any) -> Any:
        return found if s is None else found * row_scale(stored, s, row)

    @T.inline
    def product(x, w, s, _chosen, count, members, out):
        prepared = T.alloc_buffer(prepared_as.shape, "uint32")
        prepare(x, None, None, prepared)
        for block in on.blocks(shape.n_experts * column_blocks * row_blocks):
            acc = T.alloc_buffer((on.copies(THREADS), tiling.sums), "float32", scope=on.private)
            e = block // (column_blocks * row_blocks)
            j = block // row_blocks % column_blocks * tiling.outputs
            m = block % row_blocks * tiling.rows
            multiply(prepared, (members, e), w, s, None, e, j // PANEL, m, count[e], 0, acc)
            for t in on.threads(THREADS):
                for r in on.unroll(tiling.row_pieces):
                    for c in on.unroll(tiling.output_pieces):
                        for i in on.unroll(mma.C):
                            row = m + tiling.row(t, r, i)
                            column = j + tiling.output(t, c, i)
                            if row < count[e] and column < n:
                                out[members[e, row], column] = scaled(
                                    acc[on.own(t), tiling.place(r, c, i)], s, e * n + column
                                )

    return product
