"""Mixture of experts: y = sum of each token's best experts, w2(silu(w1 x) * w3 x), weighted by a softmax of the scores.

Tokens are grouped by expert: each expert's panels are read once for all tokens that chose it, and not at all if none
did. Threads share the panels, not the experts, so they stay equally busy whichever experts are chosen. A pair is one
token with one of its experts.

Bytes per call: the matrices of the chosen experts; operations: 6 * pairs * dim * hidden_dim.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.panels import as_read, number, padded_k, steps_together
from build.kernels.cpu.vector import add_outer_product, clear, exp, silu
from build.kernels.mixture_function import mixture_function
from build.kernels.shapes import Mixture
from export.weights.format import Storage
from export.weights.table import panel_layout
from runtime.artifact.layouts import PANEL

ATTRIBUTES = {"tirx.noalias": True, "op_pattern": 8}
LOWEST = -3.4028234e38  # of float32


def mixture(level: Level, shape: Mixture) -> PrimFunc:
    """Mixture kernel; its parameters are those of `mixture_function`."""
    rows, dim, hidden_dim = shape.tokens, shape.dim, shape.hidden_dim
    n_experts, per_token = shape.n_experts, shape.experts_per_token
    pairs = shape.pairs
    route = _route(rows, n_experts, per_token)
    up = _grouped_product(level, shape.weight, rows, n_experts, 2 * hidden_dim, dim, pairs_per_row=per_token)
    down = _grouped_product(level, shape.weight, rows, n_experts, dim, hidden_dim, pairs_per_row=1)
    lanes = fitting_lanes(level, hidden_dim)

    @T.inline
    def body(x, scores, w13, s13, w2, s2, y, chosen, share, count, members, both, gated, mixed):
        route(scores, chosen, share, count, members)
        up(x, w13, s13, count, members, both)
        for i in T.parallel(pairs):
            for c in T.serial(hidden_dim // lanes):
                for v in T.vectorized(lanes):
                    gated[i, c * lanes + v] = silu(both[i, c * lanes + v]) * both[i, hidden_dim + c * lanes + v]
        down(gated, w2, s2, count, members, mixed)
        for i in T.serial(rows):
            for d in T.serial(dim):
                y[i, d] = share[i * per_token] * mixed[i * per_token, d]
            for j in T.serial(per_token - 1):
                for d in T.serial(dim):
                    y[i, d] = y[i, d] + share[i * per_token + 1 + j] * mixed[i * per_token + 1 + j, d]

    return mixture_function(shape, lambda n, k: panel_layout(shape.weight, n, k).shape, ATTRIBUTES, body)


def _route(rows: int, n_experts: int, per_token: int):
    """Inline for each row's best experts (first among equals), their shares, and each expert's pairs in row order."""

    @T.inline
    def body(scores, chosen, share, count, members):
        for e in T.serial(n_experts):
            count[e] = 0
        for i in T.serial(rows):
            taken = T.alloc_buffer((n_experts,), "int32")
            best = T.alloc_buffer((1,), "float32")
            total = T.alloc_buffer((1,), "float32")
            for e in T.serial(n_experts):
                taken[e] = 0
            total[0] = T.float32(0)
            for j in T.serial(per_token):
                pair = i * per_token + j
                chosen[pair] = j  # kept if the scores are NaN
                best[0] = T.float32(LOWEST)
                for e in T.serial(n_experts):
                    if taken[n_experts - 1 - e] == 0 and scores[i, n_experts - 1 - e] >= best[0]:
                        chosen[pair] = n_experts - 1 - e
                        best[0] = scores[i, n_experts - 1 - e]
                taken[chosen[pair]] = 1
                share[pair] = exp(scores[i, chosen[pair]] - scores[i, chosen[i * per_token]])
                total[0] = total[0] + share[pair]
                members[chosen[pair], count[chosen[pair]]] = pair
                count[chosen[pair]] = count[chosen[pair]] + 1
            for j in T.serial(per_token):
                share[i * per_token + j] = share[i * per_token + j] / total[0]

    return body


def _grouped_product(level: Level, weight: Storage, rows: int, n_experts: int, n: int, k: int, *, pairs_per_row: int):
    """Inline for out[pair] = w[expert of the pair] x[pair // pairs_per_row], for every pair.

    Each panel of an expert is read once for a tile of its pairs.
    """
    panels = -(-n // PANEL)
    tile_rows, tile_columns = (1, PANEL) if rows == 1 else (level.tile.rows, level.tile.columns)
    lanes = level.lanes
    turn, steps = steps_together(weight), padded_k(weight, k)
    # K is summed in two halves: one row reads both at once, which hides latency.
    runs = 2 if steps // turn % 2 == 0 else 1
    run, together = steps // runs, runs if rows == 1 else 1
    size = tile_rows * tile_columns

    def within_k(step):
        return step if steps == k else T.min(step, k - 1)  # weights beyond K are zero

    @T.inline
    def store(acc, s, e, p, c, members, first, count, out):
        for r in T.unroll(tile_rows):
            if first + r < count[e]:
                for j in T.serial(T.max(T.min(tile_columns, n - p * PANEL - c * tile_columns), 0)):
                    column = p * PANEL + c * tile_columns + j
                    if s is None:
                        out[members[e, first + r], column] = acc[r * tile_columns + j]
                    else:
                        out[members[e, first + r], column] = acc[r * tile_columns + j] * s[e * n + column]

    @T.inline
    def multiply(x, w, acc, e, p, c, members, first, last):
        clear(acc, runs * size // lanes, lanes)
        for start in T.unroll(runs // together):
            for d in T.serial(run // turn):
                for u in T.unroll(together):
                    for o in T.unroll(turn):
                        add_outer_product(
                            acc,
                            (start + u) * size,
                            tile_rows,
                            tile_columns,
                            lanes,
                            lambda r: x[
                                members[e, T.min(first + r, last)] // pairs_per_row,
                                within_k((start + u) * run + d * turn + o),
                            ],
                            lambda column: number(
                                w, e * panels + p, (start + u) * run + d * turn + o, c * tile_columns + column
                            ),
                        )
        for i in T.unroll((runs - 1) * size // lanes):
            for v in T.vectorized(lanes):
                acc[i * lanes + v] = acc[i * lanes + v] + acc[size + i * lanes + v]

    @T.inline
    def body(x, w, s, count, members, out):
        weights = as_read(w)
        for p in T.parallel(panels):
            acc = T.alloc_buffer((runs * size,), "float32")
            for e in T.serial(n_experts):
                for tile in T.serial((count[e] + tile_rows - 1) // tile_rows):
                    for c in T.unroll(PANEL // tile_columns):
                        multiply(x, weights, acc, e, p, c, members, tile * tile_rows, count[e] - 1)
                        store(acc, s, e, p, c, members, tile * tile_rows, count, out)

    return body
