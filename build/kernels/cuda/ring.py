"""Shared parts of the GPU attention kernels: rotating a head where it is read, and writing a ring."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache, int8_level, int8_scale
from build.kernels.cuda.binding import Binding
from build.kernels.shapes import RollingAttention

HIDDEN = -3e38  # a score that no key has; exp(HIDDEN - maximum) is 0
SMALLEST_TOTAL = 1e-30  # lower limit of a total of shares: for padding, which sees nothing
WRITERS = 256  # threads per block of the launch that writes columns


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
    scaled = shape.stored.scales is not None

    def number(cache, b, h, slot, d):
        found = T.Cast("float32", cache.numbers[b, h, slot, d])
        return found * cache.scales[b, h, slot, 0] if scaled else found

    return number


def ring_writer(shape: RollingAttention, on: Binding):
    """A launch that writes the new columns into the ring, which keeps only the last W of a longer chunk."""
    return column_writer(shape, shape.cache_len, lambda position, _i: position % shape.cache_len, on)


def column_writer(shape: RollingAttention, slots: int, slot: Callable[[Any, Any], Any], on: Binding):
    """A launch, inline `write(qkv, cos, sin, positions, keys, values)`: store the last new columns in `slots` slots.

    Keys are rotated; both are `Cache`s. The column of token i goes to slot(its position, i). Padding is not written.
    """
    return (_rounded_writer if shape.stored.scales else _plain_writer)(shape, min(shape.tokens, slots), slot, on)


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


def _rounded_writer(shape: RollingAttention, kept: int, slot: Callable[[Any, Any], Any], on: Binding):
    """One block per column, a key and a value, whose numbers pass through shared memory to find their scales."""
    B, N, H, KV, D = shape.batch, shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim
    k_start, v_start = H * D, (H + KV) * D
    rotated = rotated_element(shape)

    @T.inline
    def find_scale(numbers, start, scales, side):
        scales[side] = T.float32(0)
        for d in T.serial(D):
            scales[side] = T.max(scales[side], T.abs(numbers[start + d]))
        scales[side] = int8_scale(scales[side])

    @T.inline
    def store(numbers, scales, side, cache, b, h, to, d):
        cache.numbers[b, h, to, d] = int8_level(numbers[side * D + d], scales[side])
        if d == 0:
            cache.scales[b, h, to, 0] = scales[side]

    @T.inline
    def write(qkv, cos, sin, positions, keys, values):
        for block in on.blocks(B * kept * KV):
            numbers = T.alloc_buffer((2 * D,), "float32", scope=on.shared)  # the key's, then the value's
            scales = T.alloc_buffer((2,), "float32", scope=on.shared)
            b = block // (kept * KV)
            i = N - kept + block // KV % kept
            h = block % KV
            position = T.Cast("int32", positions[b, i])
            for t in on.threads(WRITERS):
                for c in T.serial(-(-D // WRITERS)):
                    d = c * WRITERS + t
                    if d < D:
                        numbers[d] = rotated(qkv, cos, sin, b, i, k_start + h * D, d)
                        numbers[D + d] = qkv[b, i, v_start + h * D + d]
            for t in on.threads(WRITERS):
                if t < 2:
                    find_scale(numbers, t * D, scales, t)
            for t in on.threads(WRITERS):
                for c in T.serial(-(-D // WRITERS)):
                    d = c * WRITERS + t
                    if position >= 0 and d < D:
                        store(numbers, scales, 0, keys, b, h, slot(position, i), d)
                        store(numbers, scales, 1, values, b, h, slot(position, i), d)

    return write
