"""Operations on each token or position by itself, without a matrix product."""

from math import prod

from build.kernels.shapes import Embedding
from build.rules.context import Context, Region
from build.rules.dataflow import Expr, NoMatch, constant, expect_constant, is_call, number, shape
from build.rules.shared import expect_last_axis, gated, positions_of


def embedding(c: Context, root: Expr) -> Region:
    """Match take(weight, ids); the importer has added a wrap-around of negative ids, which token ids never are."""
    table, wrapped = c.dataflow.args(root, "take")
    _, _, ids = c.dataflow.args(wrapped, "where")
    w = c.weight(table)
    kernel = Embedding(tuple(shape(ids)), w.n, w.k, w.tensor.stored)
    return Region("embedding", (kernel,), (ids, *w.parts), root, w.tensor.name, kernel.rows * w.nbytes // w.n, 0)


def rms_norm(c: Context, root: Expr) -> Region:
    """Match weight * (x * (1 / sqrt(mean(x * x) + eps)))."""
    p = c.dataflow
    gain, normed = p.args(root, "multiply")
    x, inverse = p.args(normed, "multiply")
    one, square_root = p.args(inverse, "divide")
    expect_constant(one, 1.0)
    mean, eps = p.args(p.args(square_root, "sqrt")[0], "add")
    (squares,) = p.args(mean, "mean")
    expect_last_axis(squares, *p.calls[mean].attrs.axis)
    if tuple(p.args(squares, "multiply")) != (x, x):
        raise NoMatch("expected the mean of x * x")
    *lead, dim = shape(x)
    w = c.weight(gain)
    return Region(
        "rms_norm",
        (tuple(lead), dim, number(eps)),
        (x, *w.parts),
        root,
        w.tensor.name,
        w.nbytes,
        4 * prod(lead) * dim,
    )


def residual(c: Context, root: Expr) -> Region:
    """Match a + b of the same shape, if no product has absorbed it."""
    a, b = c.dataflow.args(root, "add")
    if not shape(a) == shape(b) == shape(root) or len(shape(root)) != 3:  # (B, T, dim)
        raise NoMatch("expected two states")
    return Region("residual", (shape(root),), (a, b), root, "", 0, prod(shape(root)))


def swiglu(c: Context, root: Expr) -> Region:
    """Match silu(both[..., :F]) * both[..., F:]."""
    *lead, hidden_dim = shape(root)
    return Region(
        "swiglu", (tuple(lead), hidden_dim), (gated(c, root),), root, "w13 output", 0, 4 * prod(lead) * hidden_dim
    )


def rotation(c: Context, root: Expr) -> Region:
    """Match cos or sin of positions (B, T) times the rotary frequencies, with the shape (B, 1, T, head_dim / 2)."""
    return _rotation(c, root, root, 1.0)


def scaled_rotation(c: Context, root: Expr) -> Region:
    """Match a rotation times a number, as YaRN has it."""
    p = c.dataflow
    values, factor = p.args(root, "multiply")
    return _rotation(c, root, values, number(factor))


def _rotation(c: Context, root: Expr, values: Expr, factor: float) -> Region:
    p = c.dataflow
    function = next((name for name in ("cos", "sin") if is_call(p.calls.get(values), name)), None)
    if function is None:
        raise NoMatch("expected cos or sin")
    column, frequencies = p.args(p.args(values, function)[0], "multiply")
    positions = positions_of(c, column)
    half = constant(frequencies).size
    batch, tokens = shape(positions)
    if shape(root) != (batch, 1, tokens, half):
        raise NoMatch(f"expected angles for every position, found {shape(root)}")
    return Region(
        "rotation",
        ((batch, tokens), half, function, factor),
        (positions, frequencies),
        root,
        function,
        4 * half,
        batch * tokens * half,
    )
