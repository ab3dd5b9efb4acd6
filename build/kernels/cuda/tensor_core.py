"""The matrix product on tensor cores: y = x W^T with x and W as float16 and float32 sums, for many rows.

A block computes 128 outputs of a tile of rows, in steps of 32 along K that pass through shared memory as float16; what the next step needs is on
its way from memory meanwhile. Its 8 warps take a part of the tile each, in pieces of 16 x 8 outputs: one `mma.sync.m16n8k16` multiplies 16 x 16
numbers of x with 16 x 8 of W, each lane of the warp holding some of both and of the sums as the PTX manual lays them out ("Matrix Fragments for
mma.m16n8k16 with floating point type"). Such a product is no thread's own work: in the serial form `multiply_serially` takes its place, which
finds each number in the lane that holds it.

x is rounded to float16 here, once for each sum; int8 is exact in float16 and scaled in the end. Bytes per call: W once for each tile of rows, x once
for each 128 outputs, most of it through the second-level cache. Operations: 2 M N K.
"""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.shapes import Linear
from build.layout import PANEL, vector_layout, vector_steps

WARPS_ALONG_ROWS, WARPS_ALONG_COLUMNS = 2, 4
THREADS = WARPS_ALONG_ROWS * WARPS_ALONG_COLUMNS * WARP
COLUMNS, DEPTH = 128, 32
PAIR = 2  # neighbours along K, as float16 in one uint32: the registers that `mma.sync` takes
PAIRS = DEPTH // PAIR  # of a row in one step
STRIDE = PAIRS + 4  # of a row in shared memory, in pairs: lanes that read neighbouring rows hit different banks. Flat, or TVM would trim the padding
MMA_ROWS, MMA_COLUMNS, MMA_DEPTH = 16, 8, 16
A, B, C = 4, 2, 4  # pairs of x, pairs of W, and sums that a lane holds
LEAST_ROWS = 16  # fewer would leave most of a product empty
FLOATS = 4  # of x, in 16 bytes
STORED_PAIRS = 4  # in 16 bytes of shared memory


def suits(shape: Linear) -> bool:
    """Whether `tensor_core_gemm` computes such a product, and is worth it."""
    return shape.rows >= LEAST_ROWS and shape.k % FLOATS == 0 and shape.weight.dtype in ("float16", "int8")


