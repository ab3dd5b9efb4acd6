"""One row of the embedding matrix per token, gathered from the same packed panels that the head multiplies with when the two are tied."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.linear import PANEL


def embedding(rows: int, n: int, k: int, weight_dtype: str, scaled: bool) -> PrimFunc:
    """Kernel of ids (rows,) int64, w (panels, K, PANEL) and, when `scaled`, s (N,), to y (rows, K) float32; N is the vocabulary."""
    panels = -(-n // PANEL)

    @T.prim_func
    def plain(ids: T.Buffer((rows,), "int64"), w: T.Buffer((panels, k, PANEL), weight_dtype), y: T.Buffer((rows, k), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(rows):
            for j in T.serial(k):
                y[i, j] = T.Cast("float32", w[ids[i] // PANEL, j, ids[i] % PANEL])

    @T.prim_func
    def dequantizing(
        ids: T.Buffer((rows,), "int64"),
        w: T.Buffer((panels, k, PANEL), weight_dtype),
        s: T.Buffer((n,), "float32"),
        y: T.Buffer((rows, k), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(rows):
            for j in T.serial(k):
                y[i, j] = T.Cast("float32", w[ids[i] // PANEL, j, ids[i] % PANEL]) * s[ids[i]]

    return dequantizing if scaled else plain
