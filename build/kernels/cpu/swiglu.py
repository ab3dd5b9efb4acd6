"""SwiGLU's product: y = silu(gate) * up, with gate and up side by side in one tensor."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import silu


def swiglu(level: Level, lead: tuple[int, ...], hidden_dim: int) -> PrimFunc:
    """Kernel from both (*lead, 2 * hidden_dim) to y (*lead, hidden_dim), float32."""
    rows = prod(lead)
    lanes = fitting_lanes(level, hidden_dim)
    loop = T.parallel if rows > 1 else T.serial

    @T.prim_func
    def kernel(both_in: T.Buffer((*lead, 2 * hidden_dim), "float32"), y_out: T.Buffer((*lead, hidden_dim), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        both = T.decl_buffer((rows, 2 * hidden_dim), "float32", data=both_in.data)
        y = T.decl_buffer((rows, hidden_dim), "float32", data=y_out.data)
        for i in loop(rows):
            for c in T.serial(hidden_dim // lanes):
                for v in T.vectorized(lanes):
                    y[i, c * lanes + v] = silu(both[i, c * lanes + v]) * both[i, hidden_dim + c * lanes + v]

    return kernel
