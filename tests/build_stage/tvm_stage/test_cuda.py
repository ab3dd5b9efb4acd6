"""CUDA libraries, made on a machine that may have no GPU: their contents, and the refusal of anything else."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from build.compile import compile_job
from build.compiler import tvm
from build.kernels.shapes import Linear, RollingAttention
from build.kernels.table import kernels_of
from build.tvm_stage import cuda
from build.tvm_stage.machine_code import check_machine_code, device_code
from build.tvm_stage.target import TVM_TARGETS
from export.job import Job
from export.pipeline import export_model
from export.stage import ROOT
from export.weights.format import Storage
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import TargetSpec
from runtime.errors import UserError
from tests.helpers.artifacts import CUDA_ARCHS as ARCHS
from tests.helpers.artifacts import cuda_case
from tests.helpers.families import FAMILIES

KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
# `relax.build` without the CUDA library: it succeeds, and stores source.
WRONG_WAY = """
from build.compiler import tvm
from build.kernels.cuda.swiglu import swiglu
target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
with target:
    tvm.compile(tvm.IRModule({"main": swiglu((1, 1), 32)}), target).export_library("wrong.so")
"""


def python(*arguments: str, cwd: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def artifact(compile_case):
    """The artifact in float16; `tests/whole/test_reproducible.py` makes the same one with the command."""
    return Artifact.open(compile_case("cuda").artifact, for_this_machine=False)


def test_there_is_machine_code_for_every_architecture(artifact):
    assert artifact.manifest.target.arch == ARCHS
    (module,) = device_code(artifact.library)
    assert [(code.kind, code.arch) for code in module] == [("cubin", arch) for arch in ARCHS]
    data = artifact.library.read_bytes()
    for mark in (b"__global__", b"__syncthreads", b".version", b".entry"):  # of CUDA source and of PTX
        assert mark not in data


def test_every_kernel_reports_its_usage(artifact):
    rows = artifact.manifest.kernels
    kernels = {row.kernel for row in rows}
    data = artifact.library.read_bytes()
    assert {(row.kernel, row.arch) for row in rows} == {(kernel, arch) for kernel in kernels for arch in ARCHS}
    assert {"linear_0_kernel", "rolling_attention_0_kernel", "rolling_attention_0_kernel_1"} <= kernels
    assert all(kernel.encode() in data and f".text.{kernel}".encode() in data for kernel in kernels)
    assert all(0 < row.registers <= 255 and row.spill_bytes == 0 for row in rows)
    assert all(row.shared_bytes <= 48 * 1024 for row in rows)  # what every architecture gives a block without asking


def test_a_mixture_in_int8(tmp_path):
    case = cuda_case(ARCHS, scheme="int8")
    with contextlib.chdir(tmp_path):
        FAMILIES["mixtral"].write(Path("mixture"))
        path = Path("int8.yaml")
        path.write_text(json.dumps({"name": "int8", "frontend": {"checkpoint": "mixture"}, **case.config}))
        job = Job.load(path)
        export_model(job)
        artifact = compile_job(job)
    rows = artifact.manifest.kernels
    check_machine_code(artifact.library, ARCHS)
    assert {"int8", "float16", "float32"} <= {weight.dtype for weight in artifact.manifest.weights}
    # and one without a number
    assert {f"mixture_{graph}_kernel_{launch}" for graph in (0, 1) for launch in range(1, 6)} <= {
        row.kernel for row in rows
    }
    assert all(row.spill_bytes == 0 and row.shared_bytes <= 48 * 1024 for row in rows)


def test_source_is_refused(tmp_path):
    python("-c", WRONG_WAY, cwd=tmp_path)
    with pytest.raises(UserError, match="expected"):
        check_machine_code(tmp_path / "wrong.so", ARCHS)


def fatbin(folder: Path, *codes: str) -> Path:
    """nvcc's own fatbin of one kernel."""
    (folder / "k.cu").write_text(KERNEL)
    options = [part for code in codes for part in ("-gencode", code)]
    subprocess.run([cuda.find_nvcc(), "--fatbin", *options, "-o", folder / "k.fatbin", folder / "k.cu"], check=True)
    return folder / "k.fatbin"


def test_entries_are_read_as_nvcc_wrote_them(tmp_path):
    path = fatbin(
        tmp_path,
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=sm_90",
        "arch=compute_120,code=sm_120",
        "arch=compute_80,code=compute_80",
    )
    (codes,) = device_code(path)
    assert all(code.code.startswith(b"\x7fELF") == (code.kind == "cubin") for code in codes)
    assert sorted((code.kind, code.arch) for code in codes) == [
        ("cubin", "sm_120"),
        ("cubin", "sm_90"),
        ("cubin", "sm_90a"),
        ("ptx", "sm_80"),
    ]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"], "as text"),
        (["arch=compute_80,code=sm_80"], "machine code for sm_80, expected sm_80, sm_90a"),
        (["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"], "machine code for sm_80, sm_90, expected"),
    ],
    ids=["ptx", "one missing", "90 is not 90a"],
)
def test_other_machine_code_is_refused(tmp_path, codes, message):
    with pytest.raises(UserError, match=message):
        check_machine_code(fatbin(tmp_path, *codes), ARCHS)


