"""The file that checks a GPU: made without a checkpoint, small, and installed in an empty environment.

There it asks for a driver.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from build.gpucheck import ENCODINGS, CheckSpec, check_config
from export.job import Job
from export.results import export_record
from export.stage import ROOT
from export.weights.encoded import encoding_of
from runtime.errors import UserError
from runtime.gpucheck import checked_manifest
from tests.helpers.shipped import PYTHON, box_environment, install, unpack

CONFIG = """
name: gpu
frontend: {checkpoint: none}
shape: {prefill_chunk: 4, cache_len: 16}
backend: {target: cuda, arch: [sm_80]}
"""
# bytes of the whole file with one small library; another one is about 1 MB, and 60 MB must hold them all
SIZE_LIMIT = 50e6


def build(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "build.gpucheck", "gpu.yaml", "--pythons", PYTHON, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the command was run."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "gpu.yaml").write_text(CONFIG)
    result = build(folder, "--checks", "tiny/1:int4")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_file_runs_on_a_box_without_a_driver(folder, tmp_path):
    """There it says what is missing. With a driver, the same thing takes a GPU."""
    archive = folder / "out" / "gpucheck.tar.zst"
    assert archive.stat().st_size < SIZE_LIMIT
    box = unpack(archive, tmp_path)
    assert sorted(path.name for path in box.glob("checks/*/*")) == ["library.so", "manifest.json"]
    manifest = checked_manifest(box / "checks" / "tiny-1-layers-int4")
    assert (manifest.model.n_layers, manifest.quantization.scheme, len(manifest.calls) > 10) == (1, "int4", True)
    done = install(box)
    assert (done.returncode, done.stdout) == (0, "")
    command = [box / ".venv/bin/python", "-m", "runtime.gpucheck", "checks/tiny-1-layers-int4"]
    result = subprocess.run(command, cwd=box, env=box_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no CUDA driver found")


def test_what_is_there_is_not_made_again(folder):
    (made,) = (folder / "out" / ".work" / "gpucheck").glob("tiny-1-layers-int4-*")
    before = (made / "library.so").stat().st_mtime_ns
    result = build(folder, "--checks", "tiny/1:int4")
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
