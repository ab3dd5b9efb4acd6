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
from export.model import StaticModel, distinct
from export.stitch import Parts, stitch
from runtime.manifest import Graph, Signature, TensorSpec
from runtime.tensor_file import StoredTensor, TensorFile

OPSET = 20  # the newest at which TVM 0.27 imports every operator that the trace yields


def export_graph(model: StaticModel, graph: Graph, constants: dict[str, NDArray[np.generic]], weights: TensorFile, path: Path) -> None:
    """Trace `model` (on the meta device) at the graph's shapes and write `path`, checked; weights stay in their file beside it."""
    traced = stitch(_trace_parts(model, graph, constants), model.cache_lens, graph.signature)
    for name in list(traced.graph.initializers):
        if name in weights.tensors:
            _store_as(traced, name, weights)
    _check_signature(traced, graph)
    ir.save(traced, path)
    onnx.checker.check_model(str(path), full_check=True)


class _Method(torch.nn.Module):
    """One method of the model as a module, which is what the tracer takes."""

    def __init__(self, model: StaticModel, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        result: torch.Tensor | tuple[torch.Tensor, ...] = getattr(self.model, self.method)(*arguments)
        return result


def _trace_parts(model: StaticModel, graph: Graph, constants: dict[str, NDArray[np.generic]]) -> Parts:
    """Every different part of the model once."""
    ids = [_meta(spec.shape, spec.dtype) for spec in graph.signature.inputs[:2]]
    x, cos, sin, *masks = model.begin(*ids)
    blocks = {}
    for cache_len, mask in zip(distinct(model.cache_lens), masks, strict=True):
        layer = model.cache_lens.index(cache_len)
        caches = [_meta(spec.shape, spec.dtype) for spec in graph.signature.inputs[2 + 2 * layer : 4 + 2 * layer]]
        blocks[cache_len] = _trace(model.layers[layer], [x, cos, sin, mask, *caches], constants)
    begin, finish = (_trace(_Method(model, name), given, constants) for name, given in (("begin", ids), ("finish", [x])))
    return Parts(begin, blocks, finish)


def _meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _trace(module: torch.nn.Module, arguments: list[torch.Tensor], constants: dict[str, NDArray[np.generic]]) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            module,
            tuple(arguments),
            dynamo=True,
            optimize=False,  # True folds the transposes into the weights and loses their names
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    traced = program.model
    _name_initializers(traced, constants)
    _fold(traced)
    return traced


def _name_initializers(model: ir.Model, constants: dict[str, NDArray[np.generic]]) -> None:
    """Give the small buffers their values; weights lose theirs (meta tensors have none), so that nothing tries to fold them."""
    for name, value in list(model.graph.initializers.items()):
        own = name.removeprefix("model.")  # of `_Method`
        del model.graph.initializers[name]
        value.name = own
        value.const_value = ir.tensor(constants[own], name=own) if own in constants else None
        model.graph.initializers[own] = value


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
        TensorSpec(name=v.name, shape=tuple(int(n) for n in v.shape), dtype=str(v.dtype.numpy()))  # type: ignore[arg-type]
        for v in values
    )
