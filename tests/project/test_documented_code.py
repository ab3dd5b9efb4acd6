"""Commands that the documentation tells people to run, verbatim: the README's tiny model, and the Python example."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from export.stage import ROOT
from tests.helpers.pages import README, blocks

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "out", "keys", "models", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout that shares its .venv and has run the README's commands for the tiny model."""
    folder = tmp_path_factory.mktemp("checkout") / "copy"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for lock in (folder / "requirements.lock", *(folder / "requirements").iterdir()):
        os.utime(lock, (0, 0))  # older than .venv, so that the .venv counts as complete
    (commands,) = [block for block in blocks(README, "bash") if "yaml/tiny.yaml" in block]
    run(folder, "bash", "-euxo", "pipefail", "-c", commands)
    return folder


def run(folder: Path, *command: str) -> str:
    """Output of a command; a failure shows all of it."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_compiles_the_tiny_model(checkout):
    assert (checkout / "out" / "tiny" / "manifest.json").is_file()


def test_the_python_example_runs(checkout):
    example = "\n".join(blocks(ROOT / "docs" / "python-api.md", "python"))
    printed = run(checkout, ".venv/bin/python", "-c", example).splitlines()
    assert printed[0] == "tiny-mistral 2 layers, none"
    assert printed[-1] == "(320,) [1, 44, 73, 80, 80, 83] room for None"
