"""The same checkpoint and config give the same bytes, whatever folder they are in.

This holds for every file, for the CPU and for CUDA.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.stage import ROOT


def sums(artifact: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in artifact.iterdir()}


@pytest.mark.parametrize("name", ["int8_dynamic", "cuda"])
def test_two_folders_one_artifact(compile_case, tmp_path, name):
    """One is made in the tests' own process, the other by the command, in processes with another hash seed."""
    first = compile_case(name)
    folder = tmp_path / "a" / "longer" / "path"
    shutil.copytree(first.folder, folder, ignore=shutil.ignore_patterns("out"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(len(str(folder)))}
    command = [sys.executable, "-m", "build", f"{name}.yaml"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = sums(folder / "out" / name)
    assert found == sums(first.artifact)
    assert {"manifest.json", "library.so", "weights.safetensors"} <= found.keys()
