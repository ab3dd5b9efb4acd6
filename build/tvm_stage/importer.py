"""ONNX to Relax, without the weights: they become parameters under their names, in float32, and never enter the compiler.

How each weight is stored is the record's word; that the graph widens it in exactly that way is checked here, node by node.
"""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass

import onnx

from build.compiler import from_onnx, relax, tvm
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.weights.quantize import SCALE_SUFFIX, ZERO_POINT_SUFFIX, ModelTensor
from runtime.artifact.manifest import Graph
from runtime.errors import UserError

EXTERNAL = onnx.TensorProto.EXTERNAL
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class RelaxModule:
    """All graphs in one module, each a function of its signature's inputs followed by the model's tensors in float32."""

    module: tvm.IRModule
    record: GraphsRecord


def import_graphs(graphs: OnnxGraphs) -> RelaxModule:
    """Import every graph; weights are declared and never read."""
    functions = {graph.name: _import(graphs, graph) for graph in graphs.record.graphs}
    return RelaxModule(tvm.IRModule(functions), graphs.record)


def _import(graphs: OnnxGraphs, graph: Graph) -> relax.Function:
    path = graphs.onnx_path(graph)
    proto = onnx.load(str(path), load_external_data=False)
    _weights_to_inputs(proto, graphs.record, str(path))
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(output):  # it prints the node that it fails on
            warnings.simplefilter("ignore")  # it renames a.b to a_b, aloud, once a weight
            module = from_onnx(proto, keep_params_in_input=False)
    except (ValueError, KeyError, tvm.error.OpNotImplemented) as error:
        raise UserError(
            f"{path}: TVM cannot import this graph: {output.getvalue().strip()} {error}; expected the graphs of `python -m export`"
        ) from error
    function = module["main"].with_attr("global_symbol", graph.name).without_attr("num_input")
    _check_parameters(function, graph, graphs.record, str(path))
    return function


def _weights_to_inputs(proto: onnx.ModelProto, record: GraphsRecord, where: str) -> None:
    """Turn what every widening of stored tensors gives into a graph input of the weight's name, in the record's order."""
    external = {t.name for t in proto.graph.initializer if t.data_location == EXTERNAL}
    small = [t for t in proto.graph.initializer if t.data_location != EXTERNAL]
    missing = [spec.name for spec in record.weights if spec.name not in external]
    if missing or len(external) != len(record.weights):
        raise UserError(
            f"{where} uses {len(external)} external weights, expected the {len(record.weights)} of the weight file; export again"
        )
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    widening: set[str] = set()  # outputs of the nodes that are replaced
    renamed: dict[str, str] = {}
    for tensor in record.tensors:
        if tensor.stored.dtype != "float32":
            (last,) = readers[tensor.name]
            widening |= _check_widening(tensor, last, makers, where)
            renamed[last.output[0]] = tensor.name
    nodes = [node for node in proto.graph.node if not widening.intersection(node.output)]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(small)
    for tensor in record.tensors:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, FLOAT, list(tensor.shape)))


def _check_widening(
    tensor: ModelTensor, last: onnx.NodeProto, makers: dict[str, onnx.NodeProto], where: str
) -> set[str]:
    """Outputs of the nodes that widen a stored tensor, after checking that they are those of `export.onnx_graphs.weights`, and no others."""
    stored, name = tensor.stored, tensor.name

    def described(node: onnx.NodeProto) -> tuple[str, dict[str, object]]:
        return node.op_type, {
            attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute
        }

    def cast(suffix: str, to: int) -> tuple[list[str], tuple[str, dict[str, object]]]:
        return [name + suffix], ("Cast", {"to": to})

    number = onnx.TensorProto.UINT4 if stored.zero_points else onnx.TensorProto.INT4
    parts = (
        [cast(SCALE_SUFFIX, FLOAT), *([cast(ZERO_POINT_SUFFIX, number)] if stored.zero_points else [])]
        if stored.dtype == "int4"
        else []
    )
    if stored.dtype == "int4":
        expected = ("DequantizeLinear", {"axis": 1, "block_size": stored.group_size})
    elif stored.dtype == "int8":
        expected = ("DequantizeLinear", {"axis": 0})
    else:
        expected = ("Cast", {"to": FLOAT})
    casts = [makers[source] for source in last.input[1:]] if parts else []
    direct = [name + SCALE_SUFFIX] if stored.dtype == "int8" else []
    right = (
        described(last) == expected
        and list(last.input) == [name, *(node.output[0] for node in casts), *direct]
        and [(list(node.input), described(node)) for node in casts] == parts
    )
    if not right:
        raise UserError(
            f"{where}: {name} is not widened as {stored.dtype} by {last.name}, as its record says; export the graphs again"
        )
    return {output for node in (*casts, last) for output in node.output}


def _check_parameters(function: relax.Function, graph: Graph, record: GraphsRecord, where: str) -> None:
    """The Relax function takes what the signature says, in its order."""
    found = [(tuple(int(n) for n in p.ty.shape), str(p.ty.dtype)) for p in function.params]
    wanted = [(spec.shape, str(spec.dtype)) for spec in graph.signature.inputs] + [
        (tensor.shape, "float32") for tensor in record.tensors
    ]
    assert found == wanted, f"{where}: imported parameters differ from the signature: {found} against {wanted}"
