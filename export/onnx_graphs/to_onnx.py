"""Traces `StaticModel` to ONNX on the meta device, so that no weight is ever allocated.

`export.onnx_graphs.weights` then puts the weights in their place.
"""

import logging
import warnings
from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch._export.utils
from numpy.typing import NDArray
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
)
from onnxscript import optimizer
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry

from export.onnx_graphs.graphs import GraphsRecord
from export.onnx_graphs.stitch import Parts, stitch
from export.onnx_graphs.weights import store_weights
from export.static_model.model import StaticModel, distinct
from runtime.artifact.manifest import Graph, Signature, TensorSpec
from runtime.artifact.tensor_file import TensorFile

# For every trace, the exporter rebuilds tables that depend only on the opset and on torch's own operators: of its own
# operators, from their source code (half of a trace's time); of decompositions, which each trace takes entries out of,
# and of the operators that torch's C++ code registered (together a quarter of the rest). torch, which is pinned, has no
# public way to pass them in.
ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))
_decompositions = cache(_decomp.create_onnx_friendly_decomposition_table)
_decomp.create_onnx_friendly_decomposition_table = lambda operators: dict(_decompositions(frozenset(operators)))
torch._export.utils._materialize_cpp_cia_ops = cache(torch._export.utils._materialize_cpp_cia_ops)

OPSET = 20  # the newest at which TVM 0.27 imports every operator that the trace yields


def export_graph(
    model: StaticModel,
    record: GraphsRecord,
    graph: Graph,
    constants: dict[str, NDArray[np.generic]],
    weights: TensorFile,
    path: Path,
) -> None:
    """Trace `model` (on the meta device) at the graph's shapes, write it to `path` and check it.

    The weights stay in their file beside it.
    """
    traced = stitch(_trace_parts(model, graph, constants), model.cache_lens, graph.signature)
    store_weights(traced, record.tensors, weights)
    _check_signature(traced, graph)
    ir.save(traced, path)
    onnx.checker.check_model(str(path), full_check=True)


class _Method(torch.nn.Module):
    """A method that uses no layer, `begin` or `finish`, as a module, since the tracer takes a module."""

    def __init__(self, model: StaticModel, method: str) -> None:
        super().__init__()
        self.model, self.method = _without_layers(model), method

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        result: torch.Tensor | tuple[torch.Tensor, ...] = getattr(self.model, self.method)(*arguments)
        return result


def _without_layers(model: StaticModel) -> StaticModel:
    """The same model but for its layers, whose hundreds of parameters the tracer would carry through all its passes."""
    ends = copy(model)
    ends._modules = {name: module for name, module in model._modules.items() if name != "layers"}
    return ends


def _trace_parts(model: StaticModel, graph: Graph, constants: dict[str, NDArray[np.generic]]) -> Parts:
    """Trace every distinct part of the model once."""
    ids = [_meta(spec.shape, spec.dtype) for spec in graph.signature.call]
    x, *shared = model.begin(*ids)
    lengths = distinct(model.cache_lens)
    masks, rotation = shared[: len(lengths)], shared[len(lengths) :]
    blocks = {}
    each = len(graph.signature.caches) // len(model.cache_lens)  # caches of one layer
    for cache_len, mask in zip(lengths, masks, strict=True):
        layer = model.cache_lens.index(cache_len)
        caches = [_meta(spec.shape, spec.dtype) for spec in graph.signature.caches[each * layer : each * (layer + 1)]]
        blocks[cache_len] = _trace(model.layers[layer], [x, mask, *rotation, *caches], constants)
    begin, finish = (
        _trace(_Method(model, name), given, constants) for name, given in (("begin", ids), ("finish", [x]))
    )
    return Parts(begin, blocks, finish)


def _meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _trace(
    module: torch.nn.Module, arguments: list[torch.Tensor], constants: dict[str, NDArray[np.generic]]
) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation warnings
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
    """Give the small buffers their values; weights, which are meta tensors, lose theirs, so that nothing folds them."""
    for name, value in list(model.graph.initializers.items()):
        own = name.removeprefix("model.")  # added by `_Method`
        del model.graph.initializers[name]
        value.name = own
        value.const_value = ir.tensor(constants[own], name=own) if own in constants else None
        model.graph.initializers[own] = value


def _fold(model: ir.Model) -> None:
    optimizer.fold_constants(model, onnx_shape_inference=False)
    optimizer.remove_unused_nodes(model)
    # TVM does not read a Constant with value_ints.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)
    ClearMetadataAndDocStringPass()(model)  # the tracer's stack traces contain this machine's paths


def _check_signature(model: ir.Model, graph: Graph) -> None:
    """Check that the graph has the signature that was fixed before the trace, and that no dimension is dynamic."""
    found = Signature(inputs=_specs(model.graph.inputs), outputs=_specs(model.graph.outputs))
    assert found == graph.signature, f"{graph.name}: exported {found}, expected {graph.signature}"
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is None or value.shape.is_static(), (
                f"{graph.name}: {value.name} has dynamic shape {value.shape}"
            )


def _specs(values: "list[ir.Value] | ir.GraphInputs") -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=v.name, shape=tuple(int(n) for n in v.shape), dtype=str(v.dtype.numpy()))  # type: ignore[arg-type]
        for v in values
    )