def tensor_core_gemm(shape: Linear, on: Binding):
    """Body of `linear` for a shape that `suits`."""
    rows, n, k, stored = shape.rows, shape.n, shape.k, shape.weight
    row_pieces = 2 if rows <= 64 else 4  # of a warp; so a block has 64 or 128 rows
    column_pieces = COLUMNS // WARPS_ALONG_COLUMNS // MMA_COLUMNS
    tile_rows = WARPS_ALONG_ROWS * row_pieces * MMA_ROWS
    row_blocks, column_blocks = -(-rows // tile_rows), -(-n // COLUMNS)
    layout, steps = vector_layout(stored, n, k), vector_steps(stored)
    panels, vectors, words = layout.shape[0], layout.shape[1], layout.shape[3]
    x_parts = DEPTH // FLOATS  # of a row in one step
    x_loads, w_loads = tile_rows * x_parts // THREADS, COLUMNS * DEPTH // (THREADS * steps)
    scaled = stored.dtype == "int8"
    multiply = _multiply(on)

    @T.inline
    def fetch(x, w, m, p, depth, x_next, w_next, t):
        """One thread's share of the step at `depth`, into registers. x is zero beyond the matrix, so that any number of W will do there."""
        for c in T.unroll(x_loads):
            if m + (c * THREADS + t) // x_parts < rows and depth + (c * THREADS + t) % x_parts * FLOATS < k:
                for v in T.vectorized(FLOATS):
                    x_next[on.own(t), c, v] = x[m + (c * THREADS + t) // x_parts, depth // FLOATS + (c * THREADS + t) % x_parts, v]
            else:
                for v in T.unroll(FLOATS):
                    x_next[on.own(t), c, v] = T.float32(0)
        for c in T.unroll(w_loads):
            for v in T.vectorized(words):
                w_next[on.own(t), c, v] = w[
                    T.min(p + (c * THREADS + t) // PANEL % (COLUMNS // PANEL), panels - 1),
                    T.min(depth // steps + (c * THREADS + t) // COLUMNS, vectors - 1),
                    t % PANEL,
                    v,
                ]

    @T.inline
    def put(x_next, w_next, x_tile, w_tile, t):
        """What was fetched, as pairs of float16 into shared memory."""
        for c in T.unroll(x_loads):
            for v in T.unroll(FLOATS // PAIR):
                x_tile[(c * THREADS + t) // x_parts * STRIDE + (c * THREADS + t) % x_parts * (FLOATS // PAIR) + v] = pair(
                    x_next[on.own(t), c, PAIR * v], x_next[on.own(t), c, PAIR * v + 1]
                )
        for c in T.unroll(w_loads):
            for part in T.unroll(steps // PAIR // STORED_PAIRS):
                pairs = T.alloc_buffer((STORED_PAIRS,), "uint32", scope=on.private)
                for v in T.unroll(STORED_PAIRS):
                    pairs[v] = pair(
                        w_next[on.own(t), c, (part * STORED_PAIRS + v) * PAIR], w_next[on.own(t), c, (part * STORED_PAIRS + v) * PAIR + 1]
                    )
                for v in T.vectorized(STORED_PAIRS):
                    w_tile[
                        (c * THREADS + t) % COLUMNS * STRIDE
                        + ((c * THREADS + t) // COLUMNS * (steps // PAIR // STORED_PAIRS) + part) * STORED_PAIRS
                        + v
                    ] = pairs[v]

    @T.inline
    def load_fragments(x_tile, w_tile, first, a, b, t):
        """The pairs of x and W that a lane holds, from pair `first` of the step on."""
        for piece in T.unroll(row_pieces):
            for i in T.unroll(A):
                a[on.own(t), piece * A + i] = x_tile[
                    ((t // WARP // WARPS_ALONG_COLUMNS * row_pieces + piece) * MMA_ROWS + t % WARP // 4 + i % 2 * 8) * STRIDE
                    + (first + t % 4 + i // 2 * 4)
                ]
        for piece in T.unroll(column_pieces):
            for i in T.unroll(B):
                b[on.own(t), piece * B + i] = w_tile[
                    ((t // WARP % WARPS_ALONG_COLUMNS * column_pieces + piece) * MMA_COLUMNS + t % WARP // 4) * STRIDE + (first + t % 4 + i * 4)
                ]

    @T.inline
    def store(acc, s, y, m, j, t):
        """The sums that a lane holds: two neighbouring columns of two rows, of each piece."""
        for r in T.unroll(row_pieces):
            for c in T.unroll(column_pieces):
                for i in T.unroll(C):
                    row = m + (t // WARP // WARPS_ALONG_COLUMNS * row_pieces + r) * MMA_ROWS + t % WARP // 4 + i // 2 * 8
                    column = j + (t // WARP % WARPS_ALONG_COLUMNS * column_pieces + c) * MMA_COLUMNS + t % 4 * 2 + i % 2
                    if row < rows and column < n:
                        if scaled:
                            y[row, column] = acc[on.own(t), (r * column_pieces + c) * C + i] * s[column]
                        else:
                            y[row, column] = acc[on.own(t), (r * column_pieces + c) * C + i]

    @T.inline
    def body(x_in, w, s, _z, y):
        x = T.decl_buffer((rows, k // FLOATS, FLOATS), "float32", data=x_in.data)
        for block in on.blocks(row_blocks * column_blocks):
            x_tile = T.alloc_buffer((tile_rows * STRIDE,), "uint32", scope=on.shared)
            w_tile = T.alloc_buffer((COLUMNS * STRIDE,), "uint32", scope=on.shared)
            x_next = T.alloc_buffer((on.copies(THREADS), x_loads, FLOATS), "float32", scope=on.private)
            w_next = T.alloc_buffer((on.copies(THREADS), w_loads, words), layout.dtype, scope=on.private)
            a = T.alloc_buffer((on.copies(THREADS), row_pieces * A), "uint32", scope=on.private)
            b = T.alloc_buffer((on.copies(THREADS), column_pieces * B), "uint32", scope=on.private)
            acc = T.alloc_buffer((on.copies(THREADS), row_pieces * column_pieces * C), "float32", scope=on.private)
            m = block % row_blocks * tile_rows  # neighbouring blocks share their part of W
            j = block // row_blocks * COLUMNS
            for t in on.threads(THREADS):
                for i in T.unroll(row_pieces * column_pieces * C):
                    acc[on.own(t), i] = T.float32(0)
                fetch(x, w, m, j // PANEL, 0, x_next, w_next, t)
            for step in T.serial(-(-k // DEPTH)):
                for t in on.threads(THREADS):
                    put(x_next, w_next, x_tile, w_tile, t)
                for t in on.threads(THREADS):
                    fetch(x, w, m, j // PANEL, (step + 1) * DEPTH, x_next, w_next, t)
                for part in T.unroll(DEPTH // MMA_DEPTH):
                    for t in on.threads(THREADS):
                        load_fragments(x_tile, w_tile, part * MMA_DEPTH // PAIR, a, b, t)
                    for t in on.threads(THREADS):
                        for r in T.unroll(row_pieces):
                            for c in T.unroll(column_pieces):
                                multiply(acc, a, b, t, (r * column_pieces + c) * C, r * A, c * B)
            for t in on.threads(THREADS):
                store(acc, s, y, m, j, t)

    return body


def _multiply(on: Binding):
    """Inline `multiply(acc, a, b, t, acc_at, a_at, b_at)`: the sums of lane t += those of its warp's x times W, from registers."""

    @T.inline
    def multiply(acc, a, b, _t, acc_at, a_at, b_at):
        T.evaluate(
            T.ptx_legacy.mma("m16n8k16", "row", "col", "fp16", "fp16", "fp32", a.data, a_at, b.data, b_at, acc.data, acc_at, False, dtype="float32")
        )

    return multiply_serially if on.serial else multiply


def pair(low: Any, high: Any) -> Any:
    """Two numbers as float16 in one uint32."""
    bits = [T.Cast("uint32", T.reinterpret("uint16", T.Cast("float16", number))) for number in (low, high)]
    return bits[0] | (bits[1] << T.uint32(16))


def member(pairs: Any, which: Any) -> Any:
    """The first or second number of a pair, as float32."""
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", (pairs >> T.Cast("uint32", 16 * which)) & T.uint32(0xFFFF))))


@T.inline
def multiply_serially(acc, a, b, t, acc_at, a_at, b_at):
    """As `mma.sync`, for one lane: depth d of x's row r lies in lane r % 8 * 4 + d % 8 / 2, and depth d of W's column c in lane c * 4 + d % 8 / 2."""
    for i in T.serial(C):
        for d in T.serial(MMA_DEPTH):
            acc[t, acc_at + i] = acc[t, acc_at + i] + member(
                a[t // WARP * WARP + (t % WARP // 4 + i // 2 * 8) % 8 * 4 + d % 8 // 2, a_at + d // 8 * 2 + (t % WARP // 4 + i // 2 * 8) // 8], d % 2
            ) * member(b[t // WARP * WARP + (t % 4 * 2 + i % 2) * 4 + d % 8 // 2, b_at + d // 8], d % 2)
