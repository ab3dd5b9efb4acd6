"""ONNX to Relax: one function per graph, with every weight a parameter, in the order of the shared weight file."""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass

import onnx

from build.compiler import from_onnx, relax, tvm
from export.graphs import GraphsRecord, OnnxGraphs
from runtime.errors import UserError
from runtime.manifest import Graph, TensorSpec

EXTERNAL = onnx.TensorProto.EXTERNAL


@dataclass(frozen=True)
class RelaxModule:
    """All graphs in one module, each a function of its signature's inputs followed by the weights."""

    module: tvm.IRModule
    record: GraphsRecord

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Weights in the order in which every function takes them, after its inputs."""
        return tuple(spec.name for spec in self.record.weights)


def import_graphs(graphs: OnnxGraphs) -> RelaxModule:
    """Import every graph; weights are declared and never read."""
    functions = {graph.name: _import(graphs, graph) for graph in graphs.record.graphs}
    return RelaxModule(tvm.IRModule(functions), graphs.record)


def _import(graphs: OnnxGraphs, graph: Graph) -> relax.Function:
    path = graphs.onnx_path(graph)
    proto = onnx.load(str(path), load_external_data=False)
    _weights_to_inputs(proto, graphs.record.weights, str(path))
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
    _check_parameters(function, [*graph.signature.inputs, *graphs.record.weights], str(path))
    return function


def _weights_to_inputs(proto: onnx.ModelProto, weights: tuple[TensorSpec, ...], where: str) -> None:
    """Turn initializers that live in the weight file into graph inputs, in the file's order."""
    external = {t.name: t for t in proto.graph.initializer if t.data_location == EXTERNAL}
    small = [t for t in proto.graph.initializer if t.data_location != EXTERNAL]
    missing = [spec.name for spec in weights if spec.name not in external]
    if missing or len(external) != len(weights):
        raise UserError(f"{where} uses {len(external)} external weights, expected the {len(weights)} of the weight file; export again")
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    for spec in weights:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(spec.name, external[spec.name].data_type, list(spec.shape)))


def _check_parameters(function: relax.Function, expected: list[TensorSpec], where: str) -> None:
    """The Relax function takes what the signature says, in its order."""
    found = [(tuple(int(n) for n in p.ty.shape), str(p.ty.dtype)) for p in function.params]
    wanted = [(spec.shape, str(spec.dtype)) for spec in expected]
    assert found == wanted, f"{where}: imported parameters differ from the signature: {found} against {wanted}"
