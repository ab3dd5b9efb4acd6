"""Weights in an ONNX graph: external data in the shared weight file, stored as the record says, and widened before use.

Each format defines how it is widened (`export.weights`). Where activations are rounded, x in MatMul(x, w^T) becomes
round(x / s) * s, with s = (max |x| + 1e-30) / 127 for each group of a token.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.static_model.constants import DYNAMIC_LEVELS, SMALLEST_PEAK
from export.weights.format import ModelTensor, Widening
from export.weights.stored import WEIGHTS_FILE
from export.weights.table import format_of
from runtime.artifact.tensor_file import StoredTensor, TensorFile, numpy_dtype

OPSET_OF_BLOCKS = 21  # the first in which DequantizeLinear supports groups


def store_weights(model: ir.Model, tensors: Sequence[ModelTensor], weights: TensorFile) -> None:
    """Give every weight of the graph, so far an initializer without data, its stored tensors from the file."""
    for tensor in tensors:
        if tensor.name in model.graph.initializers:
            _store(model, tensor, weights)


def _store(model: ir.Model, tensor: ModelTensor, weights: TensorFile) -> None:
    value = model.graph.initializers[tensor.name]
    if tensor.stored.dynamic:
        for matmul in _products(value):
            _round_tokens(model, matmul, tensor.stored.rounded_together(tensor.shape[1]))
    widening = format_of(tensor.stored).widening(tensor)
    if widening is None:
        value.const_value = _external(weights.tensors[tensor.name])
        return
    del model.graph.initializers[tensor.name]
    nodes = _widening(model, tensor, widening, weights)
    widened = nodes[-1].outputs[0]
    widened.name, widened.shape, widened.dtype = f"{tensor.name}.float32", value.shape, ir.DataType.FLOAT
    model.graph.insert_before(model.graph[0], nodes)
    value.replace_all_uses_with(widened)
    if "block_size" in widening.attributes:
        model.graph.opset_imports[""] = OPSET_OF_BLOCKS


def _widening(model: ir.Model, tensor: ModelTensor, widening: Widening, weights: TensorFile) -> list[ir.Node]:
    """The nodes that widen stored tensors to float32; the last one gives the weight."""
    nodes: list[ir.Node] = []
    inputs: list[ir.Value] = []
    for part in widening.inputs:
        stored = weights.tensors[tensor.name + part.suffix]
        declared = (ir.DataType[part.number], tensor.shape) if part.number else ()
        value = _initializer(model, stored, *declared)
        if part.cast is not None:
            dtype, label = ir.DataType[part.cast], f"{stored.name}.cast"
            node = ir.node("Cast", [value], attributes={"to": dtype}, name=label)
            value = node.outputs[0]
            value.name, value.shape, value.dtype = label, ir.Shape(stored.shape), dtype
            nodes.append(node)
        inputs.append(value)
    if widening.operator is None:
        return nodes
    return [
        *nodes,
        ir.node(widening.operator, inputs, attributes=dict(widening.attributes), name=f"{tensor.name}.dequantize"),
    ]


def _products(weight: ir.Value) -> list[ir.Node]:
    """The nodes MatMul(x, Transpose(weight))."""
    transposed = [use.node.outputs[0] for use in weight.uses() if use.node.op_type == "Transpose"]
    return [use.node for value in transposed for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 1]


def _round_tokens(model: ir.Model, matmul: ir.Node, together: int) -> None:
    """Insert the rounding of x (..., K) to int8, in groups of `together` neighbours, before a product."""
    x, name = matmul.inputs[0], matmul.name
    assert x is not None
    assert x.shape is not None
    *leading, k = x.shape.numpy()
    whole_shape, split, one = (
        ir.Shape([*leading, k]),
        ir.Shape([*leading, k // together, together]),
        ir.Shape([*leading, k // together, 1]),
    )
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value], shape: ir.Shape, label: str) -> ir.Value:
        node = ir.node(
            operator, inputs, attributes={"keepdims": 1} if operator == "ReduceMax" else {}, name=f"{name}.{label}"
        )
        output = node.outputs[0]
        output.name, output.shape, output.dtype = f"{name}.{label}", shape, ir.DataType.FLOAT
        nodes.append(node)
        return output

    def reshaped(value: ir.Value, shape: ir.Shape, label: str) -> ir.Value:
        return add(
            "Reshape",
            [value, _constant(model, "x".join(map(str, shape)), np.array(shape.numpy(), np.int64))],
            shape,
            label,
        )

    groups = reshaped(x, split, "groups")
    peak = add(
        "ReduceMax",
        [add("Abs", [groups], split, "abs"), _constant(model, "last_axis", np.array([-1], np.int64))],
        one,
        "peak",
    )
    above_zero = add(
        "Add", [peak, _constant(model, "smallest_peak", np.array(SMALLEST_PEAK, np.float32))], one, "above_zero"
    )
    scale = add("Div", [above_zero, _constant(model, "levels", np.array(DYNAMIC_LEVELS, np.float32))], one, "scale")
    whole = add("Round", [add("Div", [groups, scale], split, "levels")], split, "whole")
    matmul.replace_input_with(0, reshaped(add("Mul", [whole, scale], split, "scaled"), whole_shape, "rounded"))
    model.graph.insert_before(matmul, nodes)


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A small initializer, shared by all its uses."""
    name = f"dynamic.{name}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(array, name=name)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return model.graph.initializers[name]


def _initializer(
    model: ir.Model, stored: StoredTensor, dtype: ir.DataType | None = None, shape: tuple[int, ...] | None = None
) -> ir.Value:
    """A tensor of the weight file; `dtype` and `shape` are given if ONNX packs what safetensors holds as bytes."""
    tensor = _external(stored, dtype, shape)
    value = ir.Value(name=stored.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers[stored.name] = value
    return value


def _external(
    stored: StoredTensor, dtype: ir.DataType | None = None, shape: tuple[int, ...] | None = None
) -> ir.ExternalTensor:
    if dtype is None:
        dtype = ir.DataType.from_numpy(numpy_dtype(stored.dtype))
    return ir.ExternalTensor(
        WEIGHTS_FILE, stored.offset, stored.nbytes, dtype, shape=ir.Shape(shape or stored.shape), name=stored.name
    )
