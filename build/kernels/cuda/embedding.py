"""Embedding lookup: one row per token, gathered from the packed panels that a tied output head multiplies with."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.weights import (
    Loading,
    group_of,
    number,
    part_buffer,
    row_scale,
    unused,
    weight,
)
from build.kernels.parameters import without
from build.kernels.shapes import Embedding
from export.weights.table import scaled_by_rows, vector_layout, vector_steps
from runtime.artifact.layouts import PANEL

THREADS = 256


def embedding(shape: Embedding, on: Binding = GPU) -> PrimFunc:
    """Kernel from ids (*lead) int64 and w to y (*lead, K) float32.

    w, as in `vector_layout`, is followed by its scales, offsets and order, as far as there are any.
    """
    lead, n, k, rows, stored = shape.lead, shape.n, shape.k, shape.rows, shape.weight
    layout, steps = vector_layout(stored, n, k), vector_steps(stored)
    vectors, loading, read = -(-k // steps), Loading.of(stored), number(stored).read
    parts = -(-vectors // THREADS)

    def scaled(value, s, z, token, at):
        if not stored.grouped:
            return value * row_scale(stored, s, token) if scaled_by_rows(stored) else value
        place = (token // PANEL, group_of(stored, at), token % PANEL)
        return weight(stored, value, s[place], z[place] if stored.offsets != "none" else None)

    def column(order, c):
        return order[c] if stored.reordered else c

    @T.prim_func
    def kernel(
        ids_in: T.Buffer(lead, "int64"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: part_buffer(layout, "s"),
        z: part_buffer(layout, "z"),
        order: part_buffer(layout, "order"),
        y_out: T.Buffer((*lead, k), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        ids = T.decl_buffer((rows,), "int64", data=ids_in.data)
        y = T.decl_buffer((rows, k), "float32", data=y_out.data)
        elements = loading.declared(w)
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                at = block % parts * THREADS + t
                token = T.Cast("int32", ids[i])
                if at < vectors:
                    vector = T.alloc_buffer((loading.elements,), loading.dtype, scope=on.private)
                    for v in T.vectorized(loading.elements):
                        vector[v] = elements[token // PANEL, at, token % PANEL, v]
                    for v in on.unroll(steps):
                        if at * steps + v < k:
                            y[i, column(order, at * steps + v)] = scaled(read(vector, 0, v), s, z, token, at)

    return without(kernel, unused(layout))
