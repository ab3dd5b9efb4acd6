"""Embedding lookup: one row per token, gathered from the packed panels that a tied output head multiplies with."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.weights import group_of, number, scale_of, scales_buffer, unused, zero_of, zeros_buffer
from build.kernels.parameters import without
from build.kernels.shapes import Embedding
from export.weights.table import format_of, vector_layout, vector_steps
from runtime.artifact.layouts import PANEL

THREADS = 256


def embedding(shape: Embedding, on: Binding = GPU) -> PrimFunc:
    """Kernel from ids (*lead) int64 and w as in `vector_layout` [, scales [, zero points]] to y (*lead, K) float32."""
    lead, n, k, rows, stored = shape.lead, shape.n, shape.k, shape.rows, shape.weight
    layout, steps = vector_layout(stored, n, k), vector_steps(stored)
    vectors, words, read = -(-k // steps), layout.shape[-1], number(stored)
    parts = -(-vectors // THREADS)

    def scaled(value, s, z, token, at):
        if stored.grouped:
            g = group_of(stored, at)
            return (value - zero_of(stored, z, token // PANEL, g, token % PANEL)) * scale_of(
                s, token // PANEL, g, token % PANEL
            )
        return value * s[token] if format_of(stored).scaled else value

    @T.prim_func
    def kernel(
        ids_in: T.Buffer(lead, "int64"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: scales_buffer(layout),
        z: zeros_buffer(layout),
        y_out: T.Buffer((*lead, k), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        ids = T.decl_buffer((rows,), "int64", data=ids_in.data)
        y = T.decl_buffer((rows, k), "float32", data=y_out.data)
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                at = block % parts * THREADS + t
                token = T.Cast("int32", ids[i])
                if at < vectors:
                    vector = T.alloc_buffer((words,), layout.dtype, scope=on.private)
                    for v in T.vectorized(words):
                        vector[v] = w[token // PANEL, at, token % PANEL, v]
                    for v in on.unroll(steps):
                        if at * steps + v < k:
                            y[i, at * steps + v] = scaled(read(vector, 0, v), s, z, token, at)

    return without(kernel, unused(layout))
