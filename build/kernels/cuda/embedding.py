"""One row of the embedding matrix per token, gathered from the same packed panels that the head multiplies with when the two are tied."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.linear import PANEL
from build.kernels.shapes import Embedding

THREADS = 256


def embedding(shape: Embedding, on: Binding = GPU) -> PrimFunc:
    """Kernel of ids (*lead) int64, w (panels, K, PANEL) and, when it is scaled, s (N,), to y (*lead, K) float32; N is the vocabulary."""
    lead, n, k, rows, weight_dtype = shape.lead, shape.n, shape.k, shape.rows, shape.weight.dtype
    panels, parts = -(-n // PANEL), -(-k // THREADS)

    @T.inline
    def gather(ids_in, w, s, y_out):
        ids = T.decl_buffer((rows,), "int64", data=ids_in.data)
        y = T.decl_buffer((rows, k), "float32", data=y_out.data)
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                j = block % parts * THREADS + t
                token = T.Cast("int32", ids[i])
                if j < k:
                    if s is None:
                        y[i, j] = T.Cast("float32", w[token // PANEL, j, token % PANEL])
                    else:
                        y[i, j] = T.Cast("float32", w[token // PANEL, j, token % PANEL]) * s[token]

    @T.prim_func
    def plain(ids: T.Buffer(lead, "int64"), w: T.Buffer((panels, k, PANEL), weight_dtype), y: T.Buffer((*lead, k), "float32")):
        T.func_attr(ATTRIBUTES)
        gather(ids, w, None, y)

    @T.prim_func
    def dequantizing(
        ids: T.Buffer(lead, "int64"),
        w: T.Buffer((panels, k, PANEL), weight_dtype),
        s: T.Buffer((n,), "float32"),
        y: T.Buffer((*lead, k), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        gather(ids, w, s, y)

    return dequantizing if shape.weight.scaled else plain
