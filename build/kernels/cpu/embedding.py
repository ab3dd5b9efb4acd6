"""One row of the embedding matrix per token, gathered from the same packed panels that the head multiplies with when the two are tied."""

from math import prod

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.linear import PANEL


def embedding(lead: tuple[int, ...], n: int, k: int, weight_dtype: str, scaled: bool) -> PrimFunc:
    """Kernel of ids (*lead) int64, w (panels, K, PANEL) and, when `scaled`, s (N,), to y (*lead, K) float32; N is the vocabulary."""
    rows, panels = prod(lead), -(-n // PANEL)

    @T.inline
    def gather(ids_in, w, s, y_out):
        ids = T.decl_buffer((rows,), "int64", data=ids_in.data)
        y = T.decl_buffer((rows, k), "float32", data=y_out.data)
        for i in T.serial(rows):
            for j in T.serial(k):
                if s is None:
                    y[i, j] = T.Cast("float32", w[ids[i] // PANEL, j, ids[i] % PANEL])
                else:
                    y[i, j] = T.Cast("float32", w[ids[i] // PANEL, j, ids[i] % PANEL]) * s[ids[i]]

    @T.prim_func
    def plain(ids: T.Buffer(lead, "int64"), w: T.Buffer((panels, k, PANEL), weight_dtype), y: T.Buffer((*lead, k), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        gather(ids, w, None, y)

    @T.prim_func
    def dequantizing(
        ids: T.Buffer(lead, "int64"),
        w: T.Buffer((panels, k, PANEL), weight_dtype),
        s: T.Buffer((n,), "float32"),
        y: T.Buffer((*lead, k), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        gather(ids, w, s, y)

    return dequantizing if scaled else plain
