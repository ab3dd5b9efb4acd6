"""The file that checks a GPU: made without a checkpoint, small, installed in an empty environment, and run there.

The GPU is emulated: the file's library holds kernels as g++ has compiled them, and the box has stand-ins for NVIDIA's
driver and runtime library. Nothing else comes from this checkout.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from build import gpucheck
from build.gpucheck import ENCODINGS, CheckSpec, check_config
from export.job import Job
from export.results import export_record
from export.stage import ROOT
from export.weights.encoded import encoding_of
from runtime.errors import UserError
from runtime.gpu_check.folder import checked_manifest
from runtime.gpu_check.sanitizer import TOOLS
from tests.emulator.gpu import RUNTIME, compiled_module, make_libraries
from tests.emulator.matrix.layers import emulate_nvcc
from tests.helpers.shipped import PYTHON, executable, install, on_the_box, unpack

CONFIG = """
name: gpu
frontend: {checkpoint: none, overrides: {sliding_window: null}}
shape: {prefill_chunk: 32, cache_len: 128, slots: 2}
backend: {target: cuda, arch: [sm_80]}
"""
CHECK = "tiny/1:int4"
FOLDER = "checks/tiny-1-layers-int4"
# bytes of the whole file with one small library; another one is about 1 MB, and 60 MB must hold them all
SIZE_LIMIT = 50e6


@pytest.fixture(scope="module")
def emulator(shared_folder):
    """The folder of the emulated GPU's libraries and kernels."""
    make_libraries(shared_folder / "emulator")
    return shared_folder / "emulator"


@pytest.fixture(scope="module")
def folder(emulator, tmp_path_factory):
    """The folder in which the command was run; its library holds code for the emulated GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "gpu.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        emulate_nvcc(patch, partial(compiled_module, emulator))
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))  # for the process that traces
        patch.setattr(sys, "argv", ["gpucheck", "gpu.yaml", "--pythons", PYTHON, "--checks", CHECK])
        assert gpucheck.main() == 0
    return folder


@pytest.fixture(scope="module")
def box(folder, tmp_path_factory):
    """The file, unpacked and installed in an empty environment."""
    box = unpack(folder / "out" / "gpucheck.tar.zst", tmp_path_factory.mktemp("box"))
    done = install(box)
    assert (done.returncode, done.stdout) == (0, "")
    return box


def checked_on_the_box(box, **environment):
    """What checking everything says."""
    folders = [str(path.relative_to(box)) for path in box.glob("checks/*")]
    return on_the_box(box, "runtime.gpucheck", *folders, **environment)


def test_the_file_is_small_and_holds_kernels_alone(folder, box):
    assert (folder / "out" / "gpucheck.tar.zst").stat().st_size < SIZE_LIMIT
    assert sorted(path.name for path in box.glob("checks/*/*")) == ["library.so", "manifest.json"]
    manifest = checked_manifest(box / FOLDER)
    assert (manifest.model.n_layers, manifest.quantization.scheme, len(manifest.calls) > 10) == (1, "int4", True)


def test_the_file_runs_on_a_box_without_a_driver(box):
    """There it says what is missing."""
    result = checked_on_the_box(box)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the GPU cannot be measured: no CUDA driver found")


def test_the_file_checks_a_gpu_in_full(box, emulator, tmp_path):
    """All of it on the emulated GPU, with stand-ins for a Python that has transformers and for compute-sanitizer."""
    shutil.copyfile(emulator / RUNTIME, box / "runtime" / "lib" / RUNTIME)
    answer = '{"peak_tflop_s": 1.0, "seconds": {"tiny-1-layers-int4 decode": 1.0}}'
    whole = '{"ttft": {"128": 1.0}, "decode": {"64": 1.0}, "graph": true}'
    executable(tmp_path / "python3", f"case $1 in */torch_script.py) echo '{answer}' ;; *) echo '{whole}' ;; esac")
    executable(tmp_path / "compute-sanitizer", 'shift 2; "$@"; echo "========= ERROR SUMMARY: 0 errors"')
    result = checked_on_the_box(box, PATH=f"{tmp_path}:/usr/bin:/bin", LD_LIBRARY_PATH=str(emulator))
    assert result.returncode == 0, result.stdout + result.stderr
    manifest = checked_manifest(box / FOLDER)
    found = json.loads((box / "gpucheck.json").read_text())
    assert (found["ok"], found["not_measured"], found["gpu"]["name"]) == (True, [], "an emulated GPU")
    model = found["models"][FOLDER]
    assert [row["kernel"] for row in model["kernels"]] == [call.kernel for call in manifest.calls]
    assert max(row["error"] for row in model["kernels"]) > 0
    assert [prefill["prompt_tokens"] for prefill in model["speeds"]["prefill"]] == [128]
    assert [step["context"] for step in model["speeds"]["decode"]] == [64]
    assert [speed["sequences"] for speed in model["sequences"]["speeds"]] == [1, 2]
    assert (found["torch"]["peak_tflop_s"], found["transformers"][FOLDER]["ttft"]) == (1.0, {"128": 1.0})
    assert [row["kernels"] for row in found["sanitizer"]] == [len(manifest.calls)] * len(TOOLS)
    tables = (box / "gpucheck.md").read_text()
    assert all(f"| {call.kernel} |" in tables for call in manifest.calls)
    assert "of the time of transformers' graph |" in tables


def test_what_is_there_is_not_made_again(folder):
    (made,) = (folder / "out" / ".work" / "gpucheck").glob("tiny-1-layers-int4-*")
    before = (made / "library.so").stat().st_mtime_ns
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "build.gpucheck", "gpu.yaml", "--pythons", PYTHON, "--checks", CHECK]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (made / "library.so").stat().st_mtime_ns == before
    assert "compiling" not in result.stdout + result.stderr


@pytest.mark.parametrize("text", ["8b:int8", "7b", "7b/0:int8", "7b/x:int8", "7b/-1:int4", ""])
def test_what_is_no_check_is_refused(text):
    with pytest.raises(UserError, match="is not a check, expected SHAPE:SCHEME"):
        CheckSpec.parse(text)


def test_checks_are_named_after_what_they_are():
    assert [CheckSpec.parse(text).name for text in ("7b:none", "mixtral-8x7b/2:int8")] == [
        "7b-fp16",
        "mixtral-8x7b-2-layers-int8",
    ]


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_check_has_the_matrices_of_a_quantized_checkpoint(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    check = CheckSpec.parse(f"tiny/1:{name}")
    config = check_config(Job.load(Path("gpu.yaml")), check)
    stored = {tensor.name: tensor.stored for tensor in export_record(config, check.checkpoint({})).tensors}
    matrices = [storage for tensor, storage in stored.items() if tensor.startswith("layers.") and "norm" not in tensor]
    assert len(matrices) == 4
    for storage in matrices:
        assert replace(ENCODINGS[name], order=None) == encoding_of(storage)
        assert storage.reordered == (ENCODINGS[name].order is not None)


def test_a_config_for_the_cpu_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    job = Job.load(Path("gpu.yaml"))
    assert check_config(job, CheckSpec.parse("tiny:int4")).quantize.scheme == "int4"
    for_the_cpu = job.changed(["backend.target=llvm", "backend.arch=[]"])
    with pytest.raises(UserError, match=r"has backend\.target llvm, expected cuda"):
        check_config(for_the_cpu, CheckSpec.parse("tiny:int4"))
    with pytest.raises(UserError, match=r"quantize\.scheme"):
        check_config(job, CheckSpec.parse("tiny:int3"))
