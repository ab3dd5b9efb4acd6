"""From ONNX to Relax, without the weights: they become float32 parameters and never enter the compiler.

Each parameter has its weight's name. The record says how a weight is stored; this module checks, node by node, that
the graph widens it in exactly that way.
"""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass

import onnx

from build.compiler import from_onnx, relax, tvm
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.weights.format import ORDER_SUFFIX, ModelTensor
from export.weights.table import format_of
from export.weights.widening import Sizes, Widening
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
    nodes = _Nodes(proto)
    widening: set[str] = set()  # outputs of the nodes that are replaced
    renamed: dict[str, str] = {}
    for tensor in record.tensors:
        expected = format_of(tensor.stored).widening(tensor)
        if expected is not None:
            if not nodes.hold(expected, tensor.name):
                raise UserError(
                    f"{where}: {tensor.name} is not widened as {tensor.stored.dtype} by the nodes that its record "
                    "calls for; export the graphs again"
                )
            widening |= {step.result(tensor.name) for step in expected.steps}
            renamed[expected.steps[-1].result(tensor.name)] = tensor.name
        if tensor.stored.reordered:
            gathered = nodes.reordered(tensor, where)
            widening |= gathered.keys()
            renamed |= gathered
    left = [node for node in proto.graph.node if not widening.intersection(node.output)]
    for node in left:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(left)
    proto.graph.initializer.extend(small)
    for tensor in record.tensors:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, FLOAT, list(tensor.shape)))


ROUNDING = ("Reshape", "Mul", "Round", "Div")  # the operators from rounded activations back to x


class _Nodes:
    """The nodes of one graph: what makes each value, what reads it, and the small constants."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {t.name: t for t in proto.graph.initializer if t.data_location != EXTERNAL}

    def hold(self, widening: Widening, tensor: str) -> bool:
        """Whether the steps of a widening are exactly what makes their results, and nothing else reads their inputs."""
        for step in widening.steps:
            maker = self.makers.get(step.result(tensor))
            attributes = {k: _data_type(v) if isinstance(v, str) else v for k, v in step.attributes.items()}
            if maker is None or _described(maker) != (step.operator, attributes, list(step.input_names(tensor))):
                return False
            for given, name in zip(step.inputs, step.input_names(tensor), strict=True):
                if not (self._holds(given) if isinstance(given, Sizes) else len(self.readers[name]) == 1):
                    return False
        return True

    def _holds(self, sizes: Sizes) -> bool:
        constant = self.constants.get(sizes.name)
        return constant is not None and onnx.numpy_helper.to_array(constant).tolist() == list(sizes.values)

    def reordered(self, tensor: ModelTensor, where: str) -> dict[str, str]:
        """What takes the place of each x whose columns are reordered for a weight: x as it was.

        A kernel takes its columns in that order itself. Raises `UserError` unless each product with the weight has one.
        """
        weight = format_of(tensor.stored).widening(tensor).steps[-1].result(tensor.name)  # type: ignore[union-attr]
        order = tensor.name + ORDER_SUFFIX
        transposed = [node.output[0] for node in self.readers[weight] if node.op_type == "Transpose"]
        products = [node for name in transposed for node in self.readers[name] if node.op_type == "MatMul"]
        gathers = [self._source(product) for product in products]
        found = [g for g in gathers if g is not None and _described(g) == ("Gather", {"axis": -1}, [g.input[0], order])]
        if len(found) != len(products) or len(self.readers[order]) != len(found):
            raise UserError(
                f"{where}: x is not taken in the order of {order} before every product with {tensor.name}; "
                "export the graphs again"
            )
        return {gather.output[0]: gather.input[0] for gather in found}

    def _source(self, product: onnx.NodeProto) -> onnx.NodeProto | None:
        """What makes the first operand of a product, before it may be rounded."""
        node = self.makers.get(product.input[0])
        while node is not None and node.op_type in ROUNDING:
            node = self.makers.get(node.input[0])
        return node


def _data_type(name: str) -> int:
    return onnx.TensorProto.DataType.Value(name)


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
