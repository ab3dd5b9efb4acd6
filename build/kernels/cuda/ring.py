"""What both attention kernels of a GPU share: the rotation of a head where it is read, and how a ring is written."""

from tvm.script import tirx as T

from build.kernels.shapes import RollingAttention

LOWEST = -3e38  # a score that no key has; exp(LOWEST - maximum) is 0
WRITERS = 256  # threads a block of the launch that writes the ring


def rotated_element(shape: RollingAttention):
    """Element d of a rotated head: (a cos - b sin, b cos + a sin) of its halves a and b."""
    half = shape.head_dim // 2

    def element(qkv, cos, sin, b, i, start, d):
        pair = T.Select(d < half, d + half, d - half)
        sign = T.Select(d < half, T.float32(-1), T.float32(1))
        return qkv[b, i, start + d] * cos[b, 0, i, d % half] + sign * qkv[b, i, start + pair] * sin[b, 0, i, d % half]

    return element
