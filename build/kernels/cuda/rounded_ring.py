"""Writing the columns of narrow rings on a GPU: numbers of a group are rounded together, with a scale of their own."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cache_numbers import int4_level, int4_pair, int4_scale, int8_level, int8_scale
from build.kernels.cuda.binding import Binding
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF

WRITERS = 256  # threads per block


def rounded_writer(shape: RollingAttention, on: Binding, rotated: Callable[..., Any]):
    """A launch, inline `write(qkv, cos, sin, positions, slots, keys, values)`: one block for a key and its value.

    Both pass through shared memory, where one thread for each group finds its scale.
    """
    N, H, KV, D = shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim
    k_start, v_start = H * D, (H + KV) * D
    group = shape.stored.group or D
    groups = D // group
    elements = next(shape.stored.parts(D)).width
    measure = _measure_int4(on) if shape.stored.group else _measure_int8(D, on)
    store = _store_int4(D) if shape.stored.group else _store_int8(D)

    @T.inline
    def write(qkv, cos, sin, positions, slots, keys, values):
        for block in on.blocks(shape.rows * N * KV):
            numbers = T.alloc_buffer((2 * D,), "float32", scope=on.shared)  # the key's, then the value's
            scales = T.alloc_buffer((2 * groups,), "float32", scope=on.shared)
            minima = T.alloc_buffer((2 * groups,), "float32", scope=on.shared)
            b = block // (N * KV)
            i = block // KV % N
            h = block % KV
            position = T.Cast("int32", positions[b, i])
            slot = T.Cast("int32", slots[b])
            column = position % shape.ring_len
            for t in on.threads(WRITERS):
                for c in T.serial(-(-D // WRITERS)):
                    d = c * WRITERS + t
                    if d < D:
                        numbers[d] = rotated(qkv, cos, sin, b, i, k_start + h * D, d)
                        numbers[D + d] = qkv[b, i, v_start + h * D + d]
            for t in on.threads(WRITERS):
                for c in T.serial(-(-2 * groups // WRITERS)):
                    g = c * WRITERS + t
                    if g < 2 * groups:
                        measure(numbers, g * group, scales, minima, g)
            for t in on.threads(WRITERS):
                for c in T.serial(-(-elements // WRITERS)):
                    e = c * WRITERS + t
                    if position >= 0 and e < elements:
                        store(numbers, scales, minima, 0, keys, slot, h, column, e)
                        store(numbers, scales, minima, 1, values, slot, h, column, e)

    return write


def _measure_int8(D: int, on: Binding):
    """Inline: set scales[g] for the D numbers from `start` on."""

    @T.inline
    def measure(numbers, start, scales, _minima, g):
        largest = T.alloc_buffer((1,), "float32", scope=on.private)
        largest[0] = T.float32(0)
        for d in T.serial(D):
            largest[0] = T.max(largest[0], T.abs(numbers[start + d]))
        scales[g] = int8_scale(largest[0])

    return measure


def _store_int8(D: int):
    """Inline: store element e of the key (side 0) or value (side 1); the first thread stores the scale."""

    @T.inline
    def store(numbers, scales, _minima, side, cache, slot, h, column, e):
        cache.numbers[slot, h, column, e] = int8_level(numbers[side * D + e], scales[side])
        if e == 0:
            cache.scales[slot, h, column, 0] = scales[side]

    return store


def _measure_int4(on: Binding):
    """Inline: set scales[g] and minima[g], as they are stored, for a group of numbers from `start` on."""

    @T.inline
    def measure(numbers, start, scales, minima, g):
        smallest = T.alloc_buffer((1,), "float32", scope=on.private)
        largest = T.alloc_buffer((1,), "float32", scope=on.private)
        smallest[0] = numbers[start]
        largest[0] = numbers[start]
        for d in T.serial(GROUP):
            smallest[0] = T.min(smallest[0], numbers[start + d])
            largest[0] = T.max(largest[0], numbers[start + d])
        smallest[0] = T.Cast("float32", T.Cast("float16", smallest[0]))
        minima[g] = smallest[0]
        scales[g] = T.Cast("float32", int4_scale(largest[0], smallest[0]))

    return measure


def _store_int4(D: int):
    """Inline: store byte e of the key (side 0) or value (side 1); a group's first thread stores scale and minimum."""

    @T.inline
    def store(numbers, scales, minima, side, cache, slot, h, column, e):
        g = side * (D // GROUP) + e // HALF
        low = g * GROUP + e % HALF
        cache.numbers[slot, h, column, e] = int4_pair(
            int4_level(numbers[low], scales[g], minima[g]), int4_level(numbers[low + HALF], scales[g], minima[g])
        )
        if e % HALF == 0:
            cache.scales[slot, h, column, e // HALF] = T.Cast("float16", scales[g])
            cache.minima[slot, h, column, e // HALF] = T.Cast("float16", minima[g])

    return store
