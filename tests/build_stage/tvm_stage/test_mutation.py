"""Mutations: a graph that lost its window, or anything else that the attention kernel assumes, must not compile."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from build.tvm_stage.dispatch import Boundary, dispatch, find_regions, weights_of
from build.tvm_stage.importer import import_graphs
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, OnnxGraphs
from export.stage import ROOT
from export.workspace import seal
from runtime.artifact.manifest import TargetSpec
from runtime.errors import UserError
from tests.helpers.artifacts import WINDOW

Graph = onnx.GraphProto
TARGET = TargetSpec(kind="llvm", dtype="fp32", cpu="x86-64-v3", cpu_features=("avx2", "fma"))


def producer(graph: Graph, name: str) -> onnx.NodeProto:
    (node,) = [node for node in graph.node if name in node.output]
    return node


def only(graph: Graph, operator: str) -> onnx.NodeProto:
    (node,) = [node for node in graph.node if node.op_type == operator]
    return node


def first(graph: Graph, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == operator)


def set_constant(graph: Graph, node: onnx.NodeProto, index: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give another constant to one input of one node, and to no other node."""
    (old,) = [t for t in graph.initializer if t.name == node.input[index]]
    changed = np.array(change(numpy_helper.to_array(old)), numpy_helper.to_array(old).dtype)
    graph.initializer.append(numpy_helper.from_array(changed, f"mutated_{len(graph.initializer)}"))
    node.input[index] = graph.initializer[-1].name


def outer_and(graph: Graph) -> onnx.NodeProto:
    """And(And(written, causal), recent)."""
    conjunctions = {node.output[0]: node for node in graph.node if node.op_type == "And"}
    return next(node for node in conjunctions.values() if node.input[0] in conjunctions)


def window_made(size: int):
    def mutate(graph: Graph) -> None:
        oldest = producer(graph, only(graph, "Greater").input[1])
        assert oldest.op_type == "Sub"
        set_constant(graph, oldest, 1, lambda _: size)

    return mutate


def window_left_out(graph: Graph) -> None:
    conjunction = outer_and(graph)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == conjunction.output[0]:
                node.input[i] = conjunction.input[0]
    graph.node.remove(conjunction)


def causality_left_out(graph: Graph) -> None:
    conjunction = outer_and(graph)
    conjunction.input[0] = producer(graph, conjunction.input[0]).input[0]


def not_rolled(kind: str):
    def mutate(graph: Graph) -> None:
        node = producer(graph, f"present.0.{kind}")
        assert node.op_type == "Slice"
        set_constant(graph, node, 1, lambda start: start * 0)
        set_constant(graph, node, 2, lambda end: end * 0 + WINDOW)

    return mutate


def ages_shifted(graph: Graph) -> None:
    (node,) = [node for node in graph.node if any(name.endswith(f"slot_ages_{WINDOW}") for name in node.input)]
    set_constant(graph, node, 1, lambda ages: ages - 1)


def padding_seen(graph: Graph) -> None:
    set_constant(graph, only(graph, "GreaterOrEqual"), 1, lambda zero: zero - 5)


def masked_with_little(graph: Graph) -> None:
    set_constant(graph, first(graph, "Where"), 2, lambda score: score * 0 - 1)


def softmax_over_queries(graph: Graph) -> None:
    (axis,) = [attribute for attribute in first(graph, "Softmax").attribute if attribute.name == "axis"]
    axis.i = -2


def other_heads_share(graph: Graph) -> None:
    """Query heads 0 2 and 1 3 share a key head, instead of 0 1 and 2 3.

    With as many groups as heads in one group, every shape stays the same.
    """
    for kind in ("key", "value"):
        (joined,) = [
            node for node in graph.node if node.op_type == "Concat" and f"past_key_values.0.{kind}" in node.input
        ]
        (shared,) = [node for node in graph.node if node.op_type == "Unsqueeze" and node.input[0] == joined.output[0]]
        set_constant(graph, shared, 1, lambda axis: axis - 1)
    del graph.value_info[:]  # it states the old shapes


