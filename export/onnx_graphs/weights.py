"""Weights in an ONNX graph: external data in the shared weight file, stored as the record says, and widened before use.

Each format defines how it is widened (`export.weights`). In MatMul(x, w^T), the columns of x are taken in the order of
the weight's, where that has one of its own. Where activations are rounded to whole numbers, x becomes
round(x / s) * s, with s = (max |x| + 1e-30) / levels for each group of a token: 127 for int8; where they are rounded
to bfloat16, it is cast to that type and back.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.static_model.constants import SMALLEST_PEAK
from export.weights.format import ORDER_SUFFIX, ModelTensor
from export.weights.stored import WEIGHTS_FILE
from export.weights.table import format_of
from export.weights.widening import Sizes, Stored, Widening
from runtime.artifact.schemes import ROUNDING_LEVELS, Rounding
from runtime.artifact.tensor_file import StoredTensor, TensorFile, numpy_dtype


def store_weights(model: ir.Model, tensors: Sequence[ModelTensor], weights: TensorFile) -> None:
    """Give every weight of the graph, so far an initializer without data, its stored tensors from the file."""
    for tensor in tensors:
        if tensor.name in model.graph.initializers:
            _store(model, tensor, weights)


def _store(model: ir.Model, tensor: ModelTensor, weights: TensorFile) -> None:
    value = model.graph.initializers[tensor.name]
    products = _products(value)
    if tensor.stored.reordered:
        order = _initializer(model, weights.tensors[tensor.name + ORDER_SUFFIX])
        for matmul in products:
            _reorder(model, matmul, order)
    if tensor.stored.rounds:
        for matmul in products:
            if tensor.stored.rounding in ROUNDING_LEVELS:
                _round_tokens(model, matmul, tensor.stored.rounded_together(tensor.shape[1]), tensor.stored.rounding)
            else:
                _cast_tokens(model, matmul)
    widening = format_of(tensor.stored).widening(tensor)
    if widening is None:
        value.const_value = _external(weights.tensors[tensor.name])
        return
    del model.graph.initializers[tensor.name]
    nodes = _widening(model, tensor, widening, weights)
    widened = nodes[-1].outputs[0]
    widened.shape, widened.dtype = value.shape, ir.DataType.FLOAT
    model.graph.insert_before(model.graph[0], nodes)
    value.replace_all_uses_with(widened)
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""], widening.opset)


def _widening(model: ir.Model, tensor: ModelTensor, widening: Widening, weights: TensorFile) -> list[ir.Node]:
    """The nodes that widen stored tensors to float32; the last one gives the weight."""
    nodes: list[ir.Node] = []
    results: dict[str, ir.Value] = {}

    def value(given: Stored | Sizes | str) -> ir.Value:
        if isinstance(given, Stored):
            declared = (ir.DataType[given.number], tensor.shape) if given.number else ()
            return _initializer(model, weights.tensors[tensor.name + given.suffix], *declared)
        if isinstance(given, Sizes):
            return _constant(model, given.name, np.array(given.values, np.int64))
        return results[given]

    for step in widening.steps:
        attributes = {key: ir.DataType[v] if key == "to" else v for key, v in step.attributes.items()}
        name = step.result(tensor.name)
        node = ir.node(step.operator, [value(given) for given in step.inputs], attributes=attributes, name=name)
        node.outputs[0].name = name
        results[step.label] = node.outputs[0]
        nodes.append(node)
    return nodes


def _products(weight: ir.Value) -> list[ir.Node]:
    """The nodes MatMul(x, Transpose(weight))."""
    transposed = [use.node.outputs[0] for use in weight.uses() if use.node.op_type == "Transpose"]
    return [use.node for value in transposed for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 1]


def _reorder(model: ir.Model, matmul: ir.Node, order: ir.Value) -> None:
    """Take the columns of x (..., K) in the order of the weight's, before a product or its rounding."""
    x = matmul.inputs[0]
    assert x is not None
    name = f"{matmul.name}.reordered"
    gather = ir.node("Gather", [x, order], attributes={"axis": -1}, name=name)
    gather.outputs[0].name, gather.outputs[0].shape, gather.outputs[0].dtype = name, x.shape, ir.DataType.FLOAT
    matmul.replace_input_with(0, gather.outputs[0])
    model.graph.insert_before(matmul, [gather])


def _cast_tokens(model: ir.Model, matmul: ir.Node) -> None:
    """Insert the rounding of x to bfloat16, half to even, before a product, which is still one of float32."""
    value = matmul.inputs[0]
    assert value is not None
    for dtype, label in ((ir.DataType.BFLOAT16, "narrowed"), (ir.DataType.FLOAT, "rounded")):
        name = f"{matmul.name}.{label}"
        node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, value.shape, dtype
        value = node.outputs[0]
        model.graph.insert_before(matmul, [node])
    matmul.replace_input_with(0, value)


def _round_tokens(model: ir.Model, matmul: ir.Node, together: int, rounding: Rounding) -> None:
    """Insert the rounding of x (..., K) to whole numbers, in groups of `together` neighbours, before a product."""
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
        return add("Reshape", [value, _sizes(model, shape)], shape, label)

    groups = reshaped(x, split, "groups")
    smallest = _constant(model, "dynamic.smallest_peak", np.array(SMALLEST_PEAK, np.float32))
    levels = _constant(model, f"dynamic.levels.{rounding}", np.array(ROUNDING_LEVELS[rounding], np.float32))
    peak = add("ReduceMax", [add("Abs", [groups], split, "abs"), _sizes(model, ir.Shape([-1]))], one, "peak")
    scale = add("Div", [add("Add", [peak, smallest], one, "above_zero"), levels], one, "scale")
    whole = add("Round", [add("Div", [groups, scale], split, "levels")], split, "whole")
    matmul.replace_input_with(0, reshaped(add("Mul", [whole, scale], split, "scaled"), whole_shape, "rounded"))
    model.graph.insert_before(matmul, nodes)


def _sizes(model: ir.Model, shape: ir.Shape) -> ir.Value:
    sizes = Sizes(tuple(shape.numpy()))
    return _constant(model, sizes.name, np.array(sizes.values, np.int64))


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A small initializer, shared by all its uses."""
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
