"""The tensors of a ring as kernels take them, and the numbers of narrow caches as TIR expressions, on every target.

`export.static_model.cache` rounds and widens in the graphs, with the same operations in the same order, but for e4m3:
there, both are ONNX's own conversion.
"""

from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.float8 import to_e4m3
from build.kernels.parameters import UNUSED
from build.kernels.shapes import RollingAttention
from export.static_model.constants import CACHE_LEVELS, DYNAMIC_LEVELS, SMALLEST_PEAK, SMALLEST_STEP
from runtime.artifact.caches import FLOAT8
from runtime.artifact.tensor_file import bits_dtype


class Cache(NamedTuple):
    """The tensors that hold the keys of a ring, or its values; a format uses the first one, two or three."""

    numbers: Any
    scales: Any
    minima: Any


class Declared(NamedTuple):
    """Shape and dtype of a kernel's parameter."""

    shape: tuple[int, ...]
    dtype: str


PARAMETERS = (("keys", "values"), ("key_scales", "value_scales"), ("key_minima", "value_minima"))  # as in `Cache`


def declared(shape: RollingAttention) -> Cache:
    """What a kernel declares of a ring; parameters that the format has no use for are dropped afterwards."""
    lead = (shape.slots, shape.n_kv_heads, shape.ring_len)
    parts = [Declared((*lead, part.width), str(bits_dtype(part.dtype))) for part in shape.stored.parts(shape.head_dim)]
    return Cache(*parts, *[Declared(UNUSED, "float32")] * (len(PARAMETERS) - len(parts)))


def unused_parameters(shape: RollingAttention) -> list[str]:
    """Names of the parameters that the format has no use for."""
    used = len(list(shape.stored.parts(shape.head_dim)))
    return [name for pair in PARAMETERS[used:] for name in pair]


def unscaled_number(shape: RollingAttention, number: Expr) -> Expr:
    """A float32 as a ring without scales holds it."""
    return to_e4m3(number) if shape.cache_dtype == FLOAT8 else T.Cast(shape.element_dtype, number)


def int8_scale(largest: Expr) -> Expr:
    """The scale of numbers of at most this size."""
    return (largest + T.float32(SMALLEST_PEAK)) / T.float32(DYNAMIC_LEVELS)


def int8_level(number: Expr, scale: Expr) -> Expr:
    """The nearest multiple of the scale, half to even."""
    return T.Cast("int8", T.nearbyint(number / scale))


def int4_scale(largest: Expr, minimum: Expr) -> Expr:
    """The scale, as float16, of a group between a stored minimum and its largest number."""
    return T.Cast("float16", T.max((largest - minimum) / T.float32(CACHE_LEVELS), T.float32(SMALLEST_STEP)))


def int4_level(number: Expr, scale: Expr, minimum: Expr) -> Expr:
    """The nearest of the levels, half to even, from a scale and a minimum as they are stored; an int32."""
    level = T.nearbyint((number - minimum) / scale)
    return T.Cast("int32", T.min(T.max(level, T.float32(0)), T.float32(CACHE_LEVELS)))


def int4_pair(low: Expr, high: Expr) -> Expr:
    """Two levels in a byte."""
    return T.Cast("uint8", low | (high << 4))


def int4_number(pair: Expr, half: Expr | int, scale: Expr, minimum: Expr) -> Expr:
    """The number that the low (0) or high (1) level of a byte stands for, in float32."""
    return T.Cast("float32", (T.Cast("int32", pair) >> (4 * half)) & 15) * scale + minimum
