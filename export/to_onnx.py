"""StaticModel to ONNX: traced on the meta device, so that no weight is ever allocated, with the shared weight file as external data."""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, CommonSubexpressionEliminationPass, LiftConstantsToInitializersPass
from onnxscript import optimizer

from export.graphs import WEIGHTS_FILE
from export.model import StaticModel
from runtime.manifest import Graph, Signature, TensorSpec
from runtime.tensor_file import StoredTensor, TensorFile

OPSET = 20  # the newest at which TVM 0.27 imports every operator that the trace yields


def export_graph(model: StaticModel, graph: Graph, constants: dict[str, NDArray[np.generic]], weights: TensorFile, path: Path) -> None:
    """Trace `model` (on the meta device) at the graph's shapes and write `path`, checked; weights stay in their file beside it."""
    traced = _trace(model, graph.signature)
    _set_constants(traced, constants)
    _fold(traced)
    for name in list(traced.graph.initializers):
        if name in weights.tensors:
            _store_as(traced, name, weights)
    _check_signature(traced, graph)
    ir.save(traced, path)
    onnx.checker.check_model(str(path), full_check=True)


def _trace(model: StaticModel, signature: Signature) -> ir.Model:
    with torch.device("meta"):
        arguments = tuple(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model,
            arguments,
            dynamo=True,
            optimize=False,  # True folds the transposes into the weights and loses their names
            opset_version=OPSET,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            verbose=False,
        )
    assert program is not None
    return program.model


def _set_constants(model: ir.Model, constants: dict[str, NDArray[np.generic]]) -> None:
    """Give the small buffers their values; weights lose theirs (meta tensors have none), so that nothing tries to fold them."""
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(constants[name], name=name) if name in constants else None


def _fold(model: ir.Model) -> None:
    optimizer.fold_constants(model, onnx_shape_inference=False)
    optimizer.remove_unused_nodes(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # TVM reads no Constant with value_ints
    CommonSubexpressionEliminationPass()(model)
    ClearMetadataAndDocStringPass()(model)  # the tracer's stack traces hold this machine's paths


def _store_as(model: ir.Model, name: str, weights: TensorFile) -> None:
    """Point the initializer at the weight file; a narrower store is widened by DequantizeLinear or Cast before any use."""
    stored = weights.tensors[name]
    value = model.graph.initializers[name]
    if stored.dtype == "float32":
        value.const_value = _external(stored)
        return
    del model.graph.initializers[name]
    inputs = [_add_initializer(model, stored)]
    if stored.dtype == "int8":
        inputs.append(_add_initializer(model, weights.tensors[name + "_scale"]))
        node = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{name}.dequantize")
    else:
        node = ir.node("Cast", inputs, attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
    widened = node.outputs[0]
    widened.name, widened.shape, widened.dtype = f"{name}.float32", value.shape, ir.DataType.FLOAT
    model.graph.insert_before(model.graph[0], node)
    value.replace_all_uses_with(widened)


def _add_initializer(model: ir.Model, stored: StoredTensor) -> ir.Value:
    tensor = _external(stored)
    value = ir.Value(name=stored.name, shape=ir.Shape(stored.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers[stored.name] = value
    return value


def _external(stored: StoredTensor) -> ir.ExternalTensor:
    dtype = ir.DataType.from_numpy(np.dtype(stored.dtype))
    return ir.ExternalTensor(WEIGHTS_FILE, stored.offset, stored.nbytes, dtype, shape=ir.Shape(stored.shape), name=stored.name)


def _check_signature(model: ir.Model, graph: Graph) -> None:
    """The graph's boundary is the signature that was fixed before the trace, and no dimension anywhere is dynamic."""
    found = Signature(inputs=_specs(model.graph.inputs), outputs=_specs(model.graph.outputs))
    assert found == graph.signature, f"{graph.name}: exported {found}, expected {graph.signature}"
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is None or value.shape.is_static(), f"{graph.name}: {value.name} has dynamic shape {value.shape}"


def _specs(values: "list[ir.Value] | ir.GraphInputs") -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=v.name, shape=tuple(int(n) for n in v.shape), dtype=str(v.dtype.numpy()))  # type: ignore[union-attr,arg-type]
        for v in values
    )
