"""y = x W^T. W lies in panels of 32 outputs, whose lanes are those of a warp, and 16 bytes of K of each output lie together.

One row: a block is a panel, its warps share K, each lane sums its output in float32, and the warps' sums meet in shared memory. A small N has
few panels: then a block has more warps (the split of K), until there are as many as keep every multiprocessor's loads on their way.
Several rows: a block is a panel times a tile of rows; x and W pass through shared memory, W widened to float32 on the way. Where activations may be
rounded to float16, tensor cores take this over (`tensor_core.py`).

Bytes per call: the weights, N K itemsize, read once by the matrix-vector form and once per tile of rows (through the second-level cache) by the
matrix product. Operations: 2 M N K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding
from build.kernels.cuda.tensor_core import suits, tensor_core_gemm
from build.kernels.cuda.weights import factor, group_of, number, scale_of, scales_buffer, unused, zero_of, zeros_buffer
from build.kernels.shapes import Linear
from build.kernels.signature import without
from build.layout import WORD, vector_layout, vector_steps
from export.quantize import MatrixFormat

PANEL = WARP


@dataclass(frozen=True)
class Tile:
    """Blocking of the matrix product: `warps` in a block, `rows` of x a block, `depth` steps of K in shared memory."""

    warps: int
    rows: int
    depth: int


# Not yet measured on a GPU. 8 warps hide the latency of the loads; 64 x 32 floats of x and 32 x 32 of W are 12 kB of shared memory.
TILE = Tile(warps=8, rows=64, depth=32)
THREADS = TILE.warps * WARP

# Of the matrix-vector form, not yet measured either. 4.8 TB/s for about 700 ns are 3.4 MB on their way; 2048 warps with 4 loads of 512 bytes are 4.2.
WARPS = (8, 16, 32)  # in a block
ALL_WARPS = 2048
LOADS = 4  # of 16 bytes, that a thread starts before it needs the first
INT4_LOADS = 2  # where 16 bytes are 32 steps, whose x takes as many registers; with 4 of them sm_80 spills
FLOATS = 4  # of x, in 16 bytes


def linear(shape: Linear, on: Binding = GPU, *, tensor_cores: bool = False) -> PrimFunc:
    """Kernel of x (*lead, K) float32, w as `vector_layout` has it, scales and zero points where there are any, to y (*lead, N) float32.

    With `tensor_cores`, products of many rows may round x to float16.
    """
    lead, n, k, rows, layout = shape.lead, shape.n, shape.k, shape.rows, vector_layout(shape.weight, shape.n, shape.k)
    several = tensor_core_gemm if tensor_cores and suits(shape) else _gemm
    body = _gemv(shape, on) if rows == 1 else several(shape, on)

    @T.prim_func
    def kernel(
        x_in: T.Buffer((*lead, k), "float32"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: scales_buffer(layout),
        z: zeros_buffer(layout),
        y_out: T.Buffer((*lead, n), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        x = T.decl_buffer((rows, k), "float32", data=x_in.data)
        y = T.decl_buffer((rows, n), "float32", data=y_out.data)
        body(x, w, s, z, y)

    return without(kernel, unused(layout))


def gemv_warps(panels: int, vectors: int) -> int:
    """Warps of a block: as few as make `ALL_WARPS` of all blocks, and not more than have something to load."""
    return next(warps for warps in WARPS if panels * warps >= ALL_WARPS or 2 * warps > vectors or warps == WARPS[-1])


def _gemv(shape: Linear, on: Binding):
    """One row: a block a panel."""
    n, k, stored = shape.n, shape.k, shape.weight
    panels = -(-n // PANEL)
    warps = gemv_warps(panels, -(-k // vector_steps(stored)))
    dot, total = panel_dot(stored, k, warps, on), panel_total(stored, warps)

    @T.inline
    def body(x, w, s, z, y):
        for p in on.blocks(panels):
            partial = T.alloc_buffer((warps, PANEL), "float32", scope=on.shared)
            dot(x, 0, w, s, z, p, partial)
            for t in on.threads(warps * WARP):
                if t < PANEL and p * PANEL + t < n:
                    y[0, p * PANEL + t] = total(partial, s, p * PANEL + t, t)

    return body


def panel_total(stored: MatrixFormat, warps: int):
    """`total(partial, s, row, lane)`: the warps' sums of one output, added one by one, times its scale; a TIR expression."""

    def total(partial: Any, s: Any, row: Any, lane: Any) -> Any:
        found = partial[0, lane]
        for warp in range(1, warps):
            found = found + partial[warp, lane]
        return found if s is None or stored.dtype != "int8" else found * s[row]

    return total