def test_a_library_without_or_with_cut_device_code_is_refused(tmp_path):
    whole = fatbin(tmp_path, "arch=compute_80,code=sm_80").read_bytes()
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF host code only")
    with pytest.raises(UserError, match="no device code"):
        check_machine_code(library, ARCHS)
    library.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut off"):
        check_machine_code(library, ARCHS)


def test_compile_fatbin_reads_the_assembler_and_ignores_the_environment(monkeypatch):
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--no-such-flag")
    code, usage = cuda.compile_fatbin(cuda.find_nvcc(), KERNEL, ARCHS)
    assert code.startswith(b"\x50\xed\x55\xba")
    assert [(row.kernel, row.arch, row.shared_bytes) for row in usage] == [("twice", arch, 0) for arch in ARCHS]


@pytest.mark.parametrize("arch", ["sm_70", "sm_80a", "sm_999"])
def test_unknown_architectures_are_refused(arch):
    with pytest.raises(UserError, match=f"holds {arch}, .* expected some of .*sm_80"):
        cuda.check_archs(cuda.find_nvcc(), ["sm_80", arch])


def test_missing_tools_are_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "PACKAGES", (*cuda.PACKAGES, "nvidia-cuda-absent"))
        with pytest.raises(UserError, match=r"not installed: nvidia-cuda-absent; run `make setup`"):
            cuda.find_nvcc()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"needs gcc and g\+\+"):
        cuda.find_nvcc()


PRODUCT = Linear((1, 128), 32768, 64, Storage(dtype="int8"))
ATTENTION = RollingAttention(1, 16, 8, 2, 128, 4, 64, 96, "float16", 1.0)
REGISTERS = {
    "linear": (
        PRODUCT,
        (r"uint a_ptr\[32\]", r"uint b_ptr\[16\]", r"float acc_ptr\[128\]", r"extern __shared__ .*uint memory_ptr\["),
    ),
    **{
        f"rolling_attention over {dtype}": (
            replace(ATTENTION, cache_dtype=dtype),
            (
                r"uint queries_ptr\[32\]",
                r"uint fragments_ptr\[32\]",
                r"uint shares_ptr\[16\]",
                r"float scores_ptr\[32\]",
                r"float mixed_ptr\[64\]",
            ),
        )
        for dtype in ("float16", "float8_e4m3fn", "int8", "uint8")
    },
}


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_of_tensor_cores_are_whole_words(name, monkeypatch):
    """The serial form cannot show this.

    TVM may give a buffer a vector type, which would move where `mma.sync` reads, or leave a barrier out.
    """
    shape, registers = REGISTERS[name]
    op = name.split()[0]
    cuda.load_tvm_cuda()
    sources = []
    monkeypatch.setattr(cuda, "compile_fatbin", lambda _nvcc, source, _archs: (sources.append(source), (b"", []))[1])
    spec = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))
    kernel = kernels_of(spec)[op](shape)
    # there is no code to load
    with (
        tempfile.TemporaryDirectory() as folder,
        cuda.toolchain(spec, Path(folder), None),
        contextlib.suppress(Exception),
    ):
        tvm.compile(
            tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=TVM_TARGETS["cuda"].make(spec)
        )
    (source,) = sources
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in source
    for register in registers:
        assert re.search(register, source), register
    # between writing and reading a step's numbers, and before the next step's
    assert source.count("__syncthreads") >= 2


# K in parts; weights as they are stored, and made of words, scales and offsets.
WARPGROUP_PRODUCTS = (
    Linear((1, 512), 4096, 4096, Storage(dtype="float16"), residual=True),
    Linear((1, 64), 4096, 4096, Storage(dtype="int4", group_size=32, offsets="minimums"), residual=True),
)


@pytest.mark.parametrize("shape", WARPGROUP_PRODUCTS, ids=lambda shape: shape.weight.dtype)
def test_products_of_warpgroups_go_on_beside_each_other(shape, monkeypatch, tmp_path):
    """Where ptxas cannot prove that nobody touches their registers, it waits for each, and says so (C7515)."""
    said, run = [], cuda._run
    monkeypatch.setattr(cuda, "_run", lambda command: said.append(run(command)) or said[-1])
    spec = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_90a",))
    module = tvm.IRModule({"kernel": kernels_of(spec)["linear"](shape).with_attr("global_symbol", "kernel")})
    with cuda.toolchain(spec, tmp_path, None):
        tvm.compile(module, target=TVM_TARGETS["cuda"].make(spec)).export_library(tmp_path / "kernel.so")
    (report,) = [text for text in said if "ptxas info" in text]
    assert "C75" not in report
    ((code,),) = device_code(tmp_path / "kernel.so")
    assert code.arch == "sm_90a"
    assert [row.spill_bytes for row in cuda.usage_of(tmp_path)] == [0] * 3
