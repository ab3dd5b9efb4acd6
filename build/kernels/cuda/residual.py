"""y = a + b: the residual of a layer, where no product takes it in; a thread an element."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding

THREADS = 256


def residual(shape: tuple[int, ...], on: Binding = GPU) -> PrimFunc:
    """Kernel of a and b to y, all float32 of one shape."""
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
