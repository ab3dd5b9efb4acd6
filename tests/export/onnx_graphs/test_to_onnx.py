"""Exported graphs: onnxruntime gives the results of StaticModel with the stored weights.

The files hold what they should.
"""

import numpy as np
import onnx
import pytest

from export.weights.stored import WEIGHTS_FILE
from runtime.artifact.tensor_file import TensorFile, bits_dtype, numpy_dtype
from tests.helpers import reference
from tests.helpers.artifacts import (
    CASES,
    bound,
    dequantized,
    effective_weights,
    onnx_shifted,
    random_ids,
    static_model,
    torch_shifted,
)

EXTERNAL = onnx.TensorProto.EXTERNAL
MACHINE_WORDS = (b"/work", b"/root", b"/home", b"/tmp", b"site-packages", b".py", b"Traceback")


@pytest.fixture(scope="module", params=CASES)
def graphs(request, compile_case):
    return compile_case(request.param).graphs


def protos(graphs):
    return {graph.name: onnx.load(graphs.onnx_path(graph), load_external_data=False) for graph in graphs.record.graphs}


def test_onnxruntime_gives_what_torch_gives(graphs):
    """Logits and every cache agree.

    This covers every chunk size, steps of every number of rows, positions past the window, padding, and rows of
    different lengths.
    """
    record = graphs.record
    cache_lens = record.model.cache_lens(record.shape.cache_len)
    module = static_model(record.model, cache_lens, effective_weights(graphs), graphs.rounded_weights())
    limit = bound(graphs)
    chunks = [*reversed(record.shape.prefill_chunks), record.shape.prefill_chunks[0]]
    longest = sum(chunks) + 1
    for count, sizes in ((1, [*chunks, 1, 1, 1]), *((rows, [1] * longest) for rows in record.shape.step_rows)):
        ours, theirs = torch_shifted(module, count, record.cache_dtype), onnx_shifted(graphs, count)
        rows = [random_ids(max(longest - 3 * row, 1), record.model.vocab_size, row) for row in range(count)]
        assert reference.difference(theirs.feed(rows, sizes), ours.feed(rows, sizes)) <= limit
        assert [cache.dtype for cache in theirs.caches] == [cache.dtype for cache in ours.caches]
        assert theirs.caches[0].dtype == bits_dtype(record.cache_dtype)
        for found, expected in zip(dequantized(theirs.caches), dequantized(ours.caches), strict=True):
            assert reference.difference(found, expected) <= limit


def test_boundary_is_the_signature(graphs):
    for graph in graphs.record.graphs:
        proto = onnx.load(graphs.onnx_path(graph), load_external_data=False)
        for values, specs in (
            (proto.graph.input, graph.signature.inputs),
            (proto.graph.output, graph.signature.outputs),
        ):
            found = [
                (
                    v.name,
                    tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
                    onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type),
                )
                for v in values
            ]
            assert found == [(spec.name, spec.shape, numpy_dtype(spec.dtype)) for spec in specs]


def test_no_dimension_is_dynamic(graphs):
    """After onnx's own shape inference, every value has a shape made of numbers."""
    for graph in graphs.record.graphs:
        inferred = onnx.shape_inference.infer_shapes(
            onnx.load(graphs.onnx_path(graph)), strict_mode=True, data_prop=True
        ).graph
        shapes = {
            v.name: v.type.tensor_type.shape.dim for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        for node in inferred.node:
            for name in node.output:
                assert all(d.HasField("dim_value") and d.dim_value > 0 for d in shapes[name]), (graph.name, name)


def test_weights_are_shared_by_name(graphs):
    """Every graph refers to all tensors of the one weight file, by name and offset.

    It has no tensor of its own beyond a kilobyte.
    """
    stored = TensorFile.open(graphs.folder / WEIGHTS_FILE).tensors
    assert set(stored) == {spec.name for spec in graphs.record.weights}
    for proto in protos(graphs).values():
        external = {
            t.name: {entry.key: entry.value for entry in t.external_data}
            for t in proto.graph.initializer
            if t.data_location == EXTERNAL
        }
        assert set(external) == set(stored)
        for name, place in external.items():
            assert place["location"] == WEIGHTS_FILE
            assert (int(place["offset"]), int(place["length"])) == (stored[name].offset, stored[name].nbytes)
        assert all(t.ByteSize() < 1024 for t in proto.graph.initializer if t.data_location != EXTERNAL)


def test_checkpoint_tensors_keep_their_names_and_values(compile_case):
    case = compile_case("windowed")
    stored = case.graphs.weights()
    assert set(stored.tensors) == {
        *(
            f"layers.{i}.{name}.weight"
            for i in range(2)
            for name in ("attention_norm", "attention.wqkv", "attention.wo", "ffn_norm")
        ),
        *(f"layers.{i}.feed_forward.{name}.weight" for i in range(2) for name in ("w13", "w2")),
        *("tok_embeddings.weight", "norm.weight", "output.weight"),
    }
    source = TensorFile.open(case.folder / "checkpoint" / "model.safetensors")
    parts = [source.read(f"model.layers.1.self_attn.{x}_proj.weight") for x in "qkv"]
    assert np.array_equal(stored.read("layers.1.attention.wqkv.weight"), np.concatenate(parts))
    assert np.array_equal(stored.read("output.weight"), source.read("lm_head.weight"))


def test_narrow_weights_are_widened_in_the_graph(compile_case):
    for name, operator in (("int8", "DequantizeLinear"), ("fp16", "Cast")):
        graphs = compile_case(name).graphs
        narrow = {spec.name for spec in graphs.record.weights if len(spec.shape) == 2}
        for proto in protos(graphs).values():
            readers = {node.op_type for node in proto.graph.node for weight in node.input if weight in narrow}
            assert readers == {operator}


def test_files_tell_nothing_about_this_machine(graphs):
    for path in graphs.folder.glob("*.onnx"):
        content = path.read_bytes()
        assert not [word for word in MACHINE_WORDS if word in content]


def test_onnx_accepts_every_graph(graphs):
    for graph in graphs.record.graphs:
        onnx.checker.check_model(str(graphs.onnx_path(graph)), full_check=True)
