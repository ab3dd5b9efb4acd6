"""Products with a weight, and the operations that the target's kernel computes in the same launch."""

from dataclasses import replace
from itertools import permutations

from build.kernels.shapes import Linear
from build.rules.context import Context, GraphWeight, Region
from build.rules.dataflow import Expr, NoMatch, dtype, is_call, shape
from build.rules.per_token import rms_norm
from build.rules.shared import gated, levels_of
from runtime.artifact.layouts import PANEL
from runtime.artifact.schemes import ROUNDING_LEVELS


def linear(c: Context, root: Expr) -> Region:
    """Match matmul(x, transpose(weight)), with an RMSNorm in front if nothing else reads its result."""
    p = c.dataflow
    rounded, transposed = p.args(root, "matmul")
    w = c.weight(p.permuted(transposed, (1, 0)))
    x = _rounded_source(c, rounded, w) if w.tensor.stored.rounds else rounded
    shape_of = Linear(tuple(shape(root)[:-1]), w.n, w.k, w.tensor.stored)
    inputs: tuple[Expr, ...] = (x,)
    nbytes = w.nbytes
    if p.uses[x] == 1:
        try:
            norm = rms_norm(c, x)
        except NoMatch:
            pass
        else:
            source, gain = norm.inputs
            shape_of = replace(shape_of, norm_eps=norm.arguments[2])
            nbytes += norm.bytes
            whole = _last_token_of(c, source)
            tokens = 0 if whole is None else shape(whole)[1]
            if tokens > 1 and c.column is not None:
                inputs, shape_of = (whole, c.column, gain), replace(shape_of, one_of=tokens)
            else:
                inputs = (whole if tokens == 1 else source, gain)
    flops = 2 * shape_of.rows * w.n * w.k
    return Region("linear", (shape_of,), (*inputs, *w.parts), root, w.tensor.name, nbytes, flops)


def _last_token_of(c: Context, value: Expr) -> Expr | None:
    """The (B, T, dim) tensor whose last token `value` is, or None if there is none.

    In a graph the last token is the one whose outputs are wanted; a call that is padded has it before its padding.
    """
    try:
        (source, *_) = c.dataflow.args(value, "strided_slice")
        tokens = shape(source)[1]
        return c.dataflow.sliced(value, 1, tokens - 1, tokens) if len(shape(source)) == len(shape(value)) else None
    except NoMatch:
        return None


def _rounded_source(c: Context, value: Expr, w: GraphWeight) -> Expr:
    """Match x as the weight's activations are rounded; returns x.

    It is cast to bfloat16 and back, or round(x / s) * s with s = (max |x| + smallest) / levels, one scale for each
    group of a token.
    """
    p = c.dataflow
    if w.tensor.stored.rounding not in ROUNDING_LEVELS:
        (narrow,) = p.args(value, "astype")
        if (dtype(narrow), dtype(value)) != ("bfloat16", "float32"):
            raise NoMatch(f"expected a cast to bfloat16 and back, found {dtype(narrow)} and {dtype(value)}")
        return p.args(narrow, "astype")[0]
    together = w.tensor.stored.rounded_together(w.k)
    levels = ROUNDING_LEVELS[w.tensor.stored.rounding]
    x = levels_of(c, *p.args(p.args(value, "reshape")[0], "multiply"), count=levels)
    source = p.args(x, "reshape")[0]
    if shape(x) != (*shape(source)[:-1], w.k // together, together) or shape(value) != shape(source):
        raise NoMatch(f"expected groups of {together} numbers, found {shape(x)}")
    return source


def linear_with_residual(c: Context, root: Expr) -> Region:
    """Match residual + matmul(x, transpose(weight))."""
    for residual, product in permutations(c.dataflow.args(root, "add")):
        if is_call(c.dataflow.calls.get(product), "matmul") and shape(residual) == shape(root):
            inner = linear(c, product)
            (kernel,) = inner.arguments
            return replace(
                inner, arguments=(replace(kernel, residual=True),), inputs=(*inner.inputs, residual), output=root
            )
    raise NoMatch("expected a product and a residual")


def linear_with_swiglu(c: Context, root: Expr) -> Region:
    """Match silu(both[..., :F]) * both[..., F:] of a product `both`.

    F must be a width at which both halves of the stored weight can be read: whole panels.
    """
    inner = linear(c, gated(c, root))
    (kernel,) = inner.arguments
    fused = replace(kernel, swiglu=True)
    if fused.n_out % PANEL:
        raise NoMatch(f"expected a width that is a multiple of the panel's {PANEL}")
    return replace(inner, arguments=(fused,), output=root)
