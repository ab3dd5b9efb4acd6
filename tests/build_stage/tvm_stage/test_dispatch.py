"""Dispatch: every region that costs anything is a kernel of ours, and caches are never copied."""

import math
from collections import Counter

import pytest

from build.compiler import relax, tvm
from build.pipeline import read_report
from build.tvm_stage.dispatch import DEFAULT_SCHEDULE, dispatch
from build.tvm_stage.importer import import_graphs
from build.tvm_stage.target import TVM_TARGETS, target_spec
from runtime.artifact.layouts import PANEL
from runtime.artifact.tensor_file import numpy_dtype
from tests.helpers.artifacts import CASES


@pytest.fixture(scope="module", params=CASES)
def case(request, compile_case):
    return compile_case(request.param)


@pytest.fixture(scope="module")
def report(case):
    (folder,) = case.workspace.glob("library-*")
    return read_report(folder)


def test_every_region_becomes_a_kernel(case, report):
    record = case.graphs.record
    layers = record.model.n_layers
    expected = {"rolling_attention": layers, "linear": 4 * layers + 1, "embedding": 1, "rotation": 2}
    if record.model.hidden_dim % PANEL:
        expected["swiglu"] = layers  # gate and up share a panel, so no product can pair them
    for graph in record.graphs:
        assert Counter(row.op for row in report if row.graph == graph.name) == expected, graph.name


def test_nothing_is_left_to_default_schedules(report):
    assert not [row for row in report if row.kernel == DEFAULT_SCHEDULE]


def test_each_weight_is_read_by_one_kernel_in_each_graph(case, report):
    """A tied head is read twice: by the embedding and by the last linear."""
    record = case.graphs.record
    # norms belong to the products that follow them
    matrices = {tensor.name for tensor in record.tensors if len(tensor.shape) == 2}
    for graph in record.graphs:
        labels = Counter(row.label for row in report if row.graph == graph.name and row.op in ("linear", "embedding"))
        assert set(labels) == matrices
        assert {name for name, count in labels.items() if count > 1} == (
            {"tok_embeddings.weight"} if record.model.tied_embeddings else set()
        )


def test_reported_bytes_are_the_weights_and_caches(case, report):
    """A step of M rows reads each stored matrix once, and for each row a window of columns and a row of the embedding.

    The columns of a ring that no row sees do not count.
    """
    record = case.graphs.record
    table = [spec for spec in record.weights if spec.name.startswith("tok_embeddings.")]
    (graph,) = (graph for graph in record.graphs if graph.name == "step_1")
    caches = sum(nbytes(spec) for spec in graph.signature.caches)
    weights = sum(nbytes(spec) for spec in record.weights if spec not in table or record.model.tied_embeddings)
    for rows in record.shape.step_rows:
        found = Counter()
        for entry in report:
            if entry.graph == f"step_{rows}":
                found[entry.op] += entry.bytes
        assert found["rolling_attention"] == rows * caches
        assert found["embedding"] == rows * sum(map(nbytes, table)) // record.model.vocab_size
        assert found["linear"] == weights


def nbytes(spec):
    return math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize


@pytest.mark.parametrize("case_name", ["windowed", "int8"])
def test_compiled_functions_make_no_tensor_of_a_caches_shape(compile_case, case_name):
    """After the last pass, the functions copy no cache and allocate nothing with a cache's slots.

    Neither is a cache allocated when it is rolled, nor when it is joined with the new columns.
    """
    case = compile_case(case_name)
    record = case.graphs.record
    row, spec = TVM_TARGETS["llvm"], target_spec(case.config.backend)
    dispatched = dispatch(import_graphs(case.graphs), spec)
    module = dispatched.module
    with row.make(spec):
        for _, passes in row.passes():
            module = tvm.transform.Sequential(list(passes))(module)
    heads, head_dim = record.model.n_kv_heads, record.model.head_dim
    rings = set(record.model.ring_lens(record.shape.cache_len, record.shape.longest_call))
    for graph in record.graphs:
        windows = set(record.model.cache_lens(record.shape.cache_len))
        lengths = rings | windows | {n + graph.tokens for n in windows}
        banned = {(count, heads, n, head_dim) for n in lengths for count in (graph.rows, record.shape.slots)}
        shapes = allocated_shapes(module[graph.name])
        assert shapes, "no allocation was found, so this test sees nothing"
        assert not banned & shapes


def allocated_shapes(function):
    """Shapes of all tensors that a lowered Relax function allocates."""
    shapes = set()

    def visit(expression):
        if (
            isinstance(expression, relax.Call)
            and isinstance(expression.op, tvm.ir.Op)
            and expression.op.name.endswith("alloc_tensor")
        ):
            shapes.update(
                tuple(int(n) for n in arg.values) for arg in expression.args if isinstance(arg, relax.ShapeExpr)
            )

    relax.analysis.post_order_visit(function, visit)
    return shapes
