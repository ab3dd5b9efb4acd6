"""SwiGLU's product: y = silu(gate) * up, with gate and up side by side in one tensor; one thread per output."""

from math import prod
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding

THREADS = 256


def swiglu(lead: tuple[int, ...], hidden_dim: int, on: Binding = GPU) -> PrimFunc:
    """Kernel from both (*lead, 2 * hidden_dim) to y (*lead, hidden_dim), float32."""
    rows = prod(lead)
    gate = gated_rows(rows, hidden_dim, on)

    @T.prim_func
    def kernel(both_in: T.Buffer((*lead, 2 * hidden_dim), "float32"), y_out: T.Buffer((*lead, hidden_dim), "float32")):
        T.func_attr(ATTRIBUTES)
        both = T.decl_buffer((rows, 2 * hidden_dim), "float32", data=both_in.data)
        y = T.decl_buffer((rows, hidden_dim), "float32", data=y_out.data)
        gate(both, y)

    return kernel


def gated_rows(rows: int, hidden_dim: int, on: Binding):
    """A launch, inline `gate(both, y)`: y (rows, hidden_dim) = silu(gate) * up of both (rows, 2 * hidden_dim)."""
    parts = -(-hidden_dim // THREADS)

    @T.inline
    def gate(both, y):
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                j = block % parts * THREADS + t
                if j < hidden_dim:
                    y[i, j] = gated(both[i, j], both[i, hidden_dim + j])

    return gate


def gated(gate: Any, up: Any) -> Any:
    """silu(gate) * up."""
    return gate / (T.float32(1) + T.exp(T.float32(0) - gate)) * up
