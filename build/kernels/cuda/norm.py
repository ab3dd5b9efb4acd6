"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight; a block a row."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding

THREADS = 256


def rms_norm(lead: tuple[int, ...], dim: int, eps: float, on: Binding = GPU) -> PrimFunc:
    """Kernel of x (*lead, dim) and weight (dim,) to y (*lead, dim), all float32."""
    rows, parts = prod(lead), -(-dim // THREADS)

    @T.prim_func
    def kernel(x_in: T.Buffer((*lead, dim), "float32"), weight: T.Buffer((dim,), "float32"), y_out: T.Buffer((*lead, dim), "float32")):
        T.func_attr(ATTRIBUTES)
        x = T.decl_buffer((rows, dim), "float32", data=x_in.data)
        y = T.decl_buffer((rows, dim), "float32", data=y_out.data)
        for i in on.blocks(rows):
            squares = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
            sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
            for t in on.threads(THREADS):
                square = T.alloc_buffer((1,), "float32", scope=on.private)
                square[0] = T.float32(0)
                for c in T.serial(parts):
                    if c * THREADS + t < dim:
                        square[0] = square[0] + x[i, c * THREADS + t] * x[i, c * THREADS + t]
                squares[t] = square[0]
            for t in on.threads(THREADS):
                if t < WARP:
                    part = T.alloc_buffer((1,), "float32", scope=on.private)
                    part[0] = T.float32(0)
                    for c in T.serial(THREADS // WARP):
                        part[0] = part[0] + squares[c * WARP + t]
                    sums[t] = part[0]
            for t in on.threads(THREADS):
                total = T.alloc_buffer((1,), "float32", scope=on.private)
                total[0] = T.float32(0)
                for c in T.serial(WARP):
                    total[0] = total[0] + sums[c]
                total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(dim) + T.float32(eps))
                for c in T.serial(parts):
                    if c * THREADS + t < dim:
                        y[i, c * THREADS + t] = x[i, c * THREADS + t] * total[0] * weight[c * THREADS + t]

    return kernel
