"""Every kernel of one layer of known models in their full size, as `make gpucheck` compiles and checks them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from build.gpucheck import CheckSpec, check_config, compiled_check
from export.job import Job
from runtime.engines.tvm_runtime import kernel_of, load_runtime, open_library
from runtime.gpu_check.folder import checked_manifest
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.report import label_of
from tests.emulator.gpu import Run
from tests.emulator.kernels import EmulatedKernels
from tests.emulator.matrix.rows import Row, rows_of

CONFIG = Path("yaml/fp16.yaml")
SETTINGS = ("backend.arch=[sm_80]", "shape.cache_len=4096")
ROWS, FEW_ROWS = "shape.prefill_chunk=[128,5]", "shape.prefill_chunk=[32,5]"
# Models with what their weights are stored as, and further settings.
CHECKS = (
    ("7b/1:none", (ROWS,)),
    ("7b/1:int8", (ROWS,)),
    ("7b/1:int4", (ROWS,)),
    *((f"7b/1:{scheme}", ("shape.prefill_chunk=[264,40]", "backend.arch=[sm_90a]")) for scheme in ("none", "int4")),
    ("7b/1:q4_1", (FEW_ROWS,)),
    ("7b/1:q6_k", (FEW_ROWS,)),
    ("7b/1:gptq", (FEW_ROWS,)),
    ("7b/1:fp8_blocks", (FEW_ROWS, "quantize.cache=fp8")),
    ("7b/1:int8", (FEW_ROWS, "shape.slots=8", "quantize.cache=int8")),
    ("7b/1:int4", (FEW_ROWS, "shape.slots=8", "quantize.cache=int4")),
    ("mixtral-8x7b/1:none", (FEW_ROWS,)),
    ("tiny/2:none", (FEW_ROWS, "backend.dtype=fp32")),
)
RUNS = (Run("reverse"), Run("random", 1, checked=True), Run("random", 2, adverse=True))


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each run of each kernel."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        emulate_nvcc(patch, kernels.module)
        for i, (text, more) in enumerate(CHECKS):
            spec = CheckSpec.parse(text)
            config = check_config(Job.load(CONFIG, [*SETTINGS, *more]), spec)
            yield from _rows_of_check(
                kernels, " ".join([text, *more]), compiled_check(config, spec, Path(folder, str(i)))
            )


def emulate_nvcc(patch: pytest.MonkeyPatch, module: Callable[[str], bytes]) -> None:
    """Take what `module` makes of a source for machine code, where the project would let nvcc compile it."""
    patch.setattr("build.tvm_stage.cuda.compile_fatbin", lambda _nvcc, source, _archs: (module(source), []))
    patch.setattr("build.tvm_stage.target.check_machine_code", lambda _library, _archs: None)


def _rows_of_check(kernels: EmulatedKernels, check: str, folder: Path) -> Iterator[Row]:
    manifest = checked_manifest(folder)
    library = open_library(load_runtime(1), folder / "library.so")
    for call in manifest.calls:
        case = case_of(call, half=manifest.target.dtype == "fp16")
        yield from rows_of(
            kernels, call.kernel, f"{check}: {label_of(call)}", kernel_of(library, call.kernel), case, RUNS
        )
