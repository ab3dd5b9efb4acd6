"""Rules that find the regions of the imported graph which kernels compute. Each answers a `Region`, or raises `NoMatch` for "not mine".

A rule checks everything that the kernel takes for granted: slice bounds, axes, constants, and, for attention, that the mask is the banded causal
mask of exactly this cache's length and that the graph's new cache is the old one rolled by T. A graph that lost its window matches no rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from math import prod
from typing import Any

import numpy as np

from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from build.layout import PANEL
from build.producers import END, Expr, NoMatch, Producers, constant, dtype, expect_constant, integer, is_call, shape
from export.model_constants import DYNAMIC_LEVELS, MASKED_SCORE, SMALLEST_PEAK
from export.quantize import ModelTensor
from runtime.manifest import ModelConfig

ITEMSIZE = {"float32": 4, "float16": 2, "int8": 1}  # of a cache


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
class Weight:
    """A tensor of the model: what the graph takes as a float32 parameter, and the packed tensors that hold it."""

    tensor: ModelTensor
    parts: tuple[Expr, ...]  # variables of the packed tensors, in the kernels' order
    nbytes: int  # of all of them

    @property
    def n(self) -> int:
        """Outputs."""
        return self.tensor.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.tensor.shape[1]


@dataclass(frozen=True)
class Context:
    """What rules need to know about the function that they read."""

    producers: Producers
    model: ModelConfig
    inputs: dict[Expr, str]  # parameters that are no weights, to their names
    weights: dict[Expr, Weight]  # parameters that are
    present: dict[Expr, Expr]  # cache parameter to the graph's output that replaces it
    fusions: frozenset[str]  # what the target's `linear` can compute in the same launch

    def input_name(self, value: Expr) -> str:
        """Name of an input, or NoMatch."""
        if value not in self.inputs:
            raise NoMatch("expected an input, found a computed value")
        return self.inputs[value]

    def weight(self, value: Expr) -> Weight:
        """The weight that a parameter stands for, or NoMatch."""
        if value not in self.weights:
            raise NoMatch("expected a weight, found a computed value")
        return self.weights[value]


Rule = Callable[[Context, Expr], Region]


def linear(c: Context, root: Expr) -> Region:
    """matmul(x, transpose(weight)), with an RMSNorm in front where the target's kernel can compute it in the same launch."""
    p = c.producers
    rounded, transposed = p.args(root, "matmul")
    w = c.weight(p.permuted(transposed, (1, 0)))
    x = _rounded_source(c, rounded, w) if w.tensor.stored.dynamic else rounded
    shape_of = Linear(tuple(shape(root)[:-1]), w.n, w.k, w.tensor.stored)
    inputs: tuple[Expr, ...] = (x,)
    nbytes = w.nbytes
    if "norm" in c.fusions and p.uses[x] == 1:
        try:
            norm = rms_norm(c, x)
        except NoMatch:
            pass
        else:
            source, gain = norm.inputs
            shape_of = replace(shape_of, norm_eps=norm.arguments[2])
            nbytes += norm.bytes
            last = _last_token(c, source)
            if last is not None:
                source, shape_of = last, replace(shape_of, last_of=shape(last)[1])
            inputs = (source, gain)
    flops = 2 * shape_of.rows * w.n * w.k
    return Region("linear", (shape_of,), (*inputs, *w.parts), root, w.tensor.name, nbytes, flops)


def _last_token(c: Context, value: Expr) -> Expr | None:
    """The (B, T, dim) tensor whose last token `value` is, if it is."""
    try:
        (source, *_) = c.producers.args(value, "strided_slice")
        tokens = shape(source)[1]
        return c.producers.sliced(value, 1, tokens - 1, tokens) if len(shape(source)) == len(shape(value)) else None
    except NoMatch:
        return None


