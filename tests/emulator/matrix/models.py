"""Whole models on the emulated GPU, through the project's own engine: its streams, captured graphs, slots and draws.

    python -m tests.emulator.matrix.models CASE FOLDER

Streams do their work at once, and then as late as a device may. Each case has a process: one that keeps no scratch of
its own, so that memory is TVM's, as it is for users. FOLDER keeps what the emulator compiles.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from build.compile import compile_job
from export.job import Job
from export.onnx_graphs.graphs import OnnxGraphs
from export.pipeline import export_model
from runtime.engines import cuda_device
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.engines.tvm_runtime import find_library
from runtime.verify import verify, verify_draws
from tests.emulator.gpu import RUNTIME, Run
from tests.emulator.kernels import EmulatedKernels
from tests.emulator.matrix.layers import emulate_nvcc
from tests.emulator.matrix.rows import Row
from tests.helpers.artifacts import CACHE_LEN, WINDOW, Case, bound, write_case
from tests.helpers.families import FAMILIES
from tests.helpers.onnx_agreement import check_rows_of_all_slots, check_steps_and_prefills

LONGEST = 2 * WINDOW + 3


def small(
    model: Mapping[str, object],
    chunks: Sequence[int] = (16, 5),
    dtype: str = "fp16",
    slots: int = 1,
    arch: str = "sm_80",
    **quantize: object,
) -> Case:
    """A small model and its configuration."""
    config = {
        "shape": {"prefill_chunk": list(chunks), "cache_len": CACHE_LEN, "slots": slots},
        "quantize": quantize,
        "backend": {"target": "cuda", "arch": [arch], "dtype": dtype},
    }
    return Case({"sliding_window": WINDOW, "num_hidden_layers": 2, **model}, config)


CASES = {
    "float16, two slots": small({}, slots=2),
    "float16, attention on tensor cores": small({"head_dim": 32}, chunks=(32, 6)),
    "float16, sm_90a": small({}, slots=2, arch="sm_90a"),
    "float16, no window": small({"sliding_window": None}),
    "float32, three slots": small({}, dtype="fp32", slots=3),
    "int8": small({}, scheme="int8"),
    "int8, sm_90a": small({}, scheme="int8", arch="sm_90a"),
    "int4 with zero points": small({}, scheme="int4", symmetric=False),
    "caches of int8": small({"head_dim": 32}, slots=2, cache="int8"),
    "caches of fp8": small({"head_dim": 32}, slots=2, cache="fp8"),
    "caches of int4": small({"head_dim": 32}, slots=2, cache="int4"),
    "mixtral": small({}),  # of `FAMILIES`, as it is there
}
RUNS = (Run("random", 1), Run("random", 2, deferred=True))


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each case, whose process prints a row for each of its runs."""
    for name in CASES:
        yield Row("model", name, "", *result_of_process(name, kernels.gpu.folder))


def result_of_process(name: str, folder: Path) -> tuple[str, bool]:
    """What a process has printed for a case, and whether all of it is right."""
    command = [sys.executable, "-m", "tests.emulator.matrix.models", name, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or result.stderr, result.returncode == 0


def rows_of_case(name: str, emulator: Path) -> Iterator[Row]:
    """A row for each run of a case, in this process."""
    with TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        kernels = EmulatedKernels.load(emulator, exact_scratch=False)
        emulate_nvcc(patch, kernels.module)
        kernels.gpu.be(CASES[name].config["backend"]["arch"][0])
        patch.setattr(cuda_device, "find_library", partial(_library, kernels.gpu.runtime))
        graphs, artifact = _compiled(name, Path(folder))
        for run in RUNS:
            kernels.gpu.set(run)
            wrong = _wrong(graphs, Engine.open(artifact))
            yield Row("model", name, str(run), "; ".join(wrong) or "right", not wrong)


def _library(runtime: Path, name: str) -> Path:
    return runtime if name == RUNTIME else find_library(name)


def _compiled(name: str, folder: Path) -> tuple[OnnxGraphs, Path]:
    if name in FAMILIES:
        FAMILIES[name].write(folder / "checkpoint")
    job = Job.load(Path(write_case("case", CASES[name], folder).name))
    graphs = export_model(job)
    compile_job(job)
    return graphs, job.artifact


def _wrong(graphs: OnnxGraphs, engine: Engine) -> list[str]:
    """What is wrong with an engine: against onnxruntime, against itself, and its draws."""
    wrong = []
    try:
        limit = bound(graphs, on_tensor_cores=engine.manifest.target.dtype == "fp16")
        check_steps_and_prefills(graphs, engine, WINDOW, LONGEST, limit)
        check_rows_of_all_slots(graphs, engine, LONGEST, limit)
    except AssertionError as error:
        wrong.append(f"not as onnxruntime: {error}")
    checks = [*verify(SideBySide(engine, engine.slots)), *verify_draws(SideBySide(engine, 1))]
    return [*wrong, *(f"{check.check}: {check.found}, expected {check.expected}" for check in checks if not check.ok)]


def main() -> int:
    """Check the case that the command line names; 1 if anything is wrong."""
    name, folder = sys.argv[1:]
    rows = list(rows_of_case(name, Path(folder).absolute()))
    print("; ".join(f"{row.run}: {row.found}" for row in rows))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
