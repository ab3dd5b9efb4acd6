"""The numbers of a narrow cache, on every target: how they are rounded and widened, as TIR expressions.

`export.static_model.cache` does the same in the graphs, with the same operations in the same order.
"""

from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from export.static_model.constants import DYNAMIC_LEVELS, SMALLEST_PEAK


class Cache(NamedTuple):
    """The tensors that hold the keys of a ring, or its values; `scales` is unused if numbers are stored as they are."""

    numbers: Any
    scales: Any


def int8_scale(largest: Expr) -> Expr:
    """The scale of numbers of at most this size."""
    return (largest + T.float32(SMALLEST_PEAK)) / T.float32(DYNAMIC_LEVELS)


def int8_level(number: Expr, scale: Expr) -> Expr:
    """The nearest multiple of the scale, half to even."""
    return T.Cast("int8", T.nearbyint(number / scale))
