"""Mixture of experts: y = sum of each token's best experts, w2(silu(w1 x) * w3 x), weighted by a softmax of the scores.

Launches: route (one thread per token), group (one block per expert), w13, gate, w2, sum; on tensor cores, one more in
front of each product rounds its activations to float16. In the products, a block computes one panel (on tensor cores,
several) of one expert for a tile of the pairs that chose it; a block whose tile is empty reads nothing. A pair is one
token with one of its experts.

Bytes per call: the matrices of the chosen experts, once per tile of pairs; operations: 6 * pairs * dim * hidden_dim.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding
from build.kernels.cuda.expert_tiles import expert_tiles
from build.kernels.cuda.gemm import THREADS, TILE, RowTiles, tile_product
from build.kernels.cuda.gemv import gemv_warps
from build.kernels.cuda.panel_dot import Held, held_sizes, panel_dot, panel_total, vectors_of
from build.kernels.cuda.swiglu import gated_rows
from build.kernels.cuda.tensor_core import fits
from build.kernels.cuda.weights import Loading
from build.kernels.mixture_function import mixture_function
from build.kernels.shapes import Mixture
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL


def mixture(shape: Mixture, on: Binding = GPU, *, tensor_cores: bool = False) -> PrimFunc:
    """Mixture kernel; its parameters are those of `mixture_function`.

    With `tensor_cores`, products of many pairs may round activations to float16.
    """
    dim, hidden_dim = shape.dim, shape.hidden_dim
    up = _product(shape, 2 * hidden_dim, dim, shape.experts_per_token, on, tensor_cores=tensor_cores)
    down = _product(shape, dim, hidden_dim, 1, on, tensor_cores=tensor_cores)
    route, group, combine = _route(shape, on), _group(shape, on), _combine(shape, on)
    gate, loading = gated_rows(shape.pairs, hidden_dim, on), Loading.of(shape.weight)

    @T.inline
    def body(x, scores, w13_in, s13, w2_in, s2, y, chosen, share, count, members, both, hidden, mixed):
        w13 = loading.declared(w13_in)
        w2 = loading.declared(w2_in)
        route(scores, chosen, share)
        group(chosen, count, members)
        up(x, w13, s13, chosen, count, members, both)
        gate(both, hidden)
        down(hidden, w2, s2, chosen, count, members, mixed)
        combine(share, mixed, y)

    return mixture_function(shape, lambda n, k: vector_layout(shape.weight, n, k).shape, ATTRIBUTES, body)


def _route(shape: Mixture, on: Binding):
    """A launch, one thread per token: its best experts (first among equals) and the softmax over their scores."""
    rows, n_experts, per_token = shape.tokens, shape.n_experts, shape.experts_per_token

    @T.inline
    def choose(scores, chosen, share, i):
        best = T.alloc_buffer((1,), "float32", scope=on.private)
        total = T.alloc_buffer((1,), "float32", scope=on.private)
        taken = T.alloc_buffer((n_experts,), "int32", scope=on.private)
        for e in T.serial(n_experts):
            taken[e] = 0
        total[0] = T.float32(0)
        for j in T.serial(per_token):
            pair = i * per_token + j
            chosen[pair] = -1
            best[0] = T.float32(0)
            for e in T.serial(n_experts):  # scores that are NaN still give a different expert each time
                if taken[n_experts - 1 - e] == 0 and (chosen[pair] < 0 or scores[i, n_experts - 1 - e] >= best[0]):
                    chosen[pair] = n_experts - 1 - e
                    best[0] = scores[i, n_experts - 1 - e]
            taken[chosen[pair]] = 1
            share[pair] = T.exp(scores[i, chosen[pair]] - scores[i, chosen[i * per_token]])
            total[0] = total[0] + share[pair]
        for j in T.serial(per_token):
            share[i * per_token + j] = share[i * per_token + j] / total[0]

    @T.inline
    def body(scores, chosen, share):
        for block in on.blocks(-(-rows // THREADS)):
            for t in on.threads(THREADS):
                if block * THREADS + t < rows:
                    choose(scores, chosen, share, block * THREADS + t)

    return body


def _group(shape: Mixture, on: Binding):
    """A launch, one block per expert, whose threads look at some pairs each: the expert's pairs in order."""
    each = -(-shape.pairs // THREADS)

    def is_own(chosen, e, pair):
        return T.And(pair < shape.pairs, chosen[T.min(pair, shape.pairs - 1)] == e)

    @T.inline
    def count_own(chosen, e, found, t):
        own = T.alloc_buffer((1,), "int32", scope=on.private)
        own[0] = 0
        for c in T.serial(each):
            if is_own(chosen, e, t * each + c):
                own[0] = own[0] + 1
        found[t] = own[0]

    @T.inline
    def list_own(chosen, e, found, count, members, t):
        at = T.alloc_buffer((1,), "int32", scope=on.private)
        at[0] = 0
        for before in T.serial(t):
            at[0] = at[0] + found[before]
        for c in T.serial(each):
            if is_own(chosen, e, t * each + c):
                members[e, at[0]] = t * each + c
                at[0] = at[0] + 1
        if t == THREADS - 1:
            count[e] = at[0]

    @T.inline
    def body(chosen, count, members):
        for e in on.blocks(shape.n_experts):
            found = T.alloc_buffer((THREADS,), "int32", scope=on.shared)
            for t in on.threads(THREADS):
                count_own(chosen, e, found, t)
            for t in on.threads(THREADS):
                list_own(chosen, e, found, count, members, t)

    return body


def _product(shape: Mixture, n: int, k: int, pairs_per_row: int, on: Binding, *, tensor_cores: bool):
    """Inline `product(x, w, s, chosen, count, members, out)`: each row of out = an expert's matrix times a row of x.

    Row i of out is the chosen expert's matrix (n, k) times row i // pairs_per_row of x.
    """
    if shape.tokens == 1:
        return _pair_product(shape, n, k, pairs_per_row, on)
    if tensor_cores and fits(shape.weight, shape.tokens):
        return expert_tiles(shape, n, k, pairs_per_row, on)
    return _grouped_product(shape, n, k, pairs_per_row, on)


def _pair_product(shape: Mixture, n: int, k: int, pairs_per_row: int, on: Binding):
    """The product for one token: one block per panel of each of its experts."""
    panels = -(-n // PANEL)
    warps = gemv_warps(shape.pairs * panels, vectors_of(shape.weight, k))
    (hold, dot), total = panel_dot(shape.weight, k, warps, on), panel_total(shape.weight, warps)
    sizes, dtype = held_sizes(shape.weight), Loading.of(shape.weight).dtype

    @T.inline
    def body(x, w, s, chosen, _count, _members, out):
        for block in on.blocks(shape.pairs * panels):
            partial = T.alloc_buffer((warps, PANEL), "float32", scope=on.shared)
            pair = block // panels
            p = block % panels
            words = T.alloc_buffer((on.copies(warps * WARP) * sizes[0],), dtype, scope=on.private)
            hold(w, None, None, chosen[pair] * panels + p, Held(words, None, None))
            dot(
                x,
                pair // pairs_per_row,
                w,
                None,
                None,
                None,
                chosen[pair] * panels + p,
                Held(words, None, None),
                partial,
                0,
            )
            for t in on.threads(warps * WARP):
                if t < PANEL and p * PANEL + t < n:
                    out[pair, p * PANEL + t] = total(partial, 0, s, chosen[pair] * n + p * PANEL + t, t)

    return body


def _grouped_product(shape: Mixture, n: int, k: int, pairs_per_row: int, on: Binding):
    """The product for several tokens: one block per panel of an expert and tile of the pairs that chose it."""
    panels, n_experts = -(-n // PANEL), shape.n_experts
    tiles = RowTiles.of(shape.tokens)  # a token chooses an expert at most once
    multiply = tile_product(shape.weight, k, tiles, on, source=lambda place, i: place[0][place[1], i] // pairs_per_row)

    @T.inline
    def body(x, w, s, _chosen, count, members, out):
        for block in on.blocks(n_experts * panels * tiles.count):
            x_tile = T.alloc_buffer((tiles.tile_rows, TILE.depth), "float32", scope=on.shared)
            w_tile = T.alloc_buffer((TILE.depth, PANEL), "float32", scope=on.shared)
            acc = T.alloc_buffer((on.copies(THREADS), tiles.per_warp), "float32", scope=on.private)
            e = block // (panels * tiles.count)
            p = block // tiles.count % panels
            m = block % tiles.count * tiles.tile_rows
            multiply(x, (members, e), w, None, None, e * panels + p, m, count[e], x_tile, w_tile, acc)
            for t in on.threads(THREADS):
                for r in on.unroll(tiles.per_warp):
                    i = m + t // WARP * tiles.per_warp + r
                    j = p * PANEL + t % WARP
                    if i < count[e] and j < n:
                        out[members[e, i], j] = _scaled(acc[on.own(t), r], s, e * n + j)

    return body


def _scaled(found: Any, s: Any, row: Any) -> Any:
    """A sum times the scale of its row, if there are scales."""
    return found if s is None else found * s[row]


def _combine(shape: Mixture, on: Binding):
    """A launch, one thread per element: y = the weighted sum of the experts' outputs."""
    dim, per_token, parts = shape.dim, shape.experts_per_token, -(-shape.dim // THREADS)

    @T.inline
    def body(share, mixed, y):
        for block in on.blocks(shape.tokens * parts):
            for t in on.threads(THREADS):
                i = block // parts
                j = block % parts * THREADS + t
                if j < dim:
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for rank in T.serial(per_token):
                        total[0] = total[0] + share[i * per_token + rank] * mixed[i * per_token + rank, j]
                    y[i, j] = total[0]

    return body
