"""How keys and values lie in the rings of a CPU, and storing them there, rounded as the format of the cache says.

Scores of adjacent columns are computed in the lanes of one register, and so are mixed values of adjacent elements.
So keys are in blocks of 16 columns, (columns / 16, width, 16), and values are (columns, width). Where they are whole
numbers, two products are added up at a time (`int16_dot.py`): two adjacent elements of a key are side by side,
(columns / 16, width / 2, 16, 2), and so are two adjacent columns of values, (columns / 2, width, 2). Scales and minima
are applied to columns in the lanes of a register, for keys and values alike: (columns / 16, width, 16).
"""

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T

from build.kernels.cache_numbers import (
    Cache,
    int4_level,
    int4_pair,
    int4_scale,
    int8_level,
    int8_scale,
    unscaled_number,
)
from build.kernels.cpu.attention.int16_dot import PAIR
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import reduced
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF, RING_BLOCK
from runtime.artifact.tensor_file import bits_dtype

Side = Literal["keys", "values"]


@dataclass(frozen=True)
class Layout:
    """Columns in blocks of `columns`, whose elements are by turns, `elements` of each column at a time."""

    columns: int
    elements: int = 1

    def index(self, column: Any, element: Any, width: int) -> Any:
        """Index of an element of a column of `width` elements."""
        block = column // self.columns * self.columns * width
        together = element // self.elements * self.elements * self.columns
        return block + together + column % self.columns * self.elements + element % self.elements


FLOATS = {"keys": Layout(RING_BLOCK), "values": Layout(1)}
WHOLE_NUMBERS = {"keys": Layout(RING_BLOCK, PAIR), "values": Layout(PAIR)}
SCALES = Layout(RING_BLOCK)


def layout_of(shape: RollingAttention, side: Side) -> Layout:
    """How the numbers of a cache lie."""
    return (WHOLE_NUMBERS if shape.stored.scales else FLOATS)[side]


def flat(shape: RollingAttention, cache: Cache) -> Cache:
    """The same memory as flat buffers."""
    sizes = [
        (shape.slots * shape.n_kv_heads * shape.ring_len * part.width, str(bits_dtype(part.dtype)))
        for part in shape.stored.parts(shape.head_dim)
    ]
    used = [T.decl_buffer((size,), dtype, data=part.data) for (size, dtype), part in zip(sizes, cache, strict=False)]
    return Cache(*used, *cache[len(used) :])


def keeper(level: Level, shape: RollingAttention, side: Side):
    """Inline `keep(fresh, cache, column)`: store the head_dim numbers of a key or value in a column."""
    D, place = shape.head_dim, layout_of(shape, side).index
    lanes = fitting_lanes(level, GROUP if shape.stored.group else D)

    @T.inline
    def keep(fresh, cache, column):
        numbers = T.alloc_buffer((D,), shape.element_dtype)
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                numbers[c * lanes + v] = unscaled_number(shape, fresh[c * lanes + v])
        for d in T.serial(D):
            cache.numbers[place(column, d, D)] = numbers[d]

    @T.inline
    def keep_int8(fresh, cache, column):
        largest = T.alloc_buffer((lanes,), "float32")
        levels = T.alloc_buffer((D,), "int8")
        for v in T.vectorized(lanes):
            largest[v] = T.float32(0)
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                largest[v] = T.max(largest[v], T.abs(fresh[c * lanes + v]))
        largest[0] = reduced(largest, lanes, T.max)
        cache.scales[column] = int8_scale(largest[0])
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                levels[c * lanes + v] = int8_level(fresh[c * lanes + v], cache.scales[column])
        for d in T.serial(D):
            cache.numbers[place(column, d, D)] = levels[d]

    @T.inline
    def keep_int4(fresh, cache, column):
        for g in T.serial(D // GROUP):
            smallest = T.alloc_buffer((lanes,), "float32")
            largest = T.alloc_buffer((lanes,), "float32")
            pairs = T.alloc_buffer((HALF,), "uint8")
            for v in T.vectorized(lanes):
                smallest[v] = fresh[g * GROUP + v]
                largest[v] = fresh[g * GROUP + v]
            for c in T.unroll(GROUP // lanes):
                for v in T.vectorized(lanes):
                    smallest[v] = T.min(smallest[v], fresh[g * GROUP + c * lanes + v])
                    largest[v] = T.max(largest[v], fresh[g * GROUP + c * lanes + v])
            smallest[0] = reduced(smallest, lanes, T.min)
            largest[0] = reduced(largest, lanes, T.max)
            cache.minima[SCALES.index(column, g, D // GROUP)] = T.Cast("float16", smallest[0])
            smallest[0] = T.Cast("float32", T.Cast("float16", smallest[0]))
            cache.scales[SCALES.index(column, g, D // GROUP)] = int4_scale(largest[0], smallest[0])
            largest[0] = T.Cast("float32", int4_scale(largest[0], smallest[0]))
            for c in T.unroll(HALF // lanes):
                for v in T.vectorized(lanes):
                    pairs[c * lanes + v] = int4_pair(
                        int4_level(fresh[g * GROUP + c * lanes + v], largest[0], smallest[0]),
                        int4_level(fresh[g * GROUP + HALF + c * lanes + v], largest[0], smallest[0]),
                    )
            for d in T.serial(HALF):
                cache.numbers[place(column, g * HALF + d, D // 2)] = pairs[d]

    return {"int8": keep_int8, "uint8": keep_int4}.get(shape.cache_dtype, keep)
