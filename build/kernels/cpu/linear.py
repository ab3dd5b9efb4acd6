"""y = x W^T with W packed in panels: (ceil(N / PANEL), K, PANEL) from (N, K), N padded with zeros.

A panel is what one loop over K turns into PANEL neighbouring outputs, so weights are read strictly in order, once per call.
Bytes per call: the weights, N K itemsize, plus x and y. Operations: 2 M N K.
"""

from dataclasses import dataclass
from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.vector import LANES

PANEL = 32  # four AVX2 registers (or two AVX-512) of outputs
PARTS = PANEL // LANES


@dataclass(frozen=True)
class Tile:
    """Blocking of the matrix product: `rows` x `columns` outputs stay in registers, `depth` steps of K in the first-level cache."""

    rows: int
    columns: int
    depth: int


# 4 x 16 outputs are 8 AVX2 accumulators, as many as two FMA pipes of latency 4 need; 128 x 32 floats of a panel are 16 kB of L1.
# Measured on 2 Zen 3 cores, 128 x 576 x 3072.
TILE = Tile(rows=4, columns=16, depth=128)


def linear(lead: tuple[int, ...], n: int, k: int, weight_dtype: str, scaled: bool) -> PrimFunc:
    """Kernel of x (*lead, K) float32, w (panels, K, PANEL) and, when `scaled`, s (N,) float32, to y (*lead, N) float32."""
    rows = prod(lead)
    body = _gemv(n, k) if rows == 1 else _gemm(rows, n, k)
    panels = -(-n // PANEL)

    @T.prim_func
    def plain(x: T.Buffer((*lead, k), "float32"), w: T.Buffer((panels, k, PANEL), weight_dtype), y: T.Buffer((*lead, n), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
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
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        x_rows = T.decl_buffer((rows, k), "float32", data=x.data)
        y_rows = T.decl_buffer((rows, n), "float32", data=y.data)
        body(x_rows, w, s, y_rows)

    return dequantizing if scaled else plain


def _gemv(n: int, k: int):
    """One row: each panel is one pass over K with its outputs in registers."""
    panels = -(-n // PANEL)
    last = n - (panels - 1) * PANEL  # outputs in the last panel
    unroll = 2 if k % 2 == 0 else 1  # two steps of K in flight hide the latency of the multiply-add

    @T.inline
    def store(y, s, acc, p, j):
        if s is None:
            y[0, p * PANEL + j] = acc[j]
        else:
            y[0, p * PANEL + j] = acc[j] * s[p * PANEL + j]

    @T.inline
    def body(x, w, s, y):
        for p in T.parallel(panels):
            acc = T.alloc_buffer((unroll * PANEL,), "float32")
            for i in T.unroll(unroll * PARTS):
                for v in T.vectorized(LANES):
                    acc[i * LANES + v] = T.float32(0)
            for kk in T.serial(k // unroll):
                for u in T.unroll(unroll):
                    for i in T.unroll(PARTS):
                        for v in T.vectorized(LANES):
                            acc[u * PANEL + i * LANES + v] = acc[u * PANEL + i * LANES + v] + x[0, kk * unroll + u] * T.Cast(
                                "float32", w[p, kk * unroll + u, i * LANES + v]
                            )
            for i in T.unroll((unroll - 1) * PARTS):
                for v in T.vectorized(LANES):
                    acc[i * LANES + v] = acc[i * LANES + v] + acc[PANEL + i * LANES + v]
            if last == PANEL:
                for i in T.unroll(PARTS):
                    for v in T.vectorized(LANES):
                        store(y, s, acc, p, i * LANES + v)
            else:
                for j in T.serial(T.if_then_else(p == panels - 1, last, PANEL)):
                    store(y, s, acc, p, j)

    return body


def _gemm(rows: int, n: int, k: int):
    """Several rows: a panel's slice of `depth` steps is widened to float32 once and then serves every row."""
    panels = -(-n // PANEL)
    tile_rows = max(r for r in range(1, TILE.rows + 1) if rows % r == 0)
    depth = max(d for d in range(1, TILE.depth + 1) if k % d == 0)
    parts = TILE.columns // LANES

    @T.inline
    def multiply(x, slab, total, kk, m, c):
        """total[m, c : c + columns] += x[m, kk] * slab, for a tile of rows."""
        acc = T.alloc_buffer((tile_rows * TILE.columns,), "float32")
        for i in T.unroll(tile_rows * parts):
            for v in T.vectorized(LANES):
                acc[i * LANES + v] = T.float32(0)
        for d in T.serial(depth):
            for r in T.unroll(tile_rows):
                for i in T.unroll(parts):
                    for v in T.vectorized(LANES):
                        acc[(r * parts + i) * LANES + v] = (
                            acc[(r * parts + i) * LANES + v] + x[m * tile_rows + r, kk * depth + d] * slab[d, c * TILE.columns + i * LANES + v]
                        )
        for r in T.unroll(tile_rows):
            for i in T.unroll(parts):
                for v in T.vectorized(LANES):
                    total[m * tile_rows + r, c * TILE.columns + i * LANES + v] = (
                        total[m * tile_rows + r, c * TILE.columns + i * LANES + v] + acc[(r * parts + i) * LANES + v]
                    )

    @T.inline
    def body(x, w, s, y):
        for p in T.parallel(panels):
            total = T.alloc_buffer((rows, PANEL), "float32")
            slab = T.alloc_buffer((depth, PANEL), "float32")
            for m in T.serial(rows):
                for i in T.vectorized(PANEL):
                    total[m, i] = T.float32(0)
            for kk in T.serial(k // depth):
                for d in T.serial(depth):
                    for i in T.vectorized(PANEL):
                        slab[d, i] = T.Cast("float32", w[p, kk * depth + d, i])
                for m in T.serial(rows // tile_rows):
                    for c in T.unroll(PANEL // TILE.columns):
                        multiply(x, slab, total, kk, m, c)
            for m in T.serial(rows):
                for j in T.serial(T.min(PANEL, n - p * PANEL)):
                    if s is None:
                        y[m, p * PANEL + j] = total[m, j]
                    else:
                        y[m, p * PANEL + j] = total[m, j] * s[p * PANEL + j]

    return body
