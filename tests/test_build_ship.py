"""The shipped file runs by itself: only its own runtime folder and library, no project, no TVM compiler, and the same bytes every time."""

import hashlib
import json
import subprocess
import sys
import tarfile

import pytest

from build.ship import ship
from runtime.artifact import Artifact
from runtime.errors import UserError
from runtime.tvm_runtime import RUNTIME_LIBRARY

GENERATE = ["-m", "runtime.generate", "--prompt-ids", "1,2,3", "--max-tokens", "6", "--json"]
# Runs a module as `python -m` would, where importing the installed TVM is an error.
WITHOUT_TVM = "import runpy, sys; sys.modules['tvm'] = None; sys.argv = sys.argv[1:]; runpy.run_module('runtime.generate', run_name='__main__')"


@pytest.fixture(scope="module")
def shipped(compile_case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship")
    artifact = Artifact.open(compile_case("windowed").artifact)
    ship(artifact, folder / "windowed.tar")
    return artifact, folder


def test_the_unpacked_file_generates_the_same_tokens(shipped):
    artifact, folder = shipped
    with tarfile.open(folder / "windowed.tar") as tar:
        tar.extractall(folder, filter="data")
    box = folder / "windowed"
    command = [sys.executable, "-c", WITHOUT_TVM, "generate", "artifact", *GENERATE[2:]]
    result = subprocess.run(command, cwd=box, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    here = subprocess.run([sys.executable, *GENERATE[:2], str(artifact.folder), *GENERATE[2:]], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["token_ids"] == json.loads(here.stdout)["token_ids"]
    assert (box / "runtime" / "lib" / RUNTIME_LIBRARY).is_file()
    assert "torch" not in (box / "requirements.txt").read_text()


def test_the_same_artifact_gives_the_same_bytes(shipped, tmp_path):
    artifact, folder = shipped
    ship(artifact, tmp_path / "windowed.tar")
    first, second = (hashlib.sha256((place / "windowed.tar").read_bytes()).hexdigest() for place in (folder, tmp_path))
    assert first == second
    assert not list(tmp_path.glob("*.tmp"))


def test_an_artifact_that_the_runtime_cannot_start_is_not_shipped(shipped, tmp_path):
    import msgspec

    artifact, _ = shipped
    target = msgspec.structs.replace(artifact.manifest.target, kind="cuda")
    other = Artifact(artifact.folder, msgspec.structs.replace(artifact.manifest, target=target))
    with pytest.raises(UserError, match="compiled for cuda"):
        ship(other, tmp_path / "x.tar")
    assert not list(tmp_path.iterdir())
