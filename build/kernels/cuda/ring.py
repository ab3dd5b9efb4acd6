"""Shared parts of the GPU attention kernels: rotating a head where it is read, and writing a ring."""

from tvm.script import tirx as T

from build.kernels.cache_numbers import int4_number, unscaled_number
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.rounded_ring import WRITERS, rounded_writer
from build.kernels.float8 import from_e4m3
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import FLOAT8, GROUP, HALF

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


def stored_number(shape: RollingAttention):
    """Function for number d of a column in a `Cache`, in float32."""

    def as_stored(cache, slot, h, column, d):
        return T.Cast("float32", cache.numbers[slot, h, column, d])

    def from_float8(cache, slot, h, column, d):
        return from_e4m3(cache.numbers[slot, h, column, d])

    def from_int8(cache, slot, h, column, d):
        return as_stored(cache, slot, h, column, d) * cache.scales[slot, h, column, 0]

    def from_int4(cache, slot, h, column, d):
        group = d // GROUP
        scale, minimum = (T.Cast("float32", part[slot, h, column, group]) for part in (cache.scales, cache.minima))
        byte = cache.numbers[slot, h, column, group * HALF + d % HALF]
        return int4_number(byte, d % GROUP // HALF, scale, minimum)

    return {FLOAT8: from_float8, "int8": from_int8, "uint8": from_int4}.get(shape.cache_dtype, as_stored)


def ring_writer(shape: RollingAttention, on: Binding):
    """A launch, inline `write(qkv, cos, sin, positions, slots, keys, values)`: store the new columns in their rings.

    Keys are rotated; both are `Cache`s. The column of position p goes to column p mod ring_len of its slot. Padding is
    not written.
    """
    if shape.stored.scales:
        return rounded_writer(shape, on, rotated_element(shape))
    return _plain_writer(shape, on)


def _plain_writer(shape: RollingAttention, on: Binding):
    """One thread per element."""
    N, H, KV, D = shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim
    elements, k_start, v_start = shape.rows * N * KV * D, H * D, (H + KV) * D
    rotated = rotated_element(shape)

    @T.inline
    def write(qkv, cos, sin, positions, slots, keys, values):
        for block in on.blocks(-(-elements // WRITERS)):
            for t in on.threads(WRITERS):
                e = block * WRITERS + t
                if e < elements:
                    b = e // (N * KV * D)
                    i = e // (KV * D) % N
                    h = e // D % KV
                    d = e % D
                    position = T.Cast("int32", positions[b, i])
                    slot = T.Cast("int32", slots[b])
                    column = position % shape.ring_len
                    if position >= 0:
                        keys.numbers[slot, h, column, d] = unscaled_number(
                            shape, rotated(qkv, cos, sin, b, i, k_start + h * D, d)
                        )
                        values.numbers[slot, h, column, d] = unscaled_number(shape, qkv[b, i, v_start + h * D + d])

    return write
