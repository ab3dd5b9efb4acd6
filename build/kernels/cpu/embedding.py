"""Embedding lookup: one row per token, gathered from the packed panels that a tied output head multiplies with."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import weight_at
from build.kernels.parameters import UNUSED, without
from build.kernels.shapes import Embedding
from export.weights.table import panel_layout


def embedding(_level: Level, shape: Embedding) -> PrimFunc:
    """Kernel from ids (*lead) int64 and the stored matrix [, scales [, zero points]] to y (*lead, K) float32.

    N is the vocabulary size.
    """
    layout = panel_layout(shape.weight, shape.n, shape.k)
    scales, zeros = layout.scales or (UNUSED, "float32"), layout.offsets or (UNUSED, "uint8")
    read = weight_at(shape.weight)

    @T.prim_func
    def kernel(
        ids: T.Buffer(shape.lead, "int64"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: T.Buffer(*scales),
        z: T.Buffer(*zeros),
        y: T.Buffer((*shape.lead, shape.k), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        tokens = T.decl_buffer((shape.rows,), "int64", data=ids.data)
        y_rows = T.decl_buffer((shape.rows, shape.k), "float32", data=y.data)
        for i in T.serial(shape.rows):
            for j in T.serial(shape.k):
                y_rows[i, j] = read(w, s, z, T.Cast("int32", tokens[i]), j)

    present = {"s": layout.scales, "z": layout.offsets}
    return without(kernel, [name for name, there in present.items() if not there])
