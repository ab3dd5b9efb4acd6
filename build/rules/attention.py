"""Attention over a rolling cache, which must have exactly its window: a graph that has lost it does not match."""

from math import prod

import numpy as np

from build.kernels.shapes import RollingAttention
from build.rules.context import Context, Region
from build.rules.dataflow import END, Expr, NoMatch, constant, dtype, expect_constant, integer, number, shape
from build.rules.shared import expect_last_axis, positions_of
from build.rules.stored_columns import stored_columns
from export.static_model.constants import MASKED_SCORE
from runtime.artifact.tensor_file import numpy_dtype


def rolling_attention(c: Context, root: Expr) -> Region:
    """Match everything between the stacked projection and wo.

    These are: split, rotate, append, mask, softmax, mix, merge, and the roll of both caches.
    """
    p, m = c.dataflow, c.model
    if len(shape(root)) != 3:
        raise NoMatch(f"expected a (B, T, dim) result, found {shape(root)}")
    rows, tokens, _ = shape(root)
    merged = p.permuted(p.args(root, "reshape")[0], (0, 2, 1, 3))  # (B, n_heads, T, head_dim)
    weights, values = p.args(p.args(merged, "reshape")[0], "matmul")
    scores, queries, keys, mask = _masked_scores(c, weights)
    value_caches, new_values = stored_columns(c, values)
    key_caches, new_keys = stored_columns(c, p.permuted(keys, (0, 1, 2, 4, 3)))
    key_cache = key_caches[0]
    if [dtype(cache) for cache in key_caches] != [dtype(cache) for cache in value_caches]:
        raise NoMatch("expected keys and values to be stored alike")
    window = shape(key_cache)[2]
    positions = _banded_mask(c, mask, window)
    query_heads, cos, sin = _rotated(c, _unscaled(c, p.args(queries, "reshape")[0], positions))
    key_heads, *key_rotation = _rotated(c, new_keys)
    if key_rotation != [cos, sin]:
        raise NoMatch("expected queries and keys to be rotated by the same angles")
    bounds = [m.n_heads * m.head_dim, (m.n_heads + m.n_kv_heads) * m.head_dim]
    parts = [
        p.sliced(_projected(c, heads), 2, begin, end)
        for heads, begin, end in (
            (query_heads, 0, bounds[0]),
            (key_heads, bounds[0], bounds[1]),
            (new_values, bounds[1], END),
        )
    ]
    if len({part.name for part in parts}) != 1:
        raise NoMatch("expected queries, keys and values from one projection")
    caches = tuple(cache for pair in zip(key_caches, value_caches, strict=True) for cache in pair)
    slots, _, ring_len, _ = shape(c.rings[key_cache])
    kernel = RollingAttention(
        rows,
        tokens,
        m.n_heads,
        m.n_kv_heads,
        m.head_dim,
        slots,
        window,
        ring_len,
        dtype(key_cache),
        scores,
        m.query_scaling,
    )
    cache_bytes = sum(prod(shape(cache)) * numpy_dtype(dtype(cache)).itemsize for cache in caches)
    flops = 4 * rows * tokens * m.n_heads * m.head_dim * window
    inputs = (parts[0], cos, sin, positions, c.slots, *(c.rings[cache] for cache in caches))
    updates = tuple(range(len(inputs) - len(caches), len(inputs)))
    return Region(
        "rolling_attention", (kernel,), inputs, root, c.input_name(key_cache), cache_bytes, flops, updates=updates
    )


def _masked_scores(c: Context, weights: Expr) -> tuple[float, Expr, Expr, Expr]:
    """Match softmax(where(mask, q k^T * scale, MASKED_SCORE)); returns scale, q, k^T and mask."""
    p = c.dataflow
    (masked,) = p.args(weights, "nn.softmax")
    expect_last_axis(weights, p.calls[weights].attrs.axis)
    mask, scaled, hidden = p.args(masked, "where")
    expect_constant(hidden, MASKED_SCORE)
    product, scale = p.args(scaled, "multiply")
    queries, keys = p.args(product, "matmul")
    inner = p.args(p.args(mask, "expand_dims")[0], "expand_dims")[0]
    return number(scale), queries, keys, inner


def _rotated(c: Context, value: Expr) -> tuple[Expr, Expr, Expr]:
    """Match concat(a cos - b sin, b cos + a sin) of the halves a and b; returns the unrotated heads, cos and sin."""
    p = c.dataflow
    first, second = p.concatenated(value, 3)
    a_cos, b_sin = p.args(first, "subtract")
    b_cos, a_sin = p.args(second, "add")
    a, cos = p.args(a_cos, "multiply")
    b, sin = p.args(b_sin, "multiply")
    if tuple(p.args(b_cos, "multiply")) != (b, cos) or tuple(p.args(a_sin, "multiply")) != (a, sin):
        raise NoMatch("expected a rotation of half-split pairs")
    half = shape(value)[3] // 2
    heads = p.sliced(a, 3, 0, half)
    if p.sliced(b, 3, half, END) != heads:
        raise NoMatch("expected both halves of one tensor")
    return heads, cos, sin


def _unscaled(c: Context, queries: Expr, positions: Expr) -> Expr:
    """Rotated queries before the factor of their positions that the model calls for, if it does.

    The factor is 1 + beta log(1 + floor(max(position, 0) / original context)).
    """
    p, scaling = c.dataflow, c.model.query_scaling
    if scaling is None:
        return queries
    rotated, column = p.args(queries, "multiply")
    factor = p.args(p.args(column, "expand_dims")[0], "expand_dims")[0]
    growth, one = p.args(factor, "add")
    logarithm, beta = p.args(growth, "multiply")
    times, first = p.args(p.args(logarithm, "log")[0], "add")
    position, original = p.args(p.args(times, "floor")[0], "divide")
    for found, expected in ((one, 1), (beta, scaling.beta), (first, 1), (original, scaling.original_context)):
        expect_constant(found, expected)
    if positions_of(c, p.args(position, "nn.relu")[0]) != positions:
        raise NoMatch("expected queries to be scaled by their own positions")
    return rotated


def _projected(c: Context, heads: Expr) -> Expr:
    """The (B, T, n * head_dim) tensor that (B, n, T, head_dim) heads were split from."""
    return c.dataflow.args(c.dataflow.permuted(heads, (0, 2, 1, 3)), "reshape")[0]


def _banded_mask(c: Context, mask: Expr, window: int) -> Expr:
    """Match (key >= 0) and (key <= query) and (key > query - window) over past and new columns.

    Returns the positions that the mask is made from.
    """
    p = c.dataflow
    written_causal, recent = p.args(mask, "logical_and")
    written, causal = p.args(written_causal, "logical_and")
    key, zero = p.args(written, "greater_equal")
    expect_constant(zero, 0)
    causal_key, query = p.args(causal, "less_equal")
    recent_key, oldest = p.args(recent, "greater")
    if not key == causal_key == recent_key:
        raise NoMatch("expected the same key positions to be compared with zero, the query and the window")
    shifted_query, distance = p.args(oldest, "subtract")
    if integer(constant(distance)) != window:
        raise NoMatch(f"expected a window of {window} positions in the mask, found {integer(constant(distance))}")
    (positions,) = p.args(query, "expand_dims")
    past, new = p.concatenated(p.args(key, "expand_dims")[0], 1)
    first, ages = p.args(past, "subtract")
    expect_constant(ages, np.arange(window, 0, -1))
    start = p.sliced(first, 1, 0, 1) if shape(positions)[1] > 1 else first
    if not positions == new == start or shifted_query != query:
        raise NoMatch("expected key and query positions from one tensor")
    return positions
