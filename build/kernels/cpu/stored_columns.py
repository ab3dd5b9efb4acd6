"""Storing keys and values in the buffers of a cache on a CPU, rounded as its format says.

An element of a column is at `place(...)`: keys are in blocks of slots (`attention_products.py`), values in blocks of
one.
"""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache, int4_level, int4_pair, int4_scale, int8_level, int8_scale
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF


def place(column: Any, element: Any, width: int, block: int) -> Any:
    """Index of an element of a column of `width` elements, of which the first is element 0 of column 0."""
    return column // block * block * width + element * block + column % block


def flat(shape: RollingAttention, cache: Cache) -> Cache:
    """The same memory as flat buffers."""
    sizes = [
        (shape.slots * shape.n_kv_heads * shape.ring_len * part.width, part.dtype)
        for part in shape.stored.parts(shape.head_dim)
    ]
    used = [T.decl_buffer((size,), dtype, data=part.data) for (size, dtype), part in zip(sizes, cache, strict=False)]
    return Cache(*used, *cache[len(used) :])


def keeper(shape: RollingAttention):
    """Inline `keep(fresh, cache, column, block)`: store the head_dim numbers of a key or value in a column."""
    D, dtype = shape.head_dim, shape.cache_dtype

    @T.inline
    def keep(fresh, cache, column, block):
        for d in T.serial(D):
            cache.numbers[place(column, d, D, block)] = T.Cast(dtype, fresh[d])

    @T.inline
    def keep_int8(fresh, cache, column, block):
        cache.scales[column] = T.float32(0)
        for d in T.serial(D):
            cache.scales[column] = T.max(cache.scales[column], T.abs(fresh[d]))
        cache.scales[column] = int8_scale(cache.scales[column])
        for d in T.serial(D):
            cache.numbers[place(column, d, D, block)] = int8_level(fresh[d], cache.scales[column])

    @T.inline
    def keep_int4(fresh, cache, column, block):
        for g in T.serial(D // GROUP):
            group = T.alloc_buffer((2,), "float32")  # its minimum, and its largest number, then its scale
            group[0] = fresh[g * GROUP]
            group[1] = fresh[g * GROUP]
            for d in T.serial(GROUP):
                group[0] = T.min(group[0], fresh[g * GROUP + d])
                group[1] = T.max(group[1], fresh[g * GROUP + d])
            cache.minima[place(column, g, D // GROUP, block)] = T.Cast("float16", group[0])
            group[0] = T.Cast("float32", T.Cast("float16", group[0]))
            cache.scales[place(column, g, D // GROUP, block)] = int4_scale(group[1], group[0])
            group[1] = T.Cast("float32", int4_scale(group[1], group[0]))
            for d in T.serial(HALF):
                cache.numbers[place(column, g * HALF + d, D // 2, block)] = int4_pair(
                    int4_level(fresh[g * GROUP + d], group[1], group[0]),
                    int4_level(fresh[g * GROUP + HALF + d], group[1], group[0]),
                )

    return {"int8": keep_int8, "uint8": keep_int4}.get(dtype, keep)
