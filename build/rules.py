"""Rules that find the regions of the imported graph which kernels compute. Each answers a `Region`, or raises `NoMatch` for "not mine".

A rule checks everything that the kernel takes for granted: slice bounds, axes, constants, and, for attention, that the mask is the banded causal
mask of exactly this cache's length and that the graph's new cache is the old one rolled by T. A graph that lost its window matches no rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from build.kernels.shapes import Mixture, RollingAttention
from build.producers import END, Expr, NoMatch, Producers, constant, dtype, expect_constant, integer, shape
from export.model_constants import MASKED_SCORE
from runtime.manifest import ModelConfig

ITEMSIZE = {"float32": 4, "float16": 2, "int8": 1, "int64": 8}


@dataclass(frozen=True)
class Region:
    """One kernel call: what it computes, from which values, and what it costs."""

    op: str  # a row of the kernel table
    arguments: tuple[Any, ...]  # of the kernel's maker
    inputs: tuple[Expr, ...]  # tensors, in the kernel's order
    output: Expr  # the value that the region computes
    label: str  # the weight or cache that tells this call from others of the same op
    bytes: int  # least memory traffic of one call: weights and caches read, without activations
    flops: int
    updates: tuple[int, ...] = ()  # positions of inputs that are updated in place
    scratch: tuple[tuple[tuple[int, ...], str], ...] = ()  # shape and dtype of what the kernel keeps between its steps; written after the output


@dataclass(frozen=True)
class Context:
    """What rules need to know about the function that they read."""

    producers: Producers
    model: ModelConfig
    names: tuple[str, ...]  # of the parameters, signature inputs first
    present: dict[Expr, Expr]  # cache parameter to the graph's output that replaces it

    def parameter_name(self, value: Expr) -> str:
        """Name of a parameter, or NoMatch."""
        index = self.producers.parameters.get(value)
        if index is None:
            raise NoMatch("expected a parameter, found a computed value")
        return self.names[index]


Rule = Callable[[Context, Expr], Region]


@dataclass(frozen=True)
class Weight:
    """A matrix parameter as the graph reads it: directly, widened from float16, or dequantized from int8."""

    inputs: tuple[Expr, ...]  # the stored matrix, and its scale where it has one
    name: str
    n: int
    k: int
    dtype: str

    @property
    def scaled(self) -> bool:
        """Whether a scale per output channel goes with it."""
        return len(self.inputs) == 2

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix and its scale."""
        return self.n * self.k * ITEMSIZE[self.dtype] + (4 * self.n if self.scaled else 0)


def weight(c: Context, value: Expr) -> Weight:
    """Read `w`, `astype(w)` or `dequantize(w, scale, 0)` with one scale per row of a (N, K) parameter."""
    call = c.producers.calls.get(value)
    if call is None:
        inputs: tuple[Expr, ...] = (value,)
    elif len(call.args) == 1:
        inputs = tuple(c.producers.args(value, "astype"))
    else:
        matrix, scale, zero_point = c.producers.args(value, "dequantize")
        expect_constant(zero_point, 0)
        if call.attrs.axis != 0:
            raise NoMatch(f"expected one scale per output channel (axis 0), found axis {call.attrs.axis}")
        inputs = (matrix, scale)
    name = c.parameter_name(inputs[0])
    n, k = shape(inputs[0])
    return Weight(inputs, name, n, k, dtype(inputs[0]))


def linear(c: Context, root: Expr) -> Region:
    """matmul(x, transpose(weight))."""
    x, transposed = c.producers.args(root, "matmul")
    w = weight(c, c.producers.permuted(transposed, (1, 0)))
    lead = shape(x)[:-1]
    return Region("linear", (lead, w.n, w.k, w.dtype, w.scaled), (x, *w.inputs), root, w.name, w.nbytes, 2 * prod(lead) * w.n * w.k)


def embedding(c: Context, root: Expr) -> Region:
    """take(weight, ids), where the importer has added the wrap-around of negative ids, which token ids never are."""
    table, wrapped = c.producers.args(root, "take")
    _, _, ids = c.producers.args(wrapped, "where")
    w = weight(c, table)
    lead = shape(ids)
    row_bytes = w.k * ITEMSIZE[w.dtype]
    return Region("embedding", (lead, w.n, w.k, w.dtype, w.scaled), (ids, *w.inputs), root, w.name, prod(lead) * row_bytes, 0)


def rms_norm(c: Context, root: Expr) -> Region:
    """weight * (x * (1 / sqrt(mean(x * x) + eps)))."""
    p = c.producers
    gain, normed = p.args(root, "multiply")
    x, inverse = p.args(normed, "multiply")
    one, square_root = p.args(inverse, "divide")
    expect_constant(one, 1.0)
    mean, eps = p.args(p.args(square_root, "sqrt")[0], "add")
    (squares,) = p.args(mean, "mean")
    _expect_last_axis(squares, *p.calls[mean].attrs.axis)
    if tuple(p.args(squares, "multiply")) != (x, x):
        raise NoMatch("expected the mean of x * x")
    *lead, dim = shape(x)
    name = c.parameter_name(gain)
    return Region("rms_norm", (tuple(lead), dim, float(constant(eps))), (x, gain), root, name, 4 * dim, 4 * prod(lead) * dim)


