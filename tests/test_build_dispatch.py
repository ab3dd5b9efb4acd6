"""Dispatch: every region that costs anything is a kernel of ours, and caches are never copied."""

import math
from collections import Counter

import pytest

from build.compiler import relax, tvm
from build.dispatch import dispatch
from build.importer import import_graphs
from build.pipeline import read_report
from build.target import TARGETS, target_spec
from tests.artifacts import CASES

DEFAULT = "TVM default schedule"
CHEAP = {"astype", "expand_dims", "multiply", "cos", "sin", "strided_slice", "add"}  # rotary angles, the last token of a chunk, residuals


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
    expected = {"rolling_attention": layers, "swiglu": layers, "rms_norm": 2 * layers + 1, "linear": 4 * layers + 1, "embedding": 1}
    for graph in record.graphs:
        ours = Counter(row.op for row in report if row.graph == graph.name and row.kernel != DEFAULT)
        assert ours == expected, graph.name


def test_only_cheap_operations_are_left_to_default_schedules(report):
    assert {row.op for row in report if row.kernel == DEFAULT} <= CHEAP


def test_each_weight_is_read_by_one_kernel_in_each_graph(case, report):
    """A tied head is read twice: by the embedding and by the last linear."""
    record = case.graphs.record
    vectors_and_matrices = {spec.name for spec in record.weights if not spec.name.endswith("_scale")}
    for graph in record.graphs:
        labels = Counter(row.label for row in report if row.graph == graph.name and row.op in ("linear", "rms_norm", "embedding"))
        assert set(labels) == vectors_and_matrices
        assert {name for name, count in labels.items() if count > 1} == ({"tok_embeddings.weight"} if record.model.tied_embeddings else set())


def test_reported_bytes_are_the_weights_and_caches(case, report):
    """The decode step of one row reads each stored matrix once, the caches once, and one row of the embedding for each id."""
    record = case.graphs.record
    width = {"float32": 4, "float16": 2, "int8": 1}
    table = next(spec for spec in record.weights if spec.name == "tok_embeddings.weight")
    row = table.shape[1] * width[table.dtype]
    caches = sum(math.prod(spec.shape) * width[spec.dtype] for spec in record.graphs[-1].signature.inputs[2:])
    weights = sum(math.prod(spec.shape) * width[spec.dtype] for spec in record.weights if spec != table or record.model.tied_embeddings)
    norms = 4 * record.model.dim * (2 * record.model.n_layers + 1)
    found = Counter()
    for entry in report:
        if entry.graph == "decode":
            found[entry.op] += entry.bytes
    assert found["rolling_attention"] == caches
    assert found["rms_norm"] == norms
    assert found["embedding"] == record.shape.batch * row
    assert found["linear"] == weights - norms


def test_compiled_functions_make_no_tensor_of_a_caches_shape(case):
    """Past the last pass, the functions allocate nothing with a cache's slots, rolled or joined with the new columns, and copy no cache."""
    record = case.graphs.record
    dispatched = dispatch(import_graphs(case.graphs), "llvm")
    row, spec = TARGETS["llvm"], target_spec(case.config.backend)
    module = dispatched.module
    with row.make(spec):
        for _, passes in row.passes():
            module = tvm.transform.Sequential(list(passes))(module)
    heads, head_dim = record.model.n_kv_heads, record.model.head_dim
    for graph in record.graphs:
        lengths = {n for w in record.model.cache_lens(record.shape.cache_len) for n in (w, w + graph.tokens)}
        banned = {(record.shape.batch, heads, n, head_dim) for n in lengths}
        shapes = allocated_shapes(module[graph.name])
        assert shapes, "no allocation was found, so this test sees nothing"
        assert not banned & shapes


def allocated_shapes(function):
    """Shapes of all tensors that a lowered Relax function allocates."""
    shapes = set()

    def visit(expression):
        if isinstance(expression, relax.Call) and isinstance(expression.op, tvm.ir.Op) and expression.op.name.endswith("alloc_tensor"):
            shapes.update(tuple(int(n) for n in arg.values) for arg in expression.args if isinstance(arg, relax.ShapeExpr))

    relax.analysis.post_order_visit(function, visit)
    return shapes