def caches_swapped(graph: Graph) -> None:
    """The graph returns the key cache where the value cache belongs."""
    key, value = producer(graph, "present.0.key"), producer(graph, "present.0.value")
    key.output[0], value.output[0] = value.output[0], key.output[0]


MUTATIONS = {
    "window-huge": window_made(2**31),
    "window-one-more": window_made(WINDOW + 1),
    "window-one-less": window_made(WINDOW - 1),
    "window-left-out": window_left_out,
    "causality-left-out": causality_left_out,
    "key-not-rolled": not_rolled("key"),
    "value-not-rolled": not_rolled("value"),
    "slot-ages-shifted": ages_shifted,
    "padding-seen": padding_seen,
    "mask-finite-and-small": masked_with_little,
    "softmax-over-queries": softmax_over_queries,
    "other-heads-share": other_heads_share,
    "caches-swapped": caches_swapped,
}


def mutated(graphs: OnnxGraphs, name: str, mutate, folder) -> OnnxGraphs:
    """A copy of exported graphs, one of them changed and still accepted by onnx."""
    shutil.copytree(graphs.folder, folder)
    path = folder / f"{name}.onnx"
    proto = onnx.load(path, load_external_data=False)
    mutate(proto.graph)
    onnx.save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)
    return OnnxGraphs.open(folder / graphs.path.name)


def regions_of(module, graph):
    """The regions that dispatch finds for the CPU."""
    function = module.module[graph.name]
    (compiled,) = (compiled for compiled in module.record.functions if compiled.name == graph.name)
    weights = weights_of(module.record, function, graph, TARGET.kind)
    return find_regions(module, graph, weights, Boundary.of(function, graph, compiled))


def of_step(graphs):
    """The graph of a step of one row."""
    (graph,) = (graph for graph in graphs.record.graphs if graph.name == "step_1")
    return graph


@pytest.fixture(scope="module")
def case(compile_case):
    return compile_case("windowed")


