"""A mixture of experts: the graph computes every expert for every token, the kernel only the chosen ones."""

from math import prod

import numpy as np

from build.kernels.shapes import Mixture
from build.rules.context import Context, Region
from build.rules.dataflow import Expr, NoMatch, expect_constant, integer, shape
from build.rules.shared import gated


def mixture(c: Context, root: Expr) -> Region:
    """Match every expert's feed-forward of every token, times the token's share of it, summed over the experts."""
    p, m = c.dataflow, c.model
    weighted = _reduced(c, p.args(root, "reshape")[0], 0)
    outputs, shares = p.args(weighted, "multiply")
    hidden, w2_columns = p.args(outputs, "matmul")
    both = gated(c, hidden)
    tokens, w13_columns = p.args(both, "matmul")
    x = p.args(tokens, "reshape")[0]
    w13, w2 = (c.weight(p.args(p.permuted(columns, (0, 2, 1)), "reshape")[0]) for columns in (w13_columns, w2_columns))
    scores, per_token = _chosen(c, shares)
    *lead, n_experts = shape(scores)
    expected = (tuple(lead), m.dim, m.hidden_dim, n_experts)
    found = (tuple(shape(x)[:-1]), w13.k, w2.k, w13.n // (2 * m.hidden_dim))
    if found != expected or w2.n != n_experts * m.dim or w13.tensor.stored != w2.tensor.stored:
        raise NoMatch(f"expected experts of sizes {expected}, found {found}")
    kernel = Mixture(tuple(lead), m.dim, m.hidden_dim, n_experts, per_token, w13.tensor.stored)
    pairs = prod(lead) * per_token
    nbytes = (w13.nbytes + w2.nbytes) * min(pairs, n_experts) // n_experts
    inputs, flops = (x, scores, *w13.parts, *w2.parts), 6 * pairs * m.dim * m.hidden_dim
    return Region("mixture", (kernel,), inputs, root, w13.tensor.name, nbytes, flops, scratch=kernel.scratch)


def _chosen(c: Context, shares: Expr) -> tuple[Expr, int]:
    """Match shares (n_experts, tokens, 1): softmax over each token's best scores, and zero elsewhere.

    Returns the scores and how many of them are chosen as the best.
    """
    p = c.dataflow
    by_expert = p.permuted(p.args(shares, "expand_dims")[0], (1, 0))
    placed = _reduced(c, p.args(by_expert, "reshape")[0], -2)
    is_chosen, share, nothing = p.args(placed, "where")
    expect_constant(nothing, 0)
    (best,) = p.args(p.args(share, "expand_dims")[0], "nn.softmax")
    chosen, numbers = p.args(is_chosen, "equal")
    top, which = p.tuple_item(p.args(chosen, "expand_dims")[0])
    if p.tuple_item(best) != (top, 0) or which != 1:
        raise NoMatch("expected scores and experts from the same top-k")
    (scores,) = p.args(top, "topk")
    attributes = p.calls[top].attrs
    expect_constant(numbers, np.arange(shape(scores)[-1]))
    if not attributes.largest or integer(attributes.axis) not in (-1, len(shape(scores)) - 1):
        raise NoMatch("expected the largest scores of the last axis")
    return scores, integer(attributes.k)


def _reduced(c: Context, value: Expr, axis: int) -> Expr:
    """The source of a sum over one axis that is not kept."""
    (source,) = c.dataflow.args(value, "sum")
    attributes = c.dataflow.calls[value].attrs
    rank = len(shape(source))
    if [integer(n) % rank for n in attributes.axis] != [axis % rank] or attributes.keepdims:
        raise NoMatch(f"expected a sum over axis {axis}")
    return source
