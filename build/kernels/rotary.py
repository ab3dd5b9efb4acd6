"""Rotary arithmetic that the kernels of both targets share: scaled angles, and the factor of a query's position."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.shapes import RollingAttention

FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {"cos": T.cos, "sin": T.sin}


def rotation_function(name: str, factor: float) -> Callable[[Expr], Expr]:
    """cos or sin times a number."""
    function = FUNCTIONS[name]
    return function if factor == 1.0 else lambda angle: function(angle) * T.float32(factor)


def query_scale(shape: RollingAttention, position: Expr) -> Expr:
    """`shape.scale` times the factor of an int32 position."""
    return with_position_factor(shape, position, T.float32(shape.scale))


def with_position_factor(shape: RollingAttention, position: Expr, value: Expr) -> Expr:
    """`value` times 1 + beta log(1 + floor(position / original context)); padding counts as position 0.

    `value` itself if the model does not scale queries.
    """
    scaling = shape.query_scaling
    if scaling is None:
        return value
    times = T.Cast("float32", T.max(position, 0) // scaling.original_context)
    return value * (T.float32(1) + T.float32(scaling.beta) * T.log(T.float32(1) + times))
