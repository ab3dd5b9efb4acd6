"""y = a + b: a layer's residual, where it is not fused into a product; one thread per element."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding

THREADS = 256


def residual(shape: tuple[int, ...], on: Binding = GPU) -> PrimFunc:
    """Kernel from a and b to y, all float32 and of the same shape."""
    size = prod(shape)

    @T.prim_func
    def kernel(a_in: T.Buffer(shape, "float32"), b_in: T.Buffer(shape, "float32"), y_out: T.Buffer(shape, "float32")):
        T.func_attr(ATTRIBUTES)
        a = T.decl_buffer((size,), "float32", data=a_in.data)
        b = T.decl_buffer((size,), "float32", data=b_in.data)
        y = T.decl_buffer((size,), "float32", data=y_out.data)
        for block in on.blocks(-(-size // THREADS)):
            for t in on.threads(THREADS):
                if block * THREADS + t < size:
                    y[block * THREADS + t] = a[block * THREADS + t] + b[block * THREADS + t]

    return kernel
