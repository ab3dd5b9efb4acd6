"""`make test`: a worker that dies or hangs ends the run, failing with the test's name; and one room runs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.stage import ROOT
from tests.conftest import LIGHT_ROOMS, LONGEST_FIRST

WORKS = "def test_works(): pass\n"
DIES = "import os\ndef test_dies(): os.abort()\n"
HANGS = "import time\ndef test_hangs(): time.sleep(60)\n"


def options(*arguments: str) -> list[str]:
    """Arguments that the Makefile's last command passes to pytest."""
    command = ["make", "--dry-run", "--silent", "test", *arguments]
    environment = {"PATH": os.environ["PATH"]}  # without the arguments of a make that runs these tests
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    before, _, after = shown.stdout.splitlines()[-1].partition(" -m pytest ")
    assert before.endswith("python")
    return after.split()


@pytest.mark.parametrize(("text", "name"), [(DIES, "test_dies"), (HANGS, "test_hangs")], ids=["dies", "hangs"])
def test_a_worker_that_is_lost_ends_the_run(tmp_path, text, name):
    """The project's own settings apply, except for the time limit of a test that hangs."""
    (tmp_path / "test_first.py").write_text(text)
    (tmp_path / "test_second.py").write_text(WORKS)
    command = [sys.executable, "-m", "pytest", *options(), "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    seconds = ["-o", "faulthandler_timeout=2"]
    result = subprocess.run([*command, *seconds, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "crashed while running" in result.stdout
    assert f"test_first.py::{name}" in result.stdout


def test_one_room_is_run_alone():
    everything = options()
    apart = ("tests/server", "tests/cluster", "tests/deploy")  # `make test-server` and `make test-cluster` run these
    assert everything[-6:] == [word for folder in apart for word in ("--ignore", folder)]
    for only, folder in (
        ("runtime/text", "tests/runtime/text"),
        ("build/kernels", "tests/build_stage/kernels"),
        ("build", "tests/build_stage"),
        ("whole/test_heads.py", "tests/whole/test_heads.py"),
    ):
        assert options(f"ONLY={only}") == [*everything[:-6], folder]
        assert (ROOT / folder).exists()


def test_light_rooms_load_neither_torch_nor_tvm():
    rooms = [str(Path("tests", room)) for room in LIGHT_ROOMS]
    code = (
        "import sys, pytest\n"
        f"assert pytest.main(['--collect-only', '-p', 'no:cacheprovider', *{rooms}]) == 0\n"
        "print([name for name in ('torch', 'tvm', 'tvm_ffi') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_longest_files_exist():
    assert [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).is_file()] == []
