"""The two products of a step of attention, by the dtype of a cache's numbers."""

from typing import Any

from build.kernels.cpu.attention.float_products import float_key_product, float_value_product
from build.kernels.cpu.attention.int4_products import int4_key_product, int4_value_product
from build.kernels.cpu.attention.int8_products import int8_key_product, int8_value_product
from build.kernels.cpu.level import Level
from build.kernels.shapes import RollingAttention

_ROUNDED = {"int8": (int8_key_product, int8_value_product), "uint8": (int4_key_product, int4_value_product)}


def products(level: Level, shape: RollingAttention, R: int) -> tuple[Any, Any]:
    """Inlines `score` and `mix` for tiles of R rows; `float_products.py` says what they do."""
    key_product, value_product = _ROUNDED.get(shape.cache_dtype, (float_key_product, float_value_product))
    return key_product(level, shape, R), value_product(level, shape, R)
