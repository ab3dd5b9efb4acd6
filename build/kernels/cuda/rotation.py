"""Cosines or sines of the rotary angles, position times frequency: one thread per angle, once for all layers."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.rotary import rotation_function

THREADS = 256


def rotation(lead: tuple[int, int], half: int, function: str, factor: float = 1.0, on: Binding = GPU) -> PrimFunc:
    """Kernel from positions (B, T) int64 and frequencies (head_dim / 2,) to y (B, 1, T, head_dim / 2) float32.

    y is the cosine or sine of position times frequency, times `factor`.
    """
    batch, tokens = lead
    size = prod(lead) * half
    apply = rotation_function(function, factor)

    @T.prim_func
    def kernel(
        positions: T.Buffer((batch, tokens), "int64"),
        frequencies: T.Buffer((half,), "float32"),
        y: T.Buffer((batch, 1, tokens, half), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        for block in on.blocks(-(-size // THREADS)):
            for t in on.threads(THREADS):
                e = block * THREADS + t
                if e < size:
                    b = e // (tokens * half)
                    i = e // half % tokens
                    y[b, 0, i, e % half] = apply(T.Cast("float32", positions[b, i]) * frequencies[e % half])

    return kernel
