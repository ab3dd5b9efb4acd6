"""Shared parts of the GPU attention kernels: rotating a head where it is read, and writing a ring."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

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


def ring_writer(shape: RollingAttention, on: Binding):
    """A launch that writes the new columns into the ring, which keeps only the last W of a longer chunk."""
    return column_writer(shape, shape.cache_len, lambda position, _i: position % shape.cache_len, on)


def column_writer(shape: RollingAttention, slots: int, slot: Callable[[Any, Any], Any], on: Binding):
    """A launch that writes the last new columns, with keys rotated, into `slots` slots; one thread per element.

    The column of token i goes to slot(its position, i). Padding is not written.
    """
    B, N, H, KV, D = shape.batch, shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim
    kept = min(N, slots)
    elements, k_start, v_start, dtype = B * kept * KV * D, H * D, (H + KV) * D, shape.cache_dtype
    rotated = rotated_element(shape)

    @T.inline
    def body(qkv, cos, sin, positions, keys, values):
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
                        keys[b, h, slot(position, i), d] = T.Cast(
                            dtype, rotated(qkv, cos, sin, b, i, k_start + h * D, d)
                        )
                        values[b, h, slot(position, i), d] = T.Cast(dtype, qkv[b, i, v_start + h * D + d])

    return body
