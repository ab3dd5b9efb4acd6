"""y = x W^T with W packed in panels: (ceil(N / PANEL), K, PANEL) from (N, K), N padded with zeros. A panel's outputs are the lanes of a warp.

Weights are widened to float32 in registers and sums are float32. Bytes per call: the weights, N K itemsize, read once by the matrix-vector form
and once per tile of rows (through the second-level cache) by the matrix product. Operations: 2 M N K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding
from build.kernels.shapes import Linear

PANEL = WARP


@dataclass(frozen=True)
class Tile:
    """Blocking: `warps` in a block; of the matrix product also `rows` of x a block, `depth` steps of K in shared memory."""

    warps: int
    rows: int
    depth: int


# Not yet measured on a GPU. 8 warps hide the latency of the loads; 64 x 32 floats of x and 32 x 32 of W are 12 kB of shared memory.
TILE = Tile(warps=8, rows=64, depth=32)
THREADS = TILE.warps * WARP


def linear(shape: Linear, on: Binding = GPU) -> PrimFunc:
    """Kernel of x (*lead, K) float32, w (panels, K, PANEL) and, when it is scaled, s (N,) float32, to y (*lead, N) float32."""
    lead, n, k, rows, weight_dtype = shape.lead, shape.n, shape.k, shape.rows, shape.weight.dtype
    body = _gemv(n, k, on) if rows == 1 else _gemm(rows, n, k, on)
    panels = -(-n // PANEL)

    @T.prim_func
    def plain(x: T.Buffer((*lead, k), "float32"), w: T.Buffer((panels, k, PANEL), weight_dtype), y: T.Buffer((*lead, n), "float32")):
        T.func_attr(ATTRIBUTES)
        x_rows = T.decl_buffer((rows, k), "float32", data=x.data)
        y_rows = T.decl_buffer((rows, n), "float32", data=y.data)
        body(x_rows, w, None, y_rows)

    @T.prim_func
    def dequantizing(
        x: T.Buffer((*lead, k), "float32"),
        w: T.Buffer((panels, k, PANEL), weight_dtype),
        s: T.Buffer((n,), "float32"),
        y: T.Buffer((*lead, n), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        x_rows = T.decl_buffer((rows, k), "float32", data=x.data)
        y_rows = T.decl_buffer((rows, n), "float32", data=y.data)
        body(x_rows, w, s, y_rows)

    return dequantizing if shape.weight.scaled else plain


def _gemv(n: int, k: int, on: Binding):
    """One row: a block a panel."""
    dot = panel_dot(k, on)

    @T.inline
    def body(x, w, s, y):
        for p in on.blocks(-(-n // PANEL)):
            partial = T.alloc_buffer((TILE.warps, PANEL), "float32", scope=on.shared)
            dot(x, 0, w, p, partial)
            for t in on.threads(THREADS):
                if t < PANEL and p * PANEL + t < n:
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for warp in T.serial(TILE.warps):
                        total[0] = total[0] + partial[warp, t]
                    if s is None:
                        y[0, p * PANEL + t] = total[0]
                    else:
                        y[0, p * PANEL + t] = total[0] * s[p * PANEL + t]

    return body


def panel_dot(k: int, on: Binding):
    """partial[warp, lane] = this warp's share of row `i` of x times panel `p` of w: a lane an output, the warps take turns along K."""
    steps = -(-k // TILE.warps)

    @T.inline
    def dot(x, i, w, p, partial):
        for t in on.threads(THREADS):
            acc = T.alloc_buffer((1,), "float32", scope=on.private)
            acc[0] = T.float32(0)
            for step in T.serial(steps):
                if step * TILE.warps + t // WARP < k:
                    acc[0] = acc[0] + x[i, step * TILE.warps + t // WARP] * T.Cast("float32", w[p, step * TILE.warps + t // WARP, t % WARP])
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


def _gemm(rows: int, n: int, k: int, on: Binding):
    """Several rows: a block is a panel times a tile of rows, a lane an output, a warp some of the rows; x and W pass through shared memory."""
    tiles = RowTiles.of(rows)
    multiply = tile_product(k, tiles, on, source=lambda _members, i: i)

    @T.inline
    def body(x, w, s, y):
        for block in on.blocks(-(-n // PANEL) * tiles.count):
            x_tile = T.alloc_buffer((tiles.tile_rows, TILE.depth), "float32", scope=on.shared)
            w_tile = T.alloc_buffer((TILE.depth, PANEL), "float32", scope=on.shared)
            acc = T.alloc_buffer((on.copies(THREADS), tiles.per_warp), "float32", scope=on.private)
            p = block // tiles.count
            m = block % tiles.count * tiles.tile_rows
            multiply(x, None, w, p, m, rows, x_tile, w_tile, acc)
            for t in on.threads(THREADS):
                for r in T.unroll(tiles.per_warp):
                    i = m + t // WARP * tiles.per_warp + r
                    j = p * PANEL + t % WARP
                    if i < rows and j < n:
                        if s is None:
                            y[i, j] = acc[on.own(t), r]
                        else:
                            y[i, j] = acc[on.own(t), r] * s[j]

    return body


def tile_product(k: int, tiles: RowTiles, on: Binding, *, source: Callable[[Any, Any], Any]):
    """acc = rows m .. m + tile_rows of x, below `stop`, times panel `p` of w; `source(members, i)` is where row i lies in x."""
    tile_rows, depth, per_warp = tiles.tile_rows, TILE.depth, tiles.per_warp
    x_loads, w_loads = -(-tile_rows * depth // THREADS), depth * PANEL // THREADS

    @T.inline
    def load(x, members, w, p, m, stop, x_tile, w_tile, kk, t):
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
        for i in T.unroll(w_loads):
            d = i * TILE.warps + t // WARP
            if kk + d < k:
                w_tile[d, t % WARP] = T.Cast("float32", w[p, kk + d, t % WARP])
            else:
                w_tile[d, t % WARP] = T.float32(0)

    @T.inline
    def multiply(x, members, w, p, m, stop, x_tile, w_tile, acc):
        for t in on.threads(THREADS):
            for r in T.unroll(per_warp):
                acc[on.own(t), r] = T.float32(0)
        for kk in T.serial(T.if_then_else(m < stop, -(-k // depth), 0)):  # a tile without rows reads nothing
            for t in on.threads(THREADS):
                load(x, members, w, p, m, stop, x_tile, w_tile, kk * depth, t)
            for t in on.threads(THREADS):
                for d in T.serial(depth):
                    for r in T.unroll(per_warp):
                        acc[on.own(t), r] = acc[on.own(t), r] + x_tile[t // WARP * per_warp + r, d] * w_tile[d, t % WARP]

    return multiply