@pytest.mark.parametrize("name", ["step_1", "prefill_4"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_graph_is_refused(case, tmp_path, name, mutation):
    graphs = mutated(case.graphs, name, MUTATIONS[mutation], tmp_path / "graphs")
    module = import_graphs(graphs)
    (graph,) = [graph for graph in graphs.record.graphs if graph.name == name]
    with pytest.raises(UserError, match=rf"^{name}: past_key_values\.0\.(key|value) .*window"):
        regions_of(module, graph)
    (intact,) = [graph for graph in graphs.record.graphs if graph.name == "prefill_16"]
    assert regions_of(module, intact)  # the other graphs of the same folder still match


@pytest.mark.parametrize("name", ["step_1", "prefill_4"])
def test_nothing_changed_is_accepted(case, tmp_path, name):
    graphs = mutated(case.graphs, name, lambda _: None, tmp_path / "graphs")
    (graph,) = [graph for graph in graphs.record.graphs if graph.name == name]
    assert regions_of(import_graphs(graphs), graph)


def test_a_head_that_reads_another_token_than_the_last_is_refused(case, tmp_path):
    """A prompt may be padded behind its last token, which the kernel finds by an index in place of that slice."""

    def read_the_first(graph: Graph) -> None:
        last = [node for node in graph.node if node.op_type == "Slice"][-1]
        set_constant(graph, last, 1, lambda start: start * 0)
        set_constant(graph, last, 2, lambda end: end * 0 + 1)

    graphs = mutated(case.graphs, "prefill_4", read_the_first, tmp_path / "graphs")
    (graph,) = (graph for graph in graphs.record.graphs if graph.name == "prefill_4")
    with pytest.raises(UserError, match=r"^prefill_4: the head does not read the last token"):
        regions_of(import_graphs(graphs), graph)


def dequantized_by_column(graph: Graph) -> None:
    """int8 with its scales taken for scales of columns."""
    (axis,) = [a for a in producer(graph, "layers.0.attention.wqkv.weight.float32").attribute if a.name == "axis"]
    axis.i = 1


def in_larger_groups(graph: Graph) -> None:
    """int4 with groups of another size."""
    (size,) = [a for a in producer(graph, "layers.0.attention.wo.weight.float32").attribute if a.name == "block_size"]
    size.i = 16


def scales_swapped(graph: Graph) -> None:
    """Two matrices of one shape, each with the other's scales."""
    one, other = (producer(graph, f"layers.{i}.feed_forward.w2.weight.float32") for i in (0, 1))
    one.input[1], other.input[1] = other.input[1], one.input[1]


@pytest.mark.parametrize(
    ("case_name", "mutation", "name"),
    [
        ("int8", dequantized_by_column, "layers.0.attention.wqkv"),
        ("int4", in_larger_groups, "layers.0.attention.wo"),
        ("int4", scales_swapped, "layers.0.feed_forward.w2"),
    ],
)
def test_weights_that_are_widened_in_another_way_are_refused(compile_case, tmp_path, case_name, mutation, name):
    """The record says how weights are stored.

    A graph that reads them otherwise would be compiled to something other than what onnxruntime runs.
    """
    folder = tmp_path / "graphs"
    graphs = compile_case(case_name).graphs
    shutil.copytree(graphs.folder, folder)
    proto = onnx.load(folder / "step_1.onnx", load_external_data=False)
    mutation(proto.graph)
    onnx.save(proto, folder / "step_1.onnx")
    with pytest.raises(
        UserError,
        match=rf"step_1.onnx: {name}.weight is not widened as int. by the nodes that its record calls for; export the "
        "graphs again",
    ):
        import_graphs(OnnxGraphs.open(folder / graphs.path.name))


def levels_changed(graph: Graph) -> None:
    """Tokens rounded to fewer levels than the kernels round them to."""
    (levels,) = [t for t in graph.initializer if t.name.startswith("dynamic.levels.")]
    levels.CopyFrom(numpy_helper.from_array(np.array(63, np.float32), levels.name))


def groups_halved(graph: Graph) -> None:
    """Half as many numbers share a scale as the kernels take together."""
    (groups,) = [t for t in graph.initializer if t.name == "sizes.1x1x2x64"]
    groups.CopyFrom(numpy_helper.from_array(np.array([1, 1, 4, 32]), groups.name))
    del graph.value_info[:]  # shapes of later values, which the checker then infers


def cast_to_float16(graph: Graph) -> None:
    """Tokens rounded to another type than the kernels round them to."""
    casts = [node for node in graph.node if node.op_type == "Cast" and node.output[0].endswith(".narrowed")]
    casts[0].attribute[0].i = TensorProto.FLOAT16
    del graph.value_info[:]


@pytest.mark.parametrize(
    ("case_name", "mutation"), [("int4", levels_changed), ("int8_dynamic", groups_halved), ("bf16", cast_to_float16)]
)
def test_tokens_rounded_in_another_way_are_refused(compile_case, tmp_path, case_name, mutation):
    graphs = mutated(compile_case(case_name).graphs, "step_1", mutation, tmp_path / "graphs")
    with pytest.raises(UserError, match=r"reads the weight .* in a form that no kernel supports"):
        dispatch(import_graphs(graphs), TARGET)


def levels_of_caches_changed(graph: Graph) -> None:
    """Numbers rounded to more levels than a byte's half has room for."""
    limit = [node for node in graph.node if node.op_type == "Less"][-1]
    set_constant(graph, limit, 1, lambda levels: levels + 1)


def smallest_scale_changed(graph: Graph) -> None:
    """Groups of almost equal numbers with another scale than kernels give them."""
    limit = [node for node in graph.node if node.op_type == "Greater"][-1]
    set_constant(graph, limit, 1, lambda smallest: 2 * smallest)


def halves_swapped(graph: Graph) -> None:
    """The two numbers of each byte the other way round, when they are read."""
    high = first(graph, "Floor").output[0]
    joined = next(node for node in graph.node if node.op_type == "Concat" and high in node.input)
    joined.input[0], joined.input[1] = joined.input[1], joined.input[0]


def scales_taken_for_minima(graph: Graph) -> None:
    """The caches of scales and of minima, which have the same shape, the other way round."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in ("past_key_values.0.key_scale", "past_key_values.0.key_minimum"):
                other = "minimum" if name.endswith("scale") else "scale"
                node.input[i] = f"past_key_values.0.key_{other}"


@pytest.mark.parametrize(
    "mutation", [levels_of_caches_changed, smallest_scale_changed, halves_swapped, scales_taken_for_minima]
)
def test_int4_caches_rounded_in_another_way_are_refused(compile_case, tmp_path, mutation):
    graphs = mutated(compile_case("int4_cache").graphs, "step_1", mutation, tmp_path / "graphs")
    with pytest.raises(UserError, match=r"^step_1: past_key_values\.0\.(key|value)\w* "):
        regions_of(import_graphs(graphs), of_step(graphs))


def largest_changed(graph: Graph) -> None:
    """Numbers beyond the largest of another type."""
    limit = [node for node in graph.node if node.op_type == "Greater"][-1]
    set_constant(graph, limit, 1, lambda largest: 128 * largest)


def other_float8(graph: Graph) -> None:
    """New columns rounded to another type than the cache's, whose numbers are widened likewise."""
    casts = [node for node in graph.node if node.op_type == "Cast" and not node.output[0].startswith("present")]
    to_float8 = [cast.attribute[0] for cast in casts if cast.attribute[0].i == TensorProto.FLOAT8E4M3FN]
    to_float8[0].i = TensorProto.FLOAT8E5M2
    del graph.value_info[:]


def not_rounded(graph: Graph) -> None:
    """New columns that attention reads as they are computed, but for their limits."""
    appended = producer(graph, producer(graph, producer(graph, "present.0.key").input[0]).input[0])
    assert appended.op_type == "Concat"
    appended.input[1] = producer(graph, producer(graph, appended.input[1]).input[0]).input[0]


@pytest.mark.parametrize("mutation", [largest_changed, other_float8, not_rounded])
def test_fp8_caches_rounded_in_another_way_are_refused(compile_case, tmp_path, mutation):
    graphs = mutated(compile_case("fp8_cache").graphs, "step_1", mutation, tmp_path / "graphs")
    with pytest.raises(UserError, match=r"^step_1: past_key_values\.0\.(key|value) is not used by"):
        regions_of(import_graphs(graphs), of_step(graphs))


def test_another_scale_is_no_error_and_reaches_the_kernel(case, tmp_path):
    """The kernel takes the factor of the scores from the graph.

    So a change of it is followed, in the layer where it was made.
    """

    def halve(graph: Graph) -> None:
        scaled = producer(graph, first(graph, "Where").input[1])
        assert scaled.op_type == "Mul"
        set_constant(graph, scaled, 1, lambda scale: scale / 2)

    graphs = mutated(case.graphs, "step_1", halve, tmp_path / "graphs")
    graph = of_step(graphs)
    regions = regions_of(import_graphs(graphs), graph).values()
    assert [region.arguments[0].scale for region in regions if region.op == "rolling_attention"] == [
        16**-0.5 / 2,
        16**-0.5,
    ]


def test_the_command_refuses_a_graph_without_a_window(case, tmp_path):
    """`python -m build` on a finished export whose step graph lost its window.

    The result is status 2, one sentence and no artifact.
    """
    folder = tmp_path / "copy"
    shutil.copytree(case.folder, folder)
    shutil.rmtree(folder / "out" / case.name)
    for library in (folder / "out" / ".work" / case.name).glob("library-*"):
        shutil.rmtree(library)
    path = folder / case.graphs.folder.relative_to(case.folder) / "step_1.onnx"
    proto = onnx.load(path, load_external_data=False)
    window_left_out(proto.graph)
    onnx.save(proto, path)
    (record,) = path.parent.glob("graphs-*.json")
    seal(record.with_suffix(CONTENTS_SUFFIX), [record, *path.parent.glob("*.onnx")])  # as an export that is wrong would
    command = [sys.executable, "-m", "build", f"{case.name}.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for words in ("step_1", "past_key_values.0.key", "window", "export"):
        assert words in message
    assert "Traceback" not in result.stderr
    assert not (folder / "out" / case.name).exists()
