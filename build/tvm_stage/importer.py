"""From ONNX to Relax, without the weights: they become float32 parameters and never enter the compiler.

Each parameter has its weight's name. The record says how a weight is stored; this module checks, node by node, that
the graph widens it in exactly that way.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import onnx

from build.compiler import from_onnx, relax, tvm
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.weights.format import ModelTensor, Widening
from export.weights.table import format_of
from runtime.artifact.manifest import Graph
from runtime.errors import UserError

EXTERNAL = onnx.TensorProto.EXTERNAL
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class RelaxModule:
    """All graphs in one module, each a function of its signature's inputs, then of the model's tensors in float32."""

    module: tvm.IRModule
    record: GraphsRecord


def import_graphs(graphs: OnnxGraphs) -> RelaxModule:
    """Import every graph; weights are declared but never read."""
    functions = {graph.name: _import(graphs, graph) for graph in graphs.record.graphs}
    return RelaxModule(tvm.IRModule(functions), graphs.record)


def _import(graphs: OnnxGraphs, graph: Graph) -> relax.Function:
    path = graphs.onnx_path(graph)
    proto = onnx.load(str(path), load_external_data=False)
    _weights_to_inputs(proto, graphs.record, str(path))
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(output):  # from_onnx prints the node that it fails on
            warnings.simplefilter("ignore")  # it warns about each weight whose name it changes from a.b to a_b
            module = from_onnx(proto, keep_params_in_input=False)
    except (ValueError, KeyError, tvm.error.OpNotImplemented) as error:
        raise UserError(
            f"{path}: TVM cannot import this graph: {output.getvalue().strip()} {error}; "
            "expected the graphs of `python -m export`"
        ) from error
    function = module["main"].with_attr("global_symbol", graph.name).without_attr("num_input")
    _check_parameters(function, graph, graphs.record, str(path))
    return function


def _weights_to_inputs(proto: onnx.ModelProto, record: GraphsRecord, where: str) -> None:
    """Replace each widening of stored tensors with a graph input of the weight's name, in the record's order."""
    external = {t.name for t in proto.graph.initializer if t.data_location == EXTERNAL}
    small = [t for t in proto.graph.initializer if t.data_location != EXTERNAL]
    missing = [spec.name for spec in record.weights if spec.name not in external]
    if missing or len(external) != len(record.weights):
        raise UserError(
            f"{where} uses {len(external)} external weights, expected the {len(record.weights)} of the weight file; "
            "export again"
        )
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    widening: set[str] = set()  # outputs of the nodes that are replaced
    renamed: dict[str, str] = {}
    for tensor in record.tensors:
        expected = format_of(tensor.stored).widening(tensor)
        if expected is not None:
            nodes = _widening_nodes(tensor, expected, readers, makers)
            if not _is_widening(tensor, expected, nodes):
                raise UserError(
                    f"{where}: {tensor.name} is not widened as {tensor.stored.dtype} by {nodes[-1].name}, "
                    "as its record says; export the graphs again"
                )
            widening |= {output for node in nodes for output in node.output}
            renamed[nodes[-1].output[0]] = tensor.name
    left = [node for node in proto.graph.node if not widening.intersection(node.output)]
    for node in left:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(left)
    proto.graph.initializer.extend(small)
    for tensor in record.tensors:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, FLOAT, list(tensor.shape)))


def _widening_nodes(
    tensor: ModelTensor,
    widening: Widening,
    readers: Mapping[str, list[onnx.NodeProto]],
    makers: Mapping[str, onnx.NodeProto],
) -> list[onnx.NodeProto]:
    """The casts that are found where they should be, and then the last node, whose output is the weight."""
    (last,) = readers[tensor.name]
    if widening.operator is not None and widening.inputs[0].cast is not None:
        (last,) = readers[last.output[0]]
    if widening.operator is None:
        return [last]
    sources = zip(widening.inputs, last.input, strict=False)
    return [*(makers[name] for part, name in sources if part.cast is not None and name in makers), last]


def _is_widening(tensor: ModelTensor, widening: Widening, nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether the nodes are exactly those that `export.onnx_graphs.weights` writes for a tensor."""
    casts = [part for part in widening.inputs if part.cast is not None]
    expected = [
        ("Cast", {"to": onnx.TensorProto.DataType.Value(part.cast)}, [tensor.name + part.suffix]) for part in casts
    ]
    if widening.operator is not None:
        outputs = iter([node.output[0] for node in nodes[:-1]])
        inputs = [next(outputs, "") if part.cast is not None else tensor.name + part.suffix for part in widening.inputs]
        expected.append((widening.operator, dict(widening.attributes), inputs))
    return [_described(node) for node in nodes] == expected


def _described(node: onnx.NodeProto) -> tuple[str, dict[str, object], list[str]]:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return node.op_type, attributes, list(node.input)


def _check_parameters(function: relax.Function, graph: Graph, record: GraphsRecord, where: str) -> None:
    """Assert that the Relax function takes what the signature says, in its order."""
    found = [(tuple(int(n) for n in p.ty.shape), str(p.ty.dtype)) for p in function.params]
    wanted = [(spec.shape, str(spec.dtype)) for spec in graph.signature.inputs] + [
        (tensor.shape, "float32") for tensor in record.tensors
    ]
    assert found == wanted, f"{where}: imported parameters differ from the signature: found {found}, expected {wanted}"