def panel_dot(stored: MatrixFormat, k: int, warps: int, on: Binding):
    """Inline `dot(x, i, w, s, z, p, partial)`: partial[warp, lane] = this warp's share of row `i` of x times panel `p` of w.

    A scale per output is left to the caller; scales of groups are multiplied in.
    """
    steps = vector_steps(stored)
    vectors = -(-k // steps)
    layout = vector_layout(stored, PANEL, k)
    words = layout.shape[-1]
    loads = INT4_LOADS if stored.dtype == "int4" else LOADS
    turns = vectors // (warps * loads)  # in which no warp lacks a vector
    begun = turns * warps * loads
    whole = k % steps == 0 and k % FLOATS == 0
    read, int4 = factor(stored), stored.dtype == "int4"
    threads = warps * WARP

    @T.inline
    def sum_groups(x, i, x_sums):
        """x_sums[v] = the sum of x over the steps of vector v."""
        for t in on.threads(threads):
            for c in T.serial(-(-vectors // threads)):
                if c * threads + t < vectors:
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for v in T.serial(steps):
                        if (c * threads + t) * steps + v < k:
                            total[0] = total[0] + x[i, (c * threads + t) * steps + v]
                    x_sums[c * threads + t] = total[0]

    @T.inline
    def load(w, p, at, lane, loaded, start):
        for v in T.vectorized(words):
            loaded[start + v] = w[p, at, lane, v]

    @T.inline
    def multiply(x, i, s, z, x_sums, p, at, lane, loaded, start, acc):
        """acc += the vector at loaded[start :] times its steps of x."""
        total = T.alloc_buffer((1,), "float32", scope=on.private)
        total[0] = T.float32(0)
        if whole:
            for c in T.unroll(steps // FLOATS):
                some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                for v in T.vectorized(FLOATS):
                    some[v] = x[i, at * steps + c * FLOATS + v]
                for v in T.unroll(FLOATS):
                    total[0] = total[0] + some[v] * read(loaded, start, c * FLOATS + v)
        else:
            for v in T.unroll(steps):
                total[0] = total[0] + T.if_then_else(at * steps + v < k, x[i, at * steps + v], T.float32(0)) * read(loaded, start, v)
        if int4:
            g = group_of(stored, at)
            acc[0] = acc[0] + (T.float32(16) * total[0] - (T.float32(16) + zero_of(stored, z, p, g, lane)) * x_sums[at]) * scale_of(s, p, g, lane)
        else:
            acc[0] = acc[0] + total[0]

    @T.inline
    def dot(x, i, w, s, z, p, partial):
        x_sums = T.alloc_buffer((vectors if int4 else 1,), "float32", scope=on.shared)
        if int4:
            sum_groups(x, i, x_sums)
        for t in on.threads(threads):
            acc = T.alloc_buffer((1,), "float32", scope=on.private)
            acc[0] = T.float32(0)
            for turn in T.serial(turns):
                loaded = T.alloc_buffer((loads * words,), layout.dtype, scope=on.private)
                for u in T.unroll(loads):
                    load(w, p, (turn * loads + u) * warps + t // WARP, t % WARP, loaded, u * words)
                for u in T.unroll(loads):
                    multiply(x, i, s, z, x_sums, p, (turn * loads + u) * warps + t // WARP, t % WARP, loaded, u * words, acc)
            for turn in T.serial(-(-(vectors - begun) // warps)):
                at = begun + turn * warps + t // WARP
                if at < vectors:
                    last = T.alloc_buffer((words,), layout.dtype, scope=on.private)
                    load(w, p, at, t % WARP, last, 0)
                    multiply(x, i, s, z, x_sums, p, at, t % WARP, last, 0, acc)
            partial[t // WARP, t % WARP] = acc[0]

    return dot


@dataclass(frozen=True)
class RowTiles:
    """How the rows of a matrix product are cut: rows of one thread and of one block, and how many such tiles."""

    per_warp: int
    tile_rows: int
    count: int

    @classmethod
    def of(cls, rows: int) -> "RowTiles":
        """Tiles of at most `TILE.rows`, and of fewer where there are no more."""
        per_warp = -(-min(rows, TILE.rows) // TILE.warps)
        return cls(per_warp, per_warp * TILE.warps, -(-rows // (per_warp * TILE.warps)))


def _gemm(shape: Linear, on: Binding):
    """Several rows: a block is a panel times a tile of rows, a lane an output, a warp some of the rows."""
    rows, n = shape.rows, shape.n
    tiles = RowTiles.of(rows)
    multiply = tile_product(shape.weight, shape.k, tiles, on, source=lambda _members, i: i)
    scaled = shape.weight.dtype == "int8"

    @T.inline
    def body(x, w, s, z, y):
        for block in on.blocks(-(-n // PANEL) * tiles.count):
            x_tile = T.alloc_buffer((tiles.tile_rows, TILE.depth), "float32", scope=on.shared)
            w_tile = T.alloc_buffer((TILE.depth, PANEL), "float32", scope=on.shared)
            acc = T.alloc_buffer((on.copies(THREADS), tiles.per_warp), "float32", scope=on.private)
            p = block // tiles.count
            m = block % tiles.count * tiles.tile_rows
            multiply(x, None, w, s, z, p, m, rows, x_tile, w_tile, acc)
            for t in on.threads(THREADS):
                for r in T.unroll(tiles.per_warp):
                    i = m + t // WARP * tiles.per_warp + r
                    j = p * PANEL + t % WARP
                    if i < rows and j < n:
                        if scaled:
                            y[i, j] = acc[on.own(t), r] * s[j]
                        else:
                            y[i, j] = acc[on.own(t), r]

    return body


def tile_product(stored: MatrixFormat, k: int, tiles: RowTiles, on: Binding, *, source: Callable[[Any, Any], Any]):
    """Inline `multiply`: acc = rows m .. m + tile_rows of x, below `stop`, times panel `p` of w; `source(members, i)` is where row i lies in x.

    A scale per output is left to the caller; scales of groups are multiplied in.
    """
    tile_rows, depth, per_warp = tiles.tile_rows, TILE.depth, tiles.per_warp
    steps = vector_steps(stored)
    vectors, layout = -(-k // steps), vector_layout(stored, PANEL, k)
    x_loads, some = -(-tile_rows * depth // THREADS), depth * PANEL // THREADS  # steps of one output that a thread widens: part of a vector
    words, read = (1 if stored.dtype == "int4" else some), number(stored)

    def weight(loaded, s, z, p, at, lane, v):
        if stored.dtype != "int4":
            return read(loaded, 0, v)
        g = group_of(stored, at)
        return (read(loaded, 0, v) - zero_of(stored, z, p, g, lane)) * scale_of(s, p, g, lane)

    @T.inline
    def load(x, members, w, s, z, p, m, stop, x_tile, w_tile, kk, t):
        """One thread's share of the tiles at depth kk; zeros beyond the matrix."""
        for i in T.unroll(x_loads):
            e = i * THREADS + t
            r = e // depth
            d = e % depth
            if e < tile_rows * depth:
                if m + r < stop and kk + d < k:
                    x_tile[r, d] = x[source(members, m + r), kk + d]
                else:
                    x_tile[r, d] = T.float32(0)
        d = t // PANEL * some
        at = (kk + d) // steps
        if at < vectors:
            loaded = T.alloc_buffer((words,), layout.dtype, scope=on.private)
            if stored.dtype == "int4":  # half a word: the lower or the upper halves of its bytes
                loaded[0] = w[p, at, t % PANEL, d % steps // WORD] >> (4 * (d % WORD // some))
            else:
                for v in T.vectorized(some):
                    loaded[v] = w[p, at, t % PANEL, d % steps + v]
            for v in T.unroll(some):
                w_tile[d + v, t % PANEL] = weight(loaded, s, z, p, at, t % PANEL, v)
        else:
            for v in T.unroll(some):
                w_tile[d + v, t % PANEL] = T.float32(0)

    @T.inline
    def multiply(x, members, w, s, z, p, m, stop, x_tile, w_tile, acc):
        for t in on.threads(THREADS):
            for r in T.unroll(per_warp):
                acc[on.own(t), r] = T.float32(0)
        for kk in T.serial(T.if_then_else(m < stop, -(-k // depth), 0)):  # a tile without rows reads nothing
            for t in on.threads(THREADS):
                load(x, members, w, s, z, p, m, stop, x_tile, w_tile, kk * depth, t)
            for t in on.threads(THREADS):
                for d in T.serial(depth):
                    for r in T.unroll(per_warp):
                        acc[on.own(t), r] = acc[on.own(t), r] + x_tile[t // WARP * per_warp + r, d] * w_tile[d, t % WARP]

    return multiply