def swiglu(c: Context, root: Expr) -> Region:
    """silu(both[..., :F]) * both[..., F:]."""
    *lead, hidden_dim = shape(root)
    return Region("swiglu", (tuple(lead), hidden_dim), (_gated(c, root),), root, "w13 output", 0, 4 * prod(lead) * hidden_dim)


def _gated(c: Context, root: Expr) -> Expr:
    """silu(both[..., :F]) * both[..., F:] of three axes to `both`."""
    p = c.producers
    activated, up = p.args(root, "multiply")
    gate, sigmoid = p.args(activated, "multiply")
    if p.args(sigmoid, "sigmoid")[0] != gate:
        raise NoMatch("expected gate * sigmoid(gate)")
    hidden_dim = shape(root)[-1]
    both = p.sliced(gate, 2, 0, hidden_dim)
    if p.sliced(up, 2, hidden_dim, END) != both:
        raise NoMatch("expected gate and up from one tensor")
    return both


def mixture(c: Context, root: Expr) -> Region:
    """Every expert's feed-forward of every token, times the token's share of it, summed over the experts."""
    p, m = c.producers, c.model
    weighted = _reduced(c, p.args(root, "reshape")[0], 0)
    outputs, shares = p.args(weighted, "multiply")
    hidden, w2_columns = p.args(outputs, "matmul")
    both = _gated(c, hidden)
    tokens, w13_columns = p.args(both, "matmul")
    x = p.args(tokens, "reshape")[0]
    w13, w2 = (weight(c, p.args(p.permuted(columns, (0, 2, 1)), "reshape")[0]) for columns in (w13_columns, w2_columns))
    scores, per_token = _chosen(c, shares)
    *lead, n_experts = shape(scores)
    expected = (tuple(lead), m.dim, m.hidden_dim, n_experts)
    found = (tuple(shape(x)[:-1]), w13.k, w2.k, w13.n // (2 * m.hidden_dim))
    if found != expected or w2.n != n_experts * m.dim or (w13.dtype, w13.scaled) != (w2.dtype, w2.scaled):
        raise NoMatch(f"expected experts of sizes {expected}, found {found}")
    kernel = Mixture(tuple(lead), m.dim, m.hidden_dim, n_experts, per_token, w13.dtype, w13.scaled)
    pairs = prod(lead) * per_token
    nbytes = (w13.nbytes + w2.nbytes) * min(pairs, n_experts) // n_experts
    return Region(
        "mixture", (kernel,), (x, scores, *w13.inputs, *w2.inputs), root, w13.name, nbytes, 6 * pairs * m.dim * m.hidden_dim, scratch=kernel.scratch
    )


def _chosen(c: Context, shares: Expr) -> tuple[Expr, int]:
    """Shares (n_experts, tokens, 1), softmax over each token's best scores and zero elsewhere, to the scores and how many are the best."""
    p = c.producers
    by_expert = p.permuted(p.args(shares, "expand_dims")[0], (1, 0))
    placed = _reduced(c, p.args(by_expert, "reshape")[0], -2)
    is_chosen, share, nothing = p.args(placed, "where")
    expect_constant(nothing, 0)
    (best,) = p.args(p.args(share, "expand_dims")[0], "nn.softmax")
    chosen, numbers = p.args(is_chosen, "equal")
    top, which = p.tuple_item(p.args(chosen, "expand_dims")[0])
    if p.tuple_item(best) != (top, 0) or which != 1:
        raise NoMatch("expected scores and experts of one top-k")
    (scores,) = p.args(top, "topk")
    attributes = p.calls[top].attrs
    expect_constant(numbers, np.arange(shape(scores)[-1]))
    if not attributes.largest or integer(attributes.axis) not in (-1, len(shape(scores)) - 1):
        raise NoMatch("expected the largest scores of the last axis")
    return scores, integer(attributes.k)


def _reduced(c: Context, value: Expr, axis: int) -> Expr:
    """The source of a sum over one axis that does not stay."""
    (source,) = c.producers.args(value, "sum")
    attributes = c.producers.calls[value].attrs
    rank = len(shape(source))
    if [integer(n) % rank for n in attributes.axis] != [axis % rank] or attributes.keepdims:
        raise NoMatch(f"expected a sum over axis {axis}")
    return source


def rolling_attention(c: Context, root: Expr) -> Region:
    """Everything between the stacked projection and wo: split, rotate, append, mask, softmax, mix, merge, and the roll of both caches."""
    p, m = c.producers, c.model
    if len(shape(root)) != 3:
        raise NoMatch(f"expected a (B, T, dim) result, found {shape(root)}")
    batch, tokens, _ = shape(root)
    merged = p.permuted(p.args(root, "reshape")[0], (0, 2, 1, 3))  # (B, n_heads, T, head_dim)
    weights, values = p.args(p.args(merged, "reshape")[0], "matmul")
    scores, queries, keys, mask = _masked_scores(c, weights)
    value_cache, new_values = _appended(c, _columns(c, values))
    key_cache, new_keys = _appended(c, _columns(c, p.permuted(keys, (0, 1, 2, 4, 3))))
    cache_len = shape(key_cache)[2]
    positions = _banded_mask(c, mask, cache_len)
    query_heads, cos, sin = _rotated(c, p.args(queries, "reshape")[0])
    key_heads, *key_rotation = _rotated(c, p.through(new_keys, "astype"))
    if key_rotation != [cos, sin]:
        raise NoMatch("expected queries and keys to be rotated by the same angles")
    bounds = [m.n_heads * m.head_dim, (m.n_heads + m.n_kv_heads) * m.head_dim]
    parts = [
        p.sliced(_projected(c, heads), 2, begin, end)
        for heads, begin, end in (
            (query_heads, 0, bounds[0]),
            (key_heads, bounds[0], bounds[1]),
            (p.through(new_values, "astype"), bounds[1], END),
        )
    ]
    if len({part.name for part in parts}) != 1:
        raise NoMatch("expected queries, keys and values from one projection")
    kernel = RollingAttention(batch, tokens, m.n_heads, m.n_kv_heads, m.head_dim, cache_len, dtype(key_cache), float(scores))
    cache_bytes = 2 * prod(shape(key_cache)) * ITEMSIZE[dtype(key_cache)]
    flops = 4 * batch * tokens * m.n_heads * m.head_dim * cache_len
    inputs = (parts[0], cos, sin, positions, key_cache, value_cache)
    return Region("rolling_attention", (kernel,), inputs, root, c.parameter_name(key_cache), cache_bytes, flops, updates=(4, 5))


def _masked_scores(c: Context, weights: Expr) -> tuple[float, Expr, Expr, Expr]:
    """softmax(where(mask, q k^T * scale, MASKED_SCORE)) to scale, q, k^T and mask."""
    p = c.producers
    (masked,) = p.args(weights, "nn.softmax")
    _expect_last_axis(weights, p.calls[weights].attrs.axis)
    mask, scaled, hidden = p.args(masked, "where")
    expect_constant(hidden, MASKED_SCORE)
    product, scale = p.args(scaled, "multiply")
    queries, keys = p.args(product, "matmul")
    inner = p.args(p.args(mask, "expand_dims")[0], "expand_dims")[0]
    return float(constant(scale)), queries, keys, inner


def _expect_last_axis(value: Expr, *axes: Any) -> None:  # noqa: ANN401 (TVM's integers)
    """What is computed along `axes` of `value` goes along its last axis alone."""
    found = [integer(axis) % len(shape(value)) for axis in axes]
    if found != [len(shape(value)) - 1]:
        raise NoMatch(f"expected the last of {len(shape(value))} axes, found {found}")


def _columns(c: Context, value: Expr) -> Expr:
    """The cache columns behind a shared-by-broadcast view, perhaps widened from the cache's dtype."""
    shared = c.producers.through(value, "astype")
    columns = c.producers.args(shared, "expand_dims")[0]
    axes = [integer(axis) for axis in c.producers.calls[shared].attrs.axis]
    if axes != [2]:
        raise NoMatch(f"expected cache columns that each group of heads shares (a new axis 2), found axis {axes}")
    return columns


def _appended(c: Context, columns: Expr) -> tuple[Expr, Expr]:
    """Concat(past, new) along the slots to (past, new), after checking that the graph's new cache is exactly its last W columns."""
    past, new = c.producers.concatenated(columns, 2)
    name = c.parameter_name(past)
    if c.present.get(past) is None or c.producers.sliced(c.present[past], 2, shape(new)[2], END) != columns:
        raise NoMatch(f"expected {name} to be rolled by {shape(new)[2]}")
    return past, new


def _rotated(c: Context, value: Expr) -> tuple[Expr, Expr, Expr]:
    """concat(a cos - b sin, b cos + a sin) of the halves a and b, to the unrotated heads, cos and sin."""
    p = c.producers
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


def _projected(c: Context, heads: Expr) -> Expr:
    """(B, n, T, head_dim) back to the (B, T, n * head_dim) that it was split from."""
    return c.producers.args(c.producers.permuted(heads, (0, 2, 1, 3)), "reshape")[0]


def _banded_mask(c: Context, mask: Expr, window: int) -> Expr:
    """(key >= 0) and (key <= query) and (key > query - window) over past and new columns, to the positions that it is made from."""
    p = c.producers
    written_causal, recent = p.args(mask, "logical_and")
    written, causal = p.args(written_causal, "logical_and")
    key, zero = p.args(written, "greater_equal")
    expect_constant(zero, 0)
    causal_key, query = p.args(causal, "less_equal")
    recent_key, oldest = p.args(recent, "greater")
    if not key == causal_key == recent_key:
        raise NoMatch("expected one comparison of the same key positions each with zero, the query and the window")
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


RULES: tuple[tuple[str, Rule], ...] = (  # by the operation at the region's end; in order, the first match wins
    ("reshape", rolling_attention),
    ("reshape", mixture),
    ("take", embedding),
    ("multiply", rms_norm),
    ("multiply", swiglu),
    ("matmul", linear),
)
