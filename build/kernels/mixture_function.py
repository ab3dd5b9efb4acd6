"""The mixture kernel's parameters, the same for every target; each target supplies the body that works on them."""

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.shapes import Mixture


def mixture_function(
    shape: Mixture,
    layout: Callable[[int, int], tuple[int, ...]],
    attributes: Mapping[str, Any],
    body: Callable[..., Any],
) -> PrimFunc:
    """Build the mixture kernel from x (*lead, dim) and scores (*lead, n_experts) to y (*lead, dim).

    Between scores and y come w13 and w2 in panels, each followed by its scales when the shape is `scaled`.
    `layout(n, k)` is the shape of one expert's packed matrix; the matrices of all experts are stacked along the first
    dimension. After y come the scratch tensors of `shape`.

    `body` gets all of these: x, scores and y with one row per token, and None for scales that do not exist.
    """
    rows, dim, hidden_dim, pairs, n_experts = shape.tokens, shape.dim, shape.hidden_dim, shape.pairs, shape.n_experts
    (panels_13, *rest_13), (panels_2, *rest_2) = layout(2 * hidden_dim, dim), layout(dim, hidden_dim)

    @T.inline
    def by_rows(x_in, scores_in, w13, s13, w2, s2, y_out, chosen, share, count, members, both, gated, mixed):
        x = T.decl_buffer((rows, dim), "float32", data=x_in.data)
        scores = T.decl_buffer((rows, n_experts), "float32", data=scores_in.data)
        y = T.decl_buffer((rows, dim), "float32", data=y_out.data)
        body(x, scores, w13, s13, w2, s2, y, chosen, share, count, members, both, gated, mixed)

    @T.prim_func
    def plain(
        x: T.Buffer((*shape.lead, dim), "float32"),
        scores: T.Buffer((*shape.lead, n_experts), "float32"),
        w13: T.Buffer((n_experts * panels_13, *rest_13), shape.weight_dtype),
        w2: T.Buffer((n_experts * panels_2, *rest_2), shape.weight_dtype),
        y: T.Buffer((*shape.lead, dim), "float32"),
        chosen: T.Buffer((pairs,), "int32"),
        share: T.Buffer((pairs,), "float32"),
        count: T.Buffer((n_experts,), "int32"),
        members: T.Buffer((n_experts, pairs), "int32"),
        both: T.Buffer((pairs, 2 * hidden_dim), "float32"),
        gated: T.Buffer((pairs, hidden_dim), "float32"),
        mixed: T.Buffer((pairs, dim), "float32"),
    ):
        T.func_attr(attributes)
        by_rows(x, scores, w13, None, w2, None, y, chosen, share, count, members, both, gated, mixed)

    @T.prim_func
    def dequantizing(
        x: T.Buffer((*shape.lead, dim), "float32"),
        scores: T.Buffer((*shape.lead, n_experts), "float32"),
        w13: T.Buffer((n_experts * panels_13, *rest_13), shape.weight_dtype),
        s13: T.Buffer((n_experts * 2 * hidden_dim,), "float32"),
        w2: T.Buffer((n_experts * panels_2, *rest_2), shape.weight_dtype),
        s2: T.Buffer((n_experts * dim,), "float32"),
        y: T.Buffer((*shape.lead, dim), "float32"),
        chosen: T.Buffer((pairs,), "int32"),
        share: T.Buffer((pairs,), "float32"),
        count: T.Buffer((n_experts,), "int32"),
        members: T.Buffer((n_experts, pairs), "int32"),
        both: T.Buffer((pairs, 2 * hidden_dim), "float32"),
        gated: T.Buffer((pairs, hidden_dim), "float32"),
        mixed: T.Buffer((pairs, dim), "float32"),
    ):
        T.func_attr(attributes)
        by_rows(x, scores, w13, s13, w2, s2, y, chosen, share, count, members, both, gated, mixed)

    return dequantizing if shape.scaled else plain
