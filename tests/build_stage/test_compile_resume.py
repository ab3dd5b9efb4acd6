"""`python -m build` as a person runs it.

It is killed and started again; then, in one process, it is started once more and given a damaged artifact.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from build import __main__ as command
from build.compile import existing_artifact
from export.job import Job
from export.stage import ROOT
from runtime.artifact.folder import Artifact
from runtime.errors import UserError
from tests.helpers.artifacts import Case, write_case

NAME = "resumed"
CASE = Case({"sliding_window": 8, "num_hidden_layers": 1}, {"shape": {"prefill_chunk": 4, "cache_len": 8}})
LIMIT = 240  # seconds


def export_here(job, module, *arguments):
    """`Job.start`, without a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, str(job.path), *(f"--set={text}" for text in job.overrides), *arguments])
        assert importlib.import_module(f"{module}.__main__").main() == 0


class Project:
    """A folder with one YAML and its checkpoint, and the command that compiles it."""

    def __init__(self, folder):
        self.folder = folder
        self.artifact = folder / "out" / NAME
        self.workspace = folder / "out" / ".work" / NAME
        write_case(NAME, CASE, folder)

    def start(self, *arguments):
        command = [sys.executable, "-m", "build", f"{NAME}.yaml", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self):
        """Run the command to its end."""
        process = self.start()
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors

    def run(self, *arguments):
        """Run the command in this process, together with the export for which it would start another."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["build", f"{NAME}.yaml", *arguments])
            patch.setattr(Job, "start", export_here)
            assert command.main() == 0

    def files(self):
        """Every file below out/ except the locks, with values that change when it is written again."""
        paths = sorted(path for path in (self.folder / "out").rglob("*") if path.is_file() and path.name != "lock")
        return {
            path.relative_to(self.folder): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
            for path in paths
        }

    def stage_files(self):
        return {path: seen for path, seen in self.files().items() if path.parent.parent.name == NAME}

    def stage(self, name):
        (folder,) = self.workspace.glob(f"{name}-*")
        return folder

    def results(self):
        """Each result on disk, as a value that changes when it is made again.

        Packed weights keep their inode where another artifact takes them over.
        """
        (graphs,) = self.stage("weights").glob("graphs-*.json")
        return {
            "weights": self.stage("weights"),
            "graphs": (graphs.name, graphs.stat().st_ino),
            "library": self.stage("library"),
            "packed": (self.artifact / "weights.safetensors").stat().st_ino,
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose first run was killed in the middle of the export, and whose second run finished."""
    project = Project(tmp_path_factory.mktemp("resume"))
    process = project.start()
    deadline = time.monotonic() + LIMIT
    while not list(project.workspace.glob("weights-*/*.onnx")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    project.after_kill = (
        {path.name for path in project.folder.joinpath("out").iterdir()},
        [path.name for path in project.workspace.glob("weights-*/graphs-*.json")],
    )
    project.finish()
    return project


def test_a_killed_run_leaves_no_artifact(project):
    outputs, records = project.after_kill
    assert NAME not in outputs
    assert records == []  # the record of the graphs appears with the last of them


def test_the_next_run_finishes_and_cleans_up(project):
    assert Artifact.open(project.artifact).manifest.name == NAME
    assert not list((project.folder / "out").rglob("*.tmp"))
    assert sorted(
        path.name.partition("-")[0] for path in project.workspace.iterdir() if path.is_dir() and "-" in path.name
    ) == ["library", "weights"]


def test_a_run_with_nothing_changed_writes_nothing(project):
    before = project.files()
    project.run()
    assert project.files() == before


@pytest.mark.parametrize("file", ["manifest.json", "weights.safetensors"])
def test_a_damaged_artifact_is_made_again_from_finished_stages(project, file):
    stages = project.stage_files()
    path = project.artifact / file
    intact = path.read_bytes()
    path.write_bytes(intact[:-3] + b"???")
    with pytest.raises(UserError):
        Artifact.open(project.artifact)
    project.run()
    assert path.read_bytes() == intact
    assert project.stage_files() == stages


def test_damaged_stages_never_reach_an_artifact(project):
    """Noise in stored weights, a cut library and an empty graph: each is made again."""
    before = {path.name: path.read_bytes() for path in project.artifact.iterdir()}
    stored, library = project.stage("weights"), project.stage("library")
    with (stored / "weights.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(range(256)) * 16)
    with (library / "library.so").open("r+b") as file:
        file.truncate(4096)
    (stored / "step_1.onnx").write_bytes(b"")
    (project.workspace / "packed.json").unlink()
    shutil.rmtree(project.artifact)
    project.run()
    assert {path.name: path.read_bytes() for path in project.artifact.iterdir()} == before


def test_a_lost_library_stage_alone_is_no_reason_to_work(project):
    """The artifact is whole and has the right key."""
    library = project.stage("library")
    hidden = library.rename(library.parent / "hidden")
    try:
        project.run()
        assert not library.exists()
    finally:
        hidden.rename(library)


def test_a_dump_shows_every_step_even_when_all_is_finished(project):
    before = project.files()
    project.run("--dump", "dump")
    names = sorted(path.name for path in (project.folder / "dump").iterdir())
    for step in ("0-export-step_1.onnx", "0-export-prefill_4.onnx", "1-import.py", "2-dispatch.py", "3-legalize.py"):
        assert step in names
    assert project.files() == before


def test_weights_that_were_damaged_are_never_taken_for_packed(project):
    """The note in the workspace records their sum."""
    path = project.artifact / "weights.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-3] + b"???")
    project.run("--set", "name=another")  # so that the artifact is replaced
    assert path.read_bytes() == intact


def test_an_artifact_of_another_key_is_not_hashed(project, monkeypatch):
    """Its manifest says so, whatever the gigabytes beside it hold."""
    monkeypatch.setattr(Artifact, "open", lambda *_, **__: pytest.fail("the artifact was read"))
    assert existing_artifact(project.artifact, "another key") is None


def test_a_changed_setting_makes_only_what_depends_on_it(project):
    """Each setting adds to the ones before; `tests/export/test_results.py` covers more settings by their keys alone."""
    project.run()
    settings = []
    for setting, made_again in (
        ("name=another", set()),
        ("backend.cpu=x86-64-v2", {"library"}),
        ("shape.cache_len=24", {"graphs", "library"}),
        ("quantize.scheme=int8", {"weights", "graphs", "library", "packed"}),
    ):
        before = project.results()
        settings += ["--set", setting]
        project.run(*settings)
        after = project.results()
        assert {name for name in after if after[name] != before[name]} == made_again, setting
        Artifact.open(project.artifact)
    manifest = Artifact.open(project.artifact).manifest
    assert (manifest.name, manifest.target.cpu, manifest.quantization.scheme) == ("another", "x86-64-v2", "int8")
