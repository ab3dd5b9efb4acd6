"""Cosines or sines of the rotary angles, position times frequency: a few numbers per token, once for all layers."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level
from build.kernels.rotary import rotation_function


def rotation(_level: Level, lead: tuple[int, int], half: int, function: str, factor: float = 1.0) -> PrimFunc:
    """Kernel from positions (B, T) int64 and frequencies (head_dim / 2,) to y (B, 1, T, head_dim / 2) float32.

    y is the cosine or sine of position times frequency, times `factor`.
    """
    batch, tokens = lead
    apply = rotation_function(function, factor)
    loop = T.parallel if prod(lead) > 1 else T.serial

    @T.prim_func
    def kernel(
        positions: T.Buffer((batch, tokens), "int64"),
        frequencies: T.Buffer((half,), "float32"),
        y: T.Buffer((batch, 1, tokens, half), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for token in loop(batch * tokens):
            for j in T.serial(half):
                y[token // tokens, 0, token % tokens, j] = apply(
                    T.Cast("float32", positions[token // tokens, token % tokens]) * frequencies[j]
                )

    return kernel
