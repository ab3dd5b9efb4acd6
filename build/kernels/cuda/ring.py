"""Shared parts of the GPU attention kernels: rotating a head where it is read, and writing a ring."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache, int4_number
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.rounded_ring import WRITERS, rounded_writer
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import GROUP, HALF

HIDDEN = -3e38  # a score that no key has; exp(HIDDEN - maximum) is 0
SMALLEST_TOTAL = 1e-30  # lower limit of a total of shares: for padding, which sees nothing


def rotated_element(shape: RollingAttention):
    """Function for element d of a rotated head: (a cos - b sin, b cos + a sin) of its halves a and b."""
    half = shape.head_dim // 2

    def element(qkv, cos, sin, b, i, start, d):
        pair = T.Select(d < half, d + half, d - half)
        sign = T.Select(d < half, T.float32(-1), T.float32(1))
        return qkv[b, i, start + d] * cos[b, 0, i, d % half] + sign * qkv[b, i, start + pair] * sin[b, 0, i, d % half]

    return element


def cache_of(shape: RollingAttention, slots: int) -> Cache:
    """A buffer (B, n_kv_heads, slots, width) for each tensor of keys, or of values, that only one call uses."""
    widths = [(part.width, part.dtype) for part in shape.stored.parts(shape.head_dim)]
    buffers = [T.alloc_buffer((shape.batch, shape.n_kv_heads, slots, width), dtype) for width, dtype in widths]
    return Cache(*buffers, *[None] * (len(Cache._fields) - len(buffers)))


def stored_number(shape: RollingAttention):
    """Function for number d of a column in a `Cache`, in float32."""

    def as_stored(cache, b, h, slot, d):
        return T.Cast("float32", cache.numbers[b, h, slot, d])

    def from_int8(cache, b, h, slot, d):
        return as_stored(cache, b, h, slot, d) * cache.scales[b, h, slot, 0]

    def from_int4(cache, b, h, slot, d):
        scale, minimum = (T.Cast("float32", part[b, h, slot, d // GROUP]) for part in (cache.scales, cache.minima))
        return int4_number(cache.numbers[b, h, slot, d // GROUP * HALF + d % HALF], d % GROUP // HALF, scale, minimum)

    return {"int8": from_int8, "uint8": from_int4}.get(shape.cache_dtype, as_stored)


def ring_writer(shape: RollingAttention, on: Binding):
    """A launch that writes the new columns into the ring, which keeps only the last W of a longer chunk."""
    return column_writer(shape, shape.cache_len, lambda position, _i: position % shape.cache_len, on)


def column_writer(shape: RollingAttention, slots: int, slot: Callable[[Any, Any], Any], on: Binding):
    """A launch, inline `write(qkv, cos, sin, positions, keys, values)`: store the last new columns in `slots` slots.

    Keys are rotated; both are `Cache`s. The column of token i goes to slot(its position, i). Padding is not written.
    """
    kept = min(shape.tokens, slots)
    if shape.stored.scales:
        return rounded_writer(shape, kept, slot, on, rotated_element(shape))
    return _plain_writer(shape, kept, slot, on)


def _plain_writer(shape: RollingAttention, kept: int, slot: Callable[[Any, Any], Any], on: Binding):
    """One thread per element."""
    B, N, H, KV, D = shape.batch, shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim
    elements, k_start, v_start, dtype = B * kept * KV * D, H * D, (H + KV) * D, shape.cache_dtype
    rotated = rotated_element(shape)

    @T.inline
    def write(qkv, cos, sin, positions, keys, values):
        for block in on.blocks(-(-elements // WRITERS)):
            for t in on.threads(WRITERS):
                e = block * WRITERS + t
                if e < elements:
                    b = e // (kept * KV * D)
                    i = N - kept + e // (KV * D) % kept
                    h = e // D % KV
                    d = e % D
                    position = T.Cast("int32", positions[b, i])
                    if position >= 0:
                        keys.numbers[b, h, slot(position, i), d] = T.Cast(
                            dtype, rotated(qkv, cos, sin, b, i, k_start + h * D, d)
                        )
                        values.numbers[b, h, slot(position, i), d] = T.Cast(dtype, qkv[b, i, v_start + h * D + d])

    return write
