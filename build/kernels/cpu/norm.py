"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, row by row, in two passes over a row that fits in the L1 cache."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level, fitting_lanes


def rms_norm(level: Level, lead: tuple[int, ...], dim: int, eps: float) -> PrimFunc:
    """Kernel from x (*lead, dim) and weight (dim,) to y (*lead, dim), all float32."""
    rows = prod(lead)
    lanes = fitting_lanes(level, dim)
    factor = inverse_rms(level, dim, eps)
    loop = T.parallel if rows > 1 else T.serial

    @T.prim_func
    def kernel(
        x_in: T.Buffer((*lead, dim), "float32"),
        weight: T.Buffer((dim,), "float32"),
        y_out: T.Buffer((*lead, dim), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        x = T.decl_buffer((rows, dim), "float32", data=x_in.data)
        y = T.decl_buffer((rows, dim), "float32", data=y_out.data)
        for i in loop(rows):
            scale = T.alloc_buffer((1,), "float32")
            factor(x, i, scale)
            for c in T.serial(dim // lanes):
                for v in T.vectorized(lanes):
                    y[i, c * lanes + v] = x[i, c * lanes + v] * scale[0] * weight[c * lanes + v]

    return kernel


def inverse_rms(level: Level, dim: int, eps: float | None):
    """Inline `factor(x, row, out)`: set out[0] to 1 / sqrt(mean(x[row]^2) + eps), or to 1 without eps (no norm)."""
    lanes = fitting_lanes(level, dim)

    @T.inline
    def factor(x, row, out):
        if eps is None:
            out[0] = T.float32(1)
        else:
            partial = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                partial[v] = T.float32(0)
            for c in T.serial(dim // lanes):
                for v in T.vectorized(lanes):
                    partial[v] = partial[v] + x[row, c * lanes + v] * x[row, c * lanes + v]
            out[0] = T.float32(0)
            for v in T.unroll(lanes):
                out[0] = out[0] + partial[v]
            out[0] = T.float32(1) / T.sqrt(out[0] / T.float32(dim) + T.float32(eps))

    return factor
