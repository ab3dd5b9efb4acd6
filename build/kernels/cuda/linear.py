"""y = x W^T with its neighbours in a layer, and the choice of kernels for each shape.

RMSNorm of x comes in front, SwiGLU or the residual behind. W is packed in panels of 32 outputs, one for each lane of
a warp, and 16 bytes of K of each output are adjacent. One row takes a single launch for everything (`gemv.py`). For
several rows, the norm is a launch of its own; the product is in float32 (`gemm.py`, with SwiGLU in a launch behind
it) or, where activations may be rounded to float16, on tensor cores (`tensor_core.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, Binding
from build.kernels.cuda.gemm import gemm
from build.kernels.cuda.gemv import fits_norm, gemv
from build.kernels.cuda.norm import normalized_rows
from build.kernels.cuda.swiglu import gated_rows
from build.kernels.cuda.tensor_core import suits, tensor_core_gemm
from build.kernels.cuda.weights import scales_buffer, unused, zeros_buffer
from build.kernels.parameters import without
from build.kernels.shapes import Linear
from export.weights.table import vector_layout

Body = Callable[..., Any]


def linear(shape: Linear, on: Binding = GPU, *, tensor_cores: bool = False) -> PrimFunc:
    """Kernel from x (*x_lead, K) float32 and w as in `vector_layout` to y (*lead, N).

    Arguments: x [, gain (K,)], w [, scales [, zero points]] [, residual (*lead, N)] and y. With `swiglu`, W holds
    gate and up, stacked, and y is half as wide. With `tensor_cores`, products of many rows may round x, and int4
    weights with it, to float16.
    """
    layout = vector_layout(shape.weight, shape.n, shape.k)
    body = _body(shape, on, tensor_cores=tensor_cores)

    @T.prim_func
    def kernel(
        x_in: T.Buffer((*shape.x_lead, shape.k), "float32"),
        gain: T.Buffer((shape.k,), "float32"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: scales_buffer(layout),
        z: zeros_buffer(layout),
        residual: T.Buffer((*shape.lead, shape.n_out), "float32"),
        y_out: T.Buffer((*shape.lead, shape.n_out), "float32"),
    ):
        T.func_attr(ATTRIBUTES)
        x = T.decl_buffer((shape.x_rows, shape.k), "float32", data=x_in.data)
        y = T.decl_buffer((shape.rows, shape.n_out), "float32", data=y_out.data)
        if shape.residual:
            residual_rows = T.decl_buffer((shape.rows, shape.n_out), "float32", data=residual.data)
            body(x, gain, w, s, z, residual_rows, y)
        else:
            body(x, gain, w, s, z, None, y)

    absent = {"gain": shape.norm_eps is None, "residual": not shape.residual}
    return without(kernel, [*(name for name, missing in absent.items() if missing), *unused(layout)])


def _body(shape: Linear, on: Binding, *, tensor_cores: bool) -> Body:
    """Inline `body(x, gain, w, s, z, residual, y)` for a shape: one launch or several."""
    if shape.rows == 1 and (shape.norm_eps is None or fits_norm(shape)):
        return gemv(shape, on)
    if shape.norm_eps is not None:
        return _norm_first(shape, _body(replace(shape, norm_eps=None, last_of=None), on, tensor_cores=tensor_cores), on)
    if tensor_cores and suits(shape):
        return tensor_core_gemm(shape, on)
    if shape.swiglu:
        return _gate_last(shape, gemm(replace(shape, swiglu=False), on), on)
    return gemm(shape, on)


def _norm_first(shape: Linear, product: Body, on: Binding) -> Body:
    assert shape.norm_eps is not None
    normalize = normalized_rows(shape.rows, shape.k, shape.norm_eps, on, source=shape.x_row)

    @T.inline
    def body(x, gain, w, s, z, residual, y):
        normed = T.alloc_buffer((shape.rows, shape.k), "float32")
        normalize(x, gain, normed)
        product(normed, None, w, s, z, residual, y)

    return body


def _gate_last(shape: Linear, product: Body, on: Binding) -> Body:
    gate = gated_rows(shape.rows, shape.n_out, on)

    @T.inline
    def body(x, gain, w, s, z, residual, y):
        both = T.alloc_buffer((shape.rows, shape.n), "float32")
        product(x, gain, w, s, z, residual, both)
        gate(both, y)

    return body
