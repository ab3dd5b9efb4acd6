"""y = a + b: a layer's residual, where it is not fused into a product."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level, fitting_lanes


def residual(level: Level, shape: tuple[int, ...]) -> PrimFunc:
    """Kernel from a and b to y, all float32 and of the same shape."""
    rows, dim = prod(shape[:-1]), shape[-1]
    lanes = fitting_lanes(level, dim)
    loop = T.parallel if rows > 1 else T.serial

    @T.prim_func
    def kernel(a_in: T.Buffer(shape, "float32"), b_in: T.Buffer(shape, "float32"), y_out: T.Buffer(shape, "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        a = T.decl_buffer((rows, dim), "float32", data=a_in.data)
        b = T.decl_buffer((rows, dim), "float32", data=b_in.data)
        y = T.decl_buffer((rows, dim), "float32", data=y_out.data)
        for i in loop(rows):
            for c in T.serial(dim // lanes):
                for v in T.vectorized(lanes):
                    y[i, c * lanes + v] = a[i, c * lanes + v] + b[i, c * lanes + v]

    return kernel
