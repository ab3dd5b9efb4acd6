"""Patterns that several rules look for."""

from typing import Any

from build.rules.context import Context
from build.rules.dataflow import END, Expr, NoMatch, expect_constant, integer, shape
from export.static_model.constants import SMALLEST_PEAK


def expect_last_axis(value: Expr, *axes: Any) -> None:  # noqa: ANN401 (TVM's integers)
    """Raise `NoMatch` unless `axes` are the last axis of `value` alone."""
    found = [integer(axis) % len(shape(value)) for axis in axes]
    if found != [len(shape(value)) - 1]:
        raise NoMatch(f"expected the last of {len(shape(value))} axes, found {found}")


def levels_of(c: Context, whole: Expr, scale: Expr, *, count: float) -> Expr:
    """Match round(x / s) with s = (max |x| + smallest) / count over the last axis of x; returns x."""
    p = c.dataflow
    x, divisor = p.args(p.args(whole, "round")[0], "divide")
    peak, levels = p.args(scale, "divide")
    expect_constant(levels, count)
    largest, smallest = p.args(peak, "add")
    expect_constant(smallest, SMALLEST_PEAK)
    (magnitudes,) = p.args(largest, "max")
    expect_last_axis(magnitudes, *p.calls[largest].attrs.axis)
    if divisor != scale or p.args(magnitudes, "abs")[0] != x or not p.calls[largest].attrs.keepdims:
        raise NoMatch("expected each group to be rounded with its own scale")
    return x


def gated(c: Context, root: Expr) -> Expr:
    """Match silu(both[..., :F]) * both[..., F:] of three axes; returns `both`."""
    p = c.dataflow
    activated, up = p.args(root, "multiply")
    gate, sigmoid = p.args(activated, "multiply")
    if p.args(sigmoid, "sigmoid")[0] != gate:
        raise NoMatch("expected gate * sigmoid(gate)")
    hidden_dim = shape(root)[-1]
    both = p.sliced(gate, 2, 0, hidden_dim)
    if p.sliced(up, 2, hidden_dim, END) != both:
        raise NoMatch("expected gate and up from one tensor")
    return both


def positions_of(c: Context, column: Expr) -> Expr:
    """The int64 input that (B, 1, T, 1) float32 positions come from."""
    value = column
    while value not in c.inputs:
        source = c.dataflow.through(c.dataflow.through(value, "expand_dims"), "astype")
        if source == value:
            raise NoMatch("expected positions")
        value = source
    return value
