"""One layer of a 7B model with embeddings and head, for CUDA, without its weights.

Every kernel fits, none spills, and each weight is loaded once.
"""

from math import prod

import pytest

from build.gpucheck import ENCODINGS
from build.kernels.cuda import tiling
from build.pipeline import build_library, read_report
from build.tools import random_checkpoint
from build.tools.random_checkpoint import SEVEN_B, headers
from build.tvm_stage.cuda import usage_of
from build.tvm_stage.dispatch import DEFAULT_SCHEDULE, dispatch
from build.tvm_stage.importer import import_graphs
from build.tvm_stage.machine_code import check_machine_code
from build.tvm_stage.target import target_spec
from export.configuration.config import load_config
from export.onnx_graphs.graphs import OnnxGraphs, record_path
from export.onnx_graphs.tracing import trace_graphs
from export.results import export_record
from export.weights.stored import WEIGHTS_FILE
from runtime.artifact.consistency import LIBRARY_FILE
from runtime.artifact.tensor_file import TensorFileWriter, numpy_dtype
from tests.helpers.traffic import loaded_bytes

TWO = ("sm_80", "sm_90a")
# By the scheme, or by what a quantized checkpoint stores. int4 has the most architectures, since registers are scarcest
# there; each takes seconds.
ARCHS = {"none": TWO, "int8": ("sm_90a",), "int4": ("sm_80", "sm_90a", "sm_100"), "q4_1": ("sm_80",)}
CONFIG = """
name: layer
frontend: {{checkpoint: none}}
shape: {{prefill_chunk: 128, cache_len: 4096}}
quantize: {{scheme: {scheme}}}
backend: {{target: cuda, arch: [{archs}]}}
"""
SHARED_LIMIT = 48 * 1024  # bytes that every architecture gives a block without asking
REGISTERS = 65536  # per multiprocessor
# keeps its outputs in registers, and has few threads for that reason
PREFILL_ATTENTION, PREFILL_ATTENTION_THREADS = ("rolling_attention_0_kernel_1", 128)
THREADS = 512  # per block, or fewer, except where a block needs few registers


@pytest.fixture(scope="module", params=ARCHS)
def built(request, tmp_path_factory):
    """The layer's graphs, with weights of zeros, and the library's folder."""
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "layer.yaml"
    encoding = ENCODINGS.get(request.param)
    scheme = request.param if encoding is None else "source"
    path.write_text(CONFIG.format(scheme=scheme, archs=", ".join(ARCHS[request.param])))
    config = load_config(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_checkpoint.SHAPES, "layer", {**SEVEN_B, "num_hidden_layers": 1})
        record = export_record(config, headers("layer", {}, encoding=encoding))
    with TensorFileWriter(folder / WEIGHTS_FILE, record.weights) as writer:
        writer.leave_zero()
    trace_graphs(record, folder)
    assert record.quantization.scheme == scheme
    graphs, spec = OnnxGraphs(record_path(folder, "7b"), record), target_spec(config.backend)
    build_library(graphs, spec, folder, dump=None)
    return graphs, spec, folder


def test_there_is_machine_code_for_every_architecture_and_nothing_spills(built):
    _, spec, folder = built
    check_machine_code(folder / LIBRARY_FILE, spec.arch)
    usage = usage_of(folder)
    assert {row.arch for row in usage} == set(spec.arch)
    assert [row.kernel for row in usage if row.spill_bytes] == []
    assert all(row.shared_bytes <= SHARED_LIMIT for row in usage)
    products = tuple(f"{row.kernel}_" for row in read_report(folder) if row.graph != "step_1" and row.op == "linear")
    for row in usage:
        threads = tiling.THREADS if row.kernel.startswith(products) else THREADS
        assert row.kernel == PREFILL_ATTENTION or 0 < row.registers * threads <= REGISTERS
    attention = [row for row in usage if row.kernel == PREFILL_ATTENTION]
    assert attention
    # two blocks per multiprocessor
    assert all(2 * row.registers * PREFILL_ATTENTION_THREADS <= REGISTERS for row in attention)


def test_no_operation_is_left_to_a_default_schedule(built):
    graphs, _, folder = built
    rows = read_report(folder)
    read = {row.label for row in rows if row.graph == "step_1"}
    assert {tensor.name for tensor in graphs.record.tensors if len(tensor.shape) == 2} <= read
    assert {row.op for row in rows if row.kernel == DEFAULT_SCHEDULE} == set()


def test_a_token_loads_each_weight_once(built):
    """The loads of decode's products, counted from their loops, are within 5 % of the stored bytes.

    Groups of 32 have 0.6 % of rereads at most.
    """
    graphs, spec, _ = built
    dispatched = dispatch(import_graphs(graphs), spec)
    calls = [row for row in dispatched.report if row.graph == "step_1" and row.op == "linear"]
    assert {row.label for row in calls} == {
        tensor.name for tensor in graphs.record.tensors if len(tensor.shape) == 2
    } - {"tok_embeddings.weight"}
    loaded = least = 0
    for row in calls:
        bytes_of = loaded_bytes(dispatched.module[row.kernel])
        loaded += sum(bytes_of[name] for name in ("w", "s", "z"))
        # a norm's gain, which is read from a cache except for the first time
        least += row.bytes - (4 * graphs.record.model.dim if bytes_of["gain"] else 0)
    stored = sum(
        prod(s.shape) * numpy_dtype(s.dtype).itemsize
        for s in graphs.record.weights
        if len(s.shape) == 2 and "tok_embeddings" not in s.name
    )
    assert 0 < least <= loaded <= 1.05 * least
    assert abs(least / stored - 1) < 0.01  # the report's figure is the weight file's, except for scales, one per row
