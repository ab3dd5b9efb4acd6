"""y = x W^T with its neighbours in a layer, and the choice of kernels for each shape.

RMSNorm of x comes in front, SwiGLU or the residual behind. W is packed in panels of 32 outputs, one for each lane of
a warp, and 16 bytes of K of each output are adjacent. One row takes a single launch for everything (`gemv.py`). For
several rows, a launch of its own computes the norm and brings x into the order of the weight's columns; the product is
in float32 (`gemm.py`, with SwiGLU in a launch behind it) or, where activations may be rounded to float16, on tensor
cores: `few_rows.py` for the rows of a step, and for those of a prompt `tensor_core.py` or, on sm_90a, `warpgroups/`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda import few_rows
from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.gemm import gemm
from build.kernels.cuda.gemv import fits, gemv, prepares_x
from build.kernels.cuda.norm import normalized_rows
from build.kernels.cuda.reorder import reordered_rows
from build.kernels.cuda.swiglu import gated_rows
from build.kernels.cuda.tensor_core import suits, tensor_core_gemm
from build.kernels.cuda.warpgroups.gemm import warpgroup_gemm
from build.kernels.cuda.weights import Loading, part_buffer, unused
from build.kernels.parameters import without
from build.kernels.shapes import Linear
from export.weights.table import vector_layout

Body = Callable[..., Any]


def linear(shape: Linear, on: Binding = GPU, *, tensor_cores: bool = False, warpgroups: bool = False) -> PrimFunc:
    """Kernel from x (*x_lead, K) float32 and w as in `vector_layout` to y (*lead, N).

    Arguments: x [, column (1,)] [, gain (K,)], w [, scales] [, zero points or minimums] [, order (K,)]
    [, residual (*lead, N)] and y. With a column, only that token of x is multiplied. With an order, column order[c] of
    x and gain belongs to column c of w. With `swiglu`, W holds gate and up, stacked,
    and y is half as wide. With `tensor_cores`, products of many rows may round x, and weights of groups with it, to
    float16. With `warpgroups` too, these are for sm_90a alone.
    """
    layout = vector_layout(shape.weight, shape.n, shape.k)
    loading = Loading.of(shape.weight)
    body = _body(shape, on, tensor_cores=tensor_cores, warpgroups=warpgroups)

    def start_of(column):
        return shape.k * T.Cast("int32", column[0]) if shape.one_of else 0

    @T.inline
    def by_rows(x_in, column, gain, w_in, s, z, order, residual_in, y_out):
        x = T.decl_buffer((shape.rows, shape.k), "float32", data=x_in.data, elem_offset=start_of(column))
        w = loading.declared(w_in)
        y = T.decl_buffer((shape.rows, shape.n_out), "float32", data=y_out.data)
        if shape.residual:
            residual = T.decl_buffer((shape.rows, shape.n_out), "float32", data=residual_in.data)
            body(x, gain, w, s, z, order, residual, y)
        else:
            body(x, gain, w, s, z, order, None, y)

    @T.prim_func
    def kernel(
        x: T.Buffer((*shape.x_lead, shape.k), "float32"),
        column: T.Buffer((1,), "int64"),
        gain: T.Buffer((shape.k,), "float32"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: part_buffer(layout, "s"),
        z: part_buffer(layout, "z"),
        order: part_buffer(layout, "order"),
        residual: T.Buffer((*shape.lead, shape.n_out), "float32"),
        y: T.Buffer((*shape.lead, shape.n_out), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        by_rows(x, column, gain, w, s, z, order, residual, y)

    absent = {"column": shape.one_of is None, "gain": shape.norm_eps is None, "residual": not shape.residual}
    return without(kernel, [*(name for name, missing in absent.items() if missing), *unused(layout)])


def _body(shape: Linear, on: Binding, *, tensor_cores: bool, warpgroups: bool) -> Body:
    """Inline `body(x, gain, w, s, z, order, residual, y)` for a shape: one launch or several."""
    if tensor_cores and few_rows.suits(shape):
        return few_rows.few_rows(shape, on)
    if tensor_cores and suits(shape):
        return warpgroup_gemm(shape, on) if warpgroups else tensor_core_gemm(shape, on)
    if shape.rows == 1 and fits(shape):
        return gemv(shape, on)
    if prepares_x(shape):
        in_order = msgspec.structs.replace(shape.weight, reordered=False)
        product = replace(shape, weight=in_order, norm_eps=None, one_of=None)
        return _x_first(shape, _body(product, on, tensor_cores=tensor_cores, warpgroups=warpgroups), on)
    if shape.swiglu:
        return _gate_last(shape, gemm(replace(shape, swiglu=False), on), on)
    return gemm(shape, on)


def _x_first(shape: Linear, product: Body, on: Binding) -> Body:
    """A launch that normalises the rows of x and brings their columns into the weight's order; then the product."""
    rows, k, eps, reordered = shape.rows, shape.k, shape.norm_eps, shape.weight.reordered

    def column(order, c):
        return order[c] if reordered else c

    normalize = normalized_rows(rows, k, eps, on, column=column) if eps is not None else None
    reorder = reordered_rows(rows, k, on)

    @T.inline
    def body(x, gain, w, s, z, order, residual, y):
        prepared = T.alloc_buffer((rows, k), "float32")
        if eps is not None:
            normalize(x, gain, order, prepared)
        else:
            reorder(x, order, prepared)
        product(prepared, None, w, s, z, None, residual, y)

    return body


def _gate_last(shape: Linear, product: Body, on: Binding) -> Body:
    gate = gated_rows(shape.rows, shape.n_out, on)

    @T.inline
    def body(x, gain, w, s, z, order, residual, y):
        both = T.alloc_buffer((shape.rows, shape.n), "float32")
        product(x, gain, w, s, z, order, residual, both)
        gate(both, y)

    return body
