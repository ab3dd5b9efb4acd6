"""Several rows times a matrix, in float32: y = x W^T.

A block computes a panel of 32 outputs for a tile of rows; x and W pass through shared memory, and W is widened to
float32 on the way. Where activations may be rounded to float16, tensor cores take over (`tensor_core.py`).

Bytes per call: the weights, N * K * itemsize, read once per tile of rows, mostly through the second-level (L2) cache.
Operations: 2 * M * N * K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.weights import Loading, group_of, number, row_scale, weight
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, scaled_by_rows, vector_steps
from runtime.artifact.layouts import PANEL, WORD


@dataclass(frozen=True)
class GemmTile:
    """Blocking of the matrix product: `warps` per block, `rows` of x per block, `depth` steps of K in shared memory."""

    warps: int
    rows: int
    depth: int


# 8 warps hide the latency of the loads; 64 x 32 floats of x and 32 x 32 of W take 12 kB of
# shared memory.
TILE = GemmTile(warps=8, rows=64, depth=32)
THREADS = TILE.warps * WARP


@dataclass(frozen=True)
class RowTiles:
    """How the rows of a matrix product are split: rows per thread and per block, and the number of such tiles."""

    per_warp: int
    tile_rows: int
    count: int

    @classmethod
    def of(cls, rows: int) -> "RowTiles":
        """Tiles of at most `TILE.rows`, smaller where there are fewer rows."""
        per_warp = -(-min(rows, TILE.rows) // TILE.warps)
        return cls(per_warp, per_warp * TILE.warps, -(-rows // (per_warp * TILE.warps)))


def gemm(shape: Linear, on: Binding):
    """Body of `linear` for rows as they are, without SwiGLU: one output per lane, some of the rows per warp."""
    rows, n = shape.rows, shape.n
    tiles = RowTiles.of(rows)
    multiply = tile_product(shape.weight, shape.k, tiles, on, source=lambda _members, i: i)

    def output(acc, s, residual, i, j):
        found = acc * row_scale(shape.weight, s, j) if scaled_by_rows(shape.weight) else acc
        return found if residual is None else residual[i, j] + found

    @T.inline
    def body(x, _gain, w, s, z, _order, residual, y):
        for block in on.blocks(-(-n // PANEL) * tiles.count):
            x_tile = T.alloc_buffer((tiles.tile_rows, TILE.depth), "float32", scope=on.shared)
            w_tile = T.alloc_buffer((TILE.depth, PANEL), "float32", scope=on.shared)
            acc = T.alloc_buffer((on.copies(THREADS), tiles.per_warp), "float32", scope=on.private)
            p = block // tiles.count
            m = block % tiles.count * tiles.tile_rows
            multiply(x, None, w, s, z, p, m, rows, x_tile, w_tile, acc)
            for t in on.threads(THREADS):
                for r in on.unroll(tiles.per_warp):
                    i = m + t // WARP * tiles.per_warp + r
                    j = p * PANEL + t % WARP
                    if i < rows and j < n:
                        y[i, j] = output(acc[on.own(t), r], s, residual, i, j)

    return body


def tile_product(stored: Storage, k: int, tiles: RowTiles, on: Binding, *, source: Callable[[Any, Any], Any]):
    """Inline `multiply`: acc = rows m .. m + tile_rows of x, below `stop`, times panel `p` of w.

    Row i is at `source(members, i)` in x. A scale per output is left to the caller; group scales are multiplied in.
    """
    tile_rows, depth, per_warp = tiles.tile_rows, TILE.depth, tiles.per_warp
    steps = vector_steps(stored)
    vectors, loading = -(-k // steps), Loading.of(stored)
    # `some` is the number of steps of one output that a thread widens: part of a vector.
    x_loads, some = -(-tile_rows * depth // THREADS), depth * PANEL // THREADS
    in_words, elements, read = format_of(stored).words, max(some // loading.steps, 1), number(stored).read

    def value(loaded, s, z, p, at, lane, v):
        if not stored.grouped:
            return read(loaded, 0, v)
        g = group_of(stored, at)
        return weight(stored, read(loaded, 0, v), s[p, g, lane], z[p, g, lane] if stored.offsets != "none" else None)

    @T.inline
    def load(x, members, w, s, z, p, m, stop, x_tile, w_tile, kk, t):
        """Load one thread's share of the tiles at depth kk; zeros outside the matrix."""
        for i in on.unroll(x_loads):
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
            loaded = T.alloc_buffer((elements,), loading.dtype, scope=on.private)
            if in_words:  # half a word: the lower or the upper halves of its bytes
                loaded[0] = w[p, at, t % PANEL, d % steps // WORD] >> (4 * (d % WORD // some))
            else:
                for v in T.vectorized(elements):
                    loaded[v] = w[p, at, t % PANEL, d % steps // loading.steps + v]
            for v in on.unroll(some):
                w_tile[d + v, t % PANEL] = value(loaded, s, z, p, at, t % PANEL, v)
        else:
            for v in on.unroll(some):
                w_tile[d + v, t % PANEL] = T.float32(0)

    @T.inline
    def multiply(x, members, w, s, z, p, m, stop, x_tile, w_tile, acc):
        for t in on.threads(THREADS):
            for r in on.unroll(per_warp):
                acc[on.own(t), r] = T.float32(0)
        for kk in T.serial(T.if_then_else(m < stop, -(-k // depth), 0)):  # a tile without rows reads nothing
            for t in on.threads(THREADS):
                load(x, members, w, s, z, p, m, stop, x_tile, w_tile, kk * depth, t)
            for t in on.threads(THREADS):
                for d in T.serial(depth):
                    for r in on.unroll(per_warp):
                        acc[on.own(t), r] = (
                            acc[on.own(t), r] + x_tile[t // WARP * per_warp + r, d] * w_tile[d, t % WARP]
                        )

    return multiply
