"""The matrix product on tensor cores, for many rows: y = x W^T, with SwiGLU or the residual behind.

x and W are float16, the sums float32. A block computes 128 columns of a tile of rows, in steps of 32 along K that
pass through shared memory as float16; meanwhile, what the next step needs is in flight from memory. Each of its 8
warps takes a part of the tile, in products of 16 x 8 (`mma.py`). With SwiGLU, the columns are 64 of gate and the 64
of up that go with them, so that a lane holds both numbers of an output.

x is rounded to float16 here, once per block. int8 and float8 are exact in float16; a scale per output is applied at the
end. Weights of groups are computed in float32 and rounded to float16 with their scales and offsets, as the graph's
float16 weights are.

Bytes per call: W once per tile of rows, x once per 128 columns, mostly through the second-level (L2) cache.
Operations: 2 * M * N * K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import PAIR, pair
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import Loading, factor, group_of, group_scaling, parts_of, row_scale
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, scaled_by_rows, vector_layout, vector_steps
from runtime.artifact.layouts import PANEL

WARPS_ALONG_ROWS, WARPS_ALONG_COLUMNS = 2, 4
THREADS = WARPS_ALONG_ROWS * WARPS_ALONG_COLUMNS * WARP
COLUMNS, DEPTH = 128, 32
PANELS = COLUMNS // PANEL  # per block
COLUMN_PIECES = COLUMNS // WARPS_ALONG_COLUMNS // mma.COLUMNS  # per warp
PAIRS = DEPTH // PAIR  # per row in one step
# Stride of a row in shared memory, in pairs: lanes that read neighbouring rows hit different banks.
# The buffer is flat, because TVM would trim the padding.
STRIDE = PAIRS + 4
LEAST_ROWS = 16  # fewer would leave most of a product empty
BLOCKS = 132  # multiprocessors of an H200: tiles shrink where there would be fewer
ROW_PIECES = (4, 2, 1)  # per warp: tiles of 128, 64 or 32 rows
FLOATS = 4  # numbers of x in 16 bytes
STORED_PAIRS = 4  # pairs in 16 bytes of shared memory
X_PARTS = DEPTH // FLOATS  # loads of 16 bytes per row in one step
NUMBERS = COLUMNS * DEPTH // THREADS  # numbers of W that a thread loads in one step


@dataclass(frozen=True)
class Tiling:
    """Work of one block: `row_pieces` products of 16 rows per warp.

    `halves` is the number of columns per output: 2 where they are gate and up.
    """

    row_pieces: int
    halves: int = 1

    @classmethod
    def of(cls, rows: int, outputs: int, *, swiglu: bool = False) -> "Tiling":
        """The largest tiles that give every multiprocessor one and are not half empty."""
        tilings = [cls(pieces, 2 if swiglu else 1) for pieces in ROW_PIECES]
        return next((t for t in tilings if 2 * rows > t.rows and t.blocks(rows, outputs) >= BLOCKS), tilings[-1])

    def blocks(self, rows: int, outputs: int) -> int:
        """Number of blocks in a product."""
        return -(-rows // self.rows) * -(-outputs // self.outputs)

    @property
    def rows(self) -> int:
        """Rows per block."""
        return WARPS_ALONG_ROWS * self.row_pieces * mma.ROWS

    @property
    def outputs(self) -> int:
        """Outputs per block."""
        return COLUMNS // self.halves

    @property
    def output_pieces(self) -> int:
        """Pieces of 8 outputs per warp."""
        return COLUMN_PIECES // self.halves

    @property
    def sums(self) -> int:
        """Sums per lane."""
        return self.row_pieces * COLUMN_PIECES * mma.C

    def panel(self, first: Any, q: Any, half: int) -> Any:
        """Panel of the matrix that is panel q of a block.

        `first` is the block's first panel, and `half` panels lie between gate and up.
        """
        each = PANELS // self.halves
        return first + q % each + q // each * half

    def tile_row(self, q: Any, lane: Any) -> Any:
        """Row in shared memory of output `lane` of the block's panel q.

        Each warp's part holds its outputs, for gate and then for up.
        """
        each, part = PANELS // self.halves, self.output_pieces * mma.COLUMNS
        output = q % each * PANEL + lane
        return output // part * (COLUMNS // WARPS_ALONG_COLUMNS) + q // each * part + output % part

    def row(self, t: Any, r: Any, i: Any) -> Any:
        """Row, within the block, of a lane's sum i of row piece r."""
        return (t // WARP // WARPS_ALONG_COLUMNS * self.row_pieces + r) * mma.ROWS + mma.fragment_row(t, i // 2)

    def output(self, t: Any, c: Any, i: Any) -> Any:
        """Output, within the block, of a lane's sum i of output piece c."""
        return (t // WARP % WARPS_ALONG_COLUMNS * self.output_pieces + c) * mma.COLUMNS + t % mma.QUAD * 2 + i % 2

    def place(self, r: int, c: int, i: int, half: int = 0) -> int:
        """Index at which a lane keeps that sum; `half` is 1 for up."""
        return (r * COLUMN_PIECES + half * self.output_pieces + c) * mma.C + i


def fits(stored: Storage, rows: int, k: int) -> bool:
    """Whether `tile_product` supports such a product and is worth using for it."""
    return rows >= LEAST_ROWS and k % FLOATS == 0 and format_of(stored).multiplies_float16


def suits(shape: Linear) -> bool:
    """Whether `tensor_core_gemm` supports such a shape and is worth using for it."""
    return fits(shape.weight, shape.rows, shape.k)


def tensor_core_gemm(shape: Linear, on: Binding):
    """Body of `linear` for a shape that `suits` accepts, without norm or order."""
    rows, n, n_out, stored = shape.rows, shape.n, shape.n_out, shape.weight
    tiling = Tiling.of(rows, n_out, swiglu=shape.swiglu)
    row_blocks = -(-rows // tiling.rows)
    # Without partial tiles, no store needs a guard; with guards, each store would wait for the one before.
    whole = rows % tiling.rows == 0 and n_out % tiling.outputs == 0
    multiply = tile_product(stored, n, shape.k, tiling, on, source=lambda _members, i: i)

    def output(acc, s, residual, t, r, c, i, row, column):
        def scaled(half):
            found = acc[on.own(t), tiling.place(r, c, i, half)]
            return found * row_scale(stored, s, half * n_out + column) if scaled_by_rows(stored) else found

        found = gated(scaled(0), scaled(1)) if shape.swiglu else scaled(0)
        return found if residual is None else residual[row, column] + found

    @T.inline
    def store(acc, s, residual, y, t, r, c, i, row, column):
        if whole:
            y[row, column] = output(acc, s, residual, t, r, c, i, row, column)
        else:
            if row < rows and column < n_out:
                y[row, column] = output(acc, s, residual, t, r, c, i, row, column)

    @T.inline
    def body(x, _gain, w, s, z, _order, residual, y):
        for block in on.blocks(tiling.blocks(rows, n_out)):
            acc = T.alloc_buffer((on.copies(THREADS), tiling.sums), "float32", scope=on.private)
            m = block % row_blocks * tiling.rows  # neighbouring blocks share their part of W
            j = block // row_blocks * tiling.outputs
            multiply(x, None, w, s, z, 0, j // PANEL, m, rows, acc)
            for t in on.threads(THREADS):
                for r in on.unroll(tiling.row_pieces):
                    for c in on.unroll(tiling.output_pieces):
                        for i in on.unroll(mma.C):
                            store(acc, s, residual, y, t, r, c, i, m + tiling.row(t, r, i), j + tiling.output(t, c, i))

    return body


def tile_product(stored: Storage, n: int, k: int, tiling: Tiling, on: Binding, *, source: Callable[[Any, Any], Any]):
    """Inline `multiply(x, members, w, s, z, e, p, m, stop, acc)`: one block's sums.

    These are rows m .. m + tiling.rows of x, below `stop`, times the panels from `p` on of matrix `e` in w; row i is
    at source(members, i) in x. Each lane's sums are in acc where `Tiling.place` says. A scale per output is left to
    the caller; group scales are multiplied in.
    """
    layout, loading, steps = vector_layout(stored, n, k), Loading.of(stored), vector_steps(stored)
    panels, vectors = layout.shape[0], layout.shape[1]
    loaded_steps = min(steps, NUMBERS)  # of K, that a thread loads at once: 16 bytes, or 8 bytes of int4
    halves = layout.dtype == "float16"  # halves are pairs already
    words = loaded_steps // (PAIR if halves else loading.steps)
    dtype = "uint32" if halves else loading.dtype
    vector_words = words * (steps // loaded_steps)
    x_loads, w_loads = tiling.rows * X_PARTS // THREADS, NUMBERS // loaded_steps
    row_pieces, half = tiling.row_pieces, panels // 2
    grouped, groups = stored.grouped, layout.scales[0][1] if stored.grouped and layout.scales else 1
    # What a thread loads at once lies in one group, and it loads once in each step.
    assert not grouped or (w_loads == 1 and stored.group_size % loaded_steps == 0)  # type: ignore[operator]
    parts = parts_of(layout)
    read, product = factor(stored, on).read, mma.multiplier(on)

    def weight(w_next, scaling, t, c, v):
        """Number v of load c, as a weight where it belongs to a group."""
        number = read(w_next, (on.own(t) * w_loads + c) * words, v)
        return number * scaling[0] + scaling[1] if grouped else number

    def weights(w_next, scaling, t, c, v):
        """Pair v of load c."""
        if halves:
            return w_next[(on.own(t) * w_loads + c) * words + v]
        return pair(weight(w_next, scaling, t, c, PAIR * v), weight(w_next, scaling, t, c, PAIR * v + 1))

    @T.inline
    def place_rows(members, m, stop, rows_at, t):
        """Set rows_at to where a thread's rows are in x, or to -1 past the last row."""
        for c in on.unroll(x_loads):
            if m + (c * THREADS + t) // X_PARTS < stop:
                rows_at[on.own(t), c] = source(members, m + (c * THREADS + t) // X_PARTS)
            else:
                rows_at[on.own(t), c] = -1

    @T.inline
    def fetch(x, rows_at, w, s, z, e, p, depth, x_next, w_next, scale, offset, t):
        """Load one thread's share of the step at `depth` into registers.

        x is zero outside the matrix, so that any number of W will do there.
        """
        for c in on.unroll(x_loads):
            if rows_at[on.own(t), c] >= 0 and depth + t % X_PARTS * FLOATS < k:
                for v in T.vectorized(FLOATS):
                    x_next[on.own(t), c, v] = x[rows_at[on.own(t), c], depth // FLOATS + t % X_PARTS, v]
            else:
                for v in on.unroll(FLOATS):
                    x_next[on.own(t), c, v] = T.float32(0)
        panel = e * panels + T.min(tiling.panel(p, t // PANEL % PANELS, half), panels - 1)
        for c in on.unroll(w_loads):
            first = depth + (c * THREADS + t) // COLUMNS * loaded_steps
            for v in T.vectorized(words):
                w_next[(on.own(t) * w_loads + c) * words + v] = w[
                    panel, T.min(first // steps, vectors - 1), t % PANEL, first % steps // loaded_steps * words + v
                ]
        if grouped:
            group = T.min(group_of(stored, (depth + t // COLUMNS * loaded_steps) // steps), groups - 1)
            scale[on.own(t)] = s[panel, group, t % PANEL]
            if stored.offsets != "none":
                offset[on.own(t)] = z[panel, group, t % PANEL]

    @T.inline
    def put(x_next, w_next, scale, offset, x_tile, w_tile, t):
        """Store what was fetched in shared memory, as pairs of float16."""
        for c in on.unroll(x_loads):
            for v in on.unroll(FLOATS // PAIR):
                x_tile[(c * THREADS + t) // X_PARTS * STRIDE + t % X_PARTS * (FLOATS // PAIR) + v] = pair(
                    x_next[on.own(t), c, PAIR * v], x_next[on.own(t), c, PAIR * v + 1]
                )
        scaling = T.alloc_buffer((2,), "float32", scope=on.private)
        if grouped:
            scaling[0] = group_scaling(stored, scale[on.own(t)], offset[on.own(t)])[0]
            scaling[1] = group_scaling(stored, scale[on.own(t)], offset[on.own(t)])[1]
        for c in on.unroll(w_loads):
            for part in on.unroll(loaded_steps // PAIR // STORED_PAIRS):
                pairs = T.alloc_buffer((STORED_PAIRS,), "uint32", scope=on.private)
                for v in on.unroll(STORED_PAIRS):
                    pairs[v] = weights(w_next, scaling, t, c, part * STORED_PAIRS + v)
                for v in T.vectorized(STORED_PAIRS):
                    w_tile[
                        tiling.tile_row(t // PANEL % PANELS, t % PANEL) * STRIDE
                        + ((c * THREADS + t) // COLUMNS * (loaded_steps // PAIR // STORED_PAIRS) + part) * STORED_PAIRS
                        + v
                    ] = pairs[v]

    @T.inline
    def load_fragments(x_tile, w_tile, first, a, b, t):
        """Load the pairs of x and W that a lane needs, from pair `first` of the step on."""
        for piece in on.unroll(row_pieces):
            for i in on.unroll(mma.A):
                a[on.own(t), piece * mma.A + i] = x_tile[
                    tiling.row(t, piece, 2 * i) * STRIDE + (first + t % mma.QUAD + i // 2 * 4)
                ]
        for piece in on.unroll(COLUMN_PIECES):
            for i in on.unroll(mma.B):
                b[on.own(t), piece * mma.B + i] = w_tile[
                    ((t // WARP % WARPS_ALONG_COLUMNS * COLUMN_PIECES + piece) * mma.COLUMNS + t % WARP // mma.QUAD)
                    * STRIDE
                    + (first + t % mma.QUAD + i * 4)
                ]

    @T.inline
    def multiply(x_in, members, w_in, s, z, e, p, m, stop, acc):
        x = T.decl_buffer((x_in.shape[0], k // FLOATS, FLOATS), "float32", data=x_in.data)
        w = T.decl_buffer((*w_in.shape[:3], vector_words), dtype, data=w_in.data)
        x_tile = T.alloc_buffer((tiling.rows * STRIDE,), "uint32", scope=on.shared)
        w_tile = T.alloc_buffer((COLUMNS * STRIDE,), "uint32", scope=on.shared)
        rows_at = T.alloc_buffer((on.copies(THREADS), x_loads), "int32", scope=on.private)
        x_next = T.alloc_buffer((on.copies(THREADS), x_loads, FLOATS), "float32", scope=on.private)
        w_next = T.alloc_buffer((on.copies(THREADS) * w_loads * words,), dtype, scope=on.private)
        scale = T.alloc_buffer((on.copies(THREADS),), parts["s"][1], scope=on.private)
        offset = T.alloc_buffer((on.copies(THREADS),), parts["z"][1], scope=on.private)
        a = T.alloc_buffer((on.copies(THREADS), row_pieces * mma.A), "uint32", scope=on.private)
        b = T.alloc_buffer((on.copies(THREADS), COLUMN_PIECES * mma.B), "uint32", scope=on.private)
        for t in on.threads(THREADS):
            for i in on.unroll(tiling.sums):
                acc[on.own(t), i] = T.float32(0)
            place_rows(members, m, stop, rows_at, t)
            if m < stop:
                fetch(x, rows_at, w, s, z, e, p, 0, x_next, w_next, scale, offset, t)
        for step in T.serial(T.if_then_else(m < stop, -(-k // DEPTH), 0)):  # a tile without rows reads nothing
            for t in on.threads(THREADS):
                put(x_next, w_next, scale, offset, x_tile, w_tile, t)
            for t in on.threads(THREADS):
                fetch(x, rows_at, w, s, z, e, p, (step + 1) * DEPTH, x_next, w_next, scale, offset, t)
            for part in on.unroll(DEPTH // mma.DEPTH):
                for t in on.threads(THREADS):
                    load_fragments(x_tile, w_tile, part * mma.DEPTH // PAIR, a, b, t)
                for t in on.threads(THREADS):
                    for r in on.unroll(row_pieces):
                        for c in on.unroll(COLUMN_PIECES):
                            product(acc, a, b, t, (r * COLUMN_PIECES + c) * mma.C, r * mma.A, c * mma.B)

    return multiply
