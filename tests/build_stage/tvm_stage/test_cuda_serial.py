"""The CUDA kernels, put together into a whole model as for a GPU, against onnxruntime on the same graphs.

They run one thread after the other.
"""

from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType

from runtime.artifact.consistency import LIBRARY_FILE
from runtime.engines.side_by_side import SideBySide
from runtime.engines.tvm_runtime import kernel_of, load_runtime, open_library
from runtime.gpu_check import kernel_timing
from runtime.verify import verify
from tests.helpers.artifacts import CACHE_LEN, WINDOW, Case, bound, exported
from tests.helpers.gguf_files import write_gguf
from tests.helpers.onnx_agreement import check_rows_of_all_slots, check_steps_and_prefills
from tests.helpers.serial import Host, compile_serial, serial_engine
from tests.helpers.tiny import write_tiny_mistral

LONGEST = 2 * WINDOW + 3


BLOCKS, GGUF = "Q4_1", "model.gguf"
SMALL = {"sliding_window": WINDOW, "num_hidden_layers": 1}
EXTRA_CASES = {
    # chunks of many rows, for tensor cores, and a head_dim for attention on tensor cores
    "int4": Case(
        SMALL,
        {
            "shape": {"prefill_chunk": [16, 6], "cache_len": CACHE_LEN},
            "quantize": {"scheme": "int4", "symmetric": False},
            "backend": {"target": "llvm", "dtype": "fp16"},
        },
    ),
    "fp16": Case(
        {**SMALL, "head_dim": 32},
        {
            "shape": {"prefill_chunk": [32, 6], "cache_len": CACHE_LEN, "slots": 2},
            "backend": {"target": "llvm", "dtype": "fp16"},
        },
    ),
    BLOCKS: Case(
        {},
        {
            "frontend": {"checkpoint": GGUF, "overrides": {"sliding_window": WINDOW}},
            "shape": {"prefill_chunk": [16, 6], "cache_len": CACHE_LEN},
            "quantize": {"scheme": "source"},
            "backend": {"target": "cuda", "arch": ["sm_80"], "dtype": "fp16"},  # for the CPU, activations are rounded
        },
    ),
    "int8": Case(
        SMALL,
        {
            "shape": {"prefill_chunk": 16, "cache_len": CACHE_LEN},
            "quantize": {"scheme": "int8", "keep": ["first"], "keep_scheme": "fp8"},
            "backend": {"target": "llvm", "dtype": "fp16"},
        },
    ),
}


# float32 with a window and with fp8 and int4 caches; float16, int8 beside fp8, int4 with zero points and blocks of a
# GGUF with minimums, whose prefills are products on tensor cores
@pytest.fixture(scope="module", params=["windowed", "fp8_cache", "int4_cache", *EXTRA_CASES])
def case(request, compile_case, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in EXTRA_CASES:
        if request.param == BLOCKS:
            write_tiny_mistral(folder / "case" / "checkpoint", intermediate_size=128)
            write_gguf(folder / "case" / GGUF, folder / "case" / "checkpoint", GGMLQuantizationType[BLOCKS])
        config, graphs = exported(request.param, folder / "case", EXTRA_CASES[request.param])
    else:
        config, graphs = compile_case(request.param).config, compile_case(request.param).graphs
    manifest = compile_serial(graphs, folder, dtype=config.backend.dtype)
    return SimpleNamespace(graphs=graphs, manifest=manifest, folder=folder, engine=serial_engine(manifest, folder))


def test_every_kernel_is_within_its_bound(case, monkeypatch):
    """The references are those that check a GPU."""
    monkeypatch.setattr(kernel_timing, "COLD_BYTES", 1)
    library = open_library(load_runtime(1), case.folder / LIBRARY_FILE)
    rows = [
        kernel_timing.check_kernel(
            call, kernel_of(library, call.kernel), Host(), half=case.manifest.target.dtype == "fp16"
        )
        for call in case.manifest.calls
    ]
    ops = {"linear", "rolling_attention", "embedding", "rotation", "sample"}
    assert {call.op for call in case.manifest.calls} == ops
    assert {row.kernel: row.error for row in rows if not row.error <= 1} == {}
    assert all(row.seconds > 0 and row.bytes > 0 for row in rows)
    assert any(row.error > 0 for row in rows)  # something was compared


def test_tokens_one_by_one_and_at_once_follow_onnxruntime(case):
    check_steps_and_prefills(case.graphs, case.engine, WINDOW, LONGEST, bound(case.graphs))


def test_rows_of_all_slots_follow_onnxruntime(case):
    check_rows_of_all_slots(case.graphs, case.engine, LONGEST, bound(case.graphs))


def test_it_agrees_with_itself(case):
    assert [check for check in verify(SideBySide(case.engine, case.engine.slots)) if not check.ok] == []
