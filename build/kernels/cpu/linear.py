"""y = x W^T with its neighbours in a layer, in one launch: RMSNorm of x in front, SwiGLU and the residual behind.

W is packed in panels (see `runtime.artifact.layouts`): one loop over K turns a panel into PANEL adjacent outputs, so
weights are read strictly in order, once per call. x is normalised once per call, before the panels, which threads
share.

Bytes per call: the weights as stored, plus x and y. Operations: 2 * M * N * K.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.float_rows import float_rows
from build.kernels.cpu.integer import integer_rows
from build.kernels.cpu.level import Level
from build.kernels.cpu.pair_rows import pair_rows
from build.kernels.cpu.pair_tiles import pair_tile_rows
from build.kernels.parameters import UNUSED, without
from build.kernels.shapes import Linear
from export.weights.table import panel_layout

Body = Callable[..., Any]


def linear(level: Level, shape: Linear) -> PrimFunc:
    """Kernel from x (*x_lead, K) and the stored weight to y (*lead, N); x and y are float32.

    Arguments: x [, column (1,)] [, gain (K,)], the weight [, scales [, offsets]] [, order (K,)] [, residual (*lead, N)]
    and y. With `swiglu`, W holds gate and up, stacked, and y is half as wide.
    """
    layout = panel_layout(shape.weight, shape.n, shape.k)
    scales, zeros = layout.scales or (UNUSED, "float32"), layout.offsets or (UNUSED, "uint8")
    order_of = layout.order or (UNUSED, "int32")
    body = _body(level, shape)

    def start_of(column):
        return shape.k * T.Cast("int32", column[0]) if shape.one_of else 0

    @T.prim_func
    def kernel(
        x: T.Buffer((*shape.x_lead, shape.k), "float32"),
        column: T.Buffer((1,), "int64"),
        gain: T.Buffer((shape.k,), "float32"),
        w: T.Buffer(layout.shape, layout.dtype),
        s: T.Buffer(*scales),
        z: T.Buffer(*zeros),
        order: T.Buffer(*order_of),
        residual: T.Buffer((*shape.lead, shape.n_out), "float32"),
        y: T.Buffer((*shape.lead, shape.n_out), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        x_rows = T.decl_buffer((shape.rows, shape.k), "float32", data=x.data, elem_offset=start_of(column))
        y_rows = T.decl_buffer((shape.rows, shape.n_out), "float32", data=y.data)
        if shape.residual:
            residual_rows = T.decl_buffer((shape.rows, shape.n_out), "float32", data=residual.data)
            body(x_rows, gain, order, w, s, z, residual_rows, y_rows)
        else:
            body(x_rows, gain, order, w, s, z, None, y_rows)

    present = {
        "column": shape.one_of,
        "gain": shape.norm_eps is not None,
        "s": layout.scales,
        "z": layout.offsets,
        "order": layout.order,
        "residual": shape.residual,
    }
    return without(kernel, [name for name, there in present.items() if not there])


def _body(level: Level, shape: Linear) -> Body:
    """Body for the weight's format and the rounding of activations."""
    rounding = shape.weight.rounding
    if rounding == "none":
        return float_rows(level, shape)
    if rounding in level.dots:
        return integer_rows(level, shape, level.dots[rounding], level.words.get(rounding))
    if level.pair_tiles and rounding == "bfloat16":
        return pair_tile_rows(level, shape)
    if rounding in level.pair_dots:
        return pair_rows(level, shape, level.pair_dots[rounding])
    return float_rows(level, shape)