def _rounded_source(c: Context, value: Expr, w: Weight) -> Expr:
    """x, from round(x / s) * s with s = (max |x| + smallest) / levels, a scale for each group of a token."""
    p = c.producers
    together = w.tensor.stored.rounded_together(w.k)
    x = _levels_of(c, *p.args(p.args(value, "reshape")[0], "multiply"))
    source = p.args(x, "reshape")[0]
    if shape(x) != (*shape(source)[:-1], w.k // together, together) or shape(value) != shape(source):
        raise NoMatch(f"expected groups of {together} numbers, found {shape(x)}")
    return source


def _levels_of(c: Context, whole: Expr, scale: Expr) -> Expr:
    """x, from round(x / s) and s = (max |x| + smallest) / levels over its last axis."""
    p = c.producers
    x, divisor = p.args(p.args(whole, "round")[0], "divide")
    peak, levels = p.args(scale, "divide")
    expect_constant(levels, DYNAMIC_LEVELS)
    largest, smallest = p.args(peak, "add")
    expect_constant(smallest, SMALLEST_PEAK)
    (magnitudes,) = p.args(largest, "max")
    _expect_last_axis(magnitudes, *p.calls[largest].attrs.axis)
    if divisor != scale or p.args(magnitudes, "abs")[0] != x or not p.calls[largest].attrs.keepdims:
        raise NoMatch("expected a group's own numbers and scale")
    return x


def linear_with_residual(c: Context, root: Expr) -> Region:
    """residual + matmul(x, transpose(weight))."""
    _expect_fusion(c, "residual")
    for residual, product in permutations(c.producers.args(root, "add")):
        if is_call(c.producers.calls.get(product), "matmul") and shape(residual) == shape(root):
            inner = linear(c, product)
            (kernel,) = inner.arguments
            return replace(inner, arguments=(replace(kernel, residual=True),), inputs=(*inner.inputs, residual), output=root)
    raise NoMatch("expected a product and a residual")


def linear_with_swiglu(c: Context, root: Expr) -> Region:
    """silu(both[..., :F]) * both[..., F:] of a product `both`, for widths that both halves of the stored weight can be read by."""
    _expect_fusion(c, "swiglu")
    inner = linear(c, _gated(c, root))
    (kernel,) = inner.arguments
    fused = replace(kernel, swiglu=True)
    if fused.n_out % PANEL:
        raise NoMatch(f"expected a width in whole panels of {PANEL}")
    return replace(inner, arguments=(fused,), output=root)


def _expect_fusion(c: Context, name: str) -> None:
    if name not in c.fusions:
        raise NoMatch(f"the target's products compute no {name}")


def residual(c: Context, root: Expr) -> Region:
    """a + b of one shape, where no product takes it in."""
    a, b = c.producers.args(root, "add")
    if not shape(a) == shape(b) == shape(root) or len(shape(root)) != 3:  # (B, T, dim)
        raise NoMatch("expected two states")
    return Region("residual", (shape(root),), (a, b), root, "", 0, prod(shape(root)))


def rotation(c: Context, root: Expr) -> Region:
    """cos or sin of positions (B, T) times the rotary frequencies, to (B, 1, T, head_dim / 2)."""
    p = c.producers
    function = next((name for name in ("cos", "sin") if is_call(p.calls.get(root), name)), None)
    if function is None:
        raise NoMatch("expected cos or sin")
    column, frequencies = p.args(p.args(root, function)[0], "multiply")
    positions = _positions(c, column)
    half = constant(frequencies).size
    batch, tokens = shape(positions)
    if shape(root) != (batch, 1, tokens, half):
        raise NoMatch(f"expected angles of every position, found {shape(root)}")
    return Region("rotation", ((batch, tokens), half, function), (positions, frequencies), root, function, 4 * half, batch * tokens * half)


def _positions(c: Context, column: Expr) -> Expr:
    """(B, 1, T, 1) float32 positions to the int64 input that they come from."""
    value = column
    while value not in c.inputs:
        source = c.producers.through(c.producers.through(value, "expand_dims"), "astype")
        if source == value:
            raise NoMatch("expected positions")
        value = source
    return value


def embedding(c: Context, root: Expr) -> Region:
    """take(weight, ids), where the importer has added the wrap-around of negative ids, which token ids never are."""
    table, wrapped = c.producers.args(root, "take")
    _, _, ids = c.producers.args(wrapped, "where")
    w = c.weight(table)
    kernel = Embedding(tuple(shape(ids)), w.n, w.k, w.tensor.stored)
    return Region("embedding", (kernel,), (ids, *w.parts), root, w.tensor.name, kernel.rows * w.nbytes // w.n, 0)


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
    w = c.weight(gain)
    return Region("rms_norm", (tuple(lead), dim, float(constant(eps))), (x, *w.parts), root, w.tensor.name, w.nbytes, 4 * prod(lead) * dim)


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
    value_caches, new_values = _stored_columns(c, values)
    key_caches, new_keys = _stored_columns(c, p.permuted(keys, (0, 1, 2, 4, 3)))
    key_cache = key_caches[0]
    cache_len = shape(key_cache)[2]
    positions = _banded_mask(c, mask, cache_len)
    query_heads, cos, sin = _rotated(c, p.args(queries, "reshape")[0])
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
    kernel = RollingAttention(batch, tokens, m.n_heads, m.n_kv_heads, m.head_dim, cache_len, dtype(key_cache), float(scores))
    caches = tuple(cache for pair in zip(key_caches, value_caches, strict=True) for cache in pair)
    cache_bytes = sum(prod(shape(cache)) * ITEMSIZE[dtype(cache)] for cache in caches)
    flops = 4 * batch * tokens * m.n_heads * m.head_dim * cache_len
    inputs = (parts[0], cos, sin, positions, *caches)
    updates = tuple(range(4, len(inputs)))
    return Region("rolling_attention", (kernel,), inputs, root, c.input_name(key_cache), cache_bytes, flops, updates=updates)


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


def _stored_columns(c: Context, value: Expr) -> tuple[tuple[Expr, ...], Expr]:
    """Shared columns to the caches that they come from (numbers and, of int8, scales) and the new columns as they were before they were stored."""
    p = c.producers
    if not is_call(p.calls.get(value), "multiply"):
        past, new = _appended(c, _columns(c, value))
        return (past,), p.through(new, "astype")
    numbers, scales = (_columns(c, part) for part in p.args(value, "multiply"))
    (past, new), (past_scale, scale) = _appended(c, numbers), _appended(c, scales)
    if dtype(past) != "int8":
        raise NoMatch(f"expected scales with a cache of int8 alone, found {dtype(past)}")
    return (past, past_scale), _levels_of(c, _narrowed(c, new), scale)


def _narrowed(c: Context, value: Expr) -> Expr:
    """The source of a conversion to int8, which the importer spells out: numbers that are not finite to 0, then the low 8 bits with their sign."""
    p = c.producers
    negative, shifted, low = p.args(p.args(value, "astype")[0], "where")
    compared, half = p.args(negative, "greater_equal")
    subtracted, whole = p.args(shifted, "subtract")
    bits, mask = p.args(low, "bitwise_and")
    broken, zero, source = p.args(p.args(bits, "astype")[0], "where")
    for number, expected in ((half, 128), (mask, 255), (p.args(whole, "add")[0], 255), (p.args(whole, "add")[1], 1), (zero, 0)):
        expect_constant(number, expected)
    checked = p.args(p.args(broken, "logical_not")[0], "isfinite")[0]
    if not (compared == subtracted == low and checked == source):
        raise NoMatch("expected a conversion to int8")
    return source


def _appended(c: Context, columns: Expr) -> tuple[Expr, Expr]:
    """Concat(past, new) along the slots to (past, new), after checking that the graph's new cache is exactly its last W columns."""
    past, new = c.producers.concatenated(columns, 2)
    name = c.input_name(past)
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
    ("multiply", linear_with_swiglu),
    ("multiply", rms_norm),
    ("multiply", swiglu),
    ("add", linear_with_residual),
    ("add", residual),
    ("matmul", linear),
    ("cos", rotation),
    ("sin", rotation),
)
