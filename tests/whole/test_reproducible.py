"""The same checkpoint and config give the same bytes, whatever folder they lie in: every file of the artifact, for the CPU and for CUDA."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.stage import ROOT
from tests.helpers.artifacts import CASES, cuda_case, write_case


def sums(folder: Path, name: str) -> dict[str, str]:
    """Compile `NAME.yaml` of a folder, in a process with a hash seed of its own; SHA-256 of each file of the artifact."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(len(str(folder)))}
    result = subprocess.run(
        [sys.executable, "-m", "build", f"{name}.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "out" / name).iterdir()}


@pytest.mark.parametrize(
    ("name", "case"), [("int8_dynamic", CASES["int8_dynamic"]), ("cuda", cuda_case(["sm_80", "sm_90a"]))]
)
def test_two_folders_one_artifact(tmp_path, name, case):
    first, second = tmp_path / "first", tmp_path / "a" / "longer" / "path"
    first.mkdir()
    write_case(name, case, first)
    shutil.copytree(first, second)
    found = sums(first, name)
    assert found == sums(second, name)
    assert {"manifest.json", "library.so", "weights.safetensors"} <= found.keys()
