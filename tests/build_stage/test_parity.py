"""`python -m build.parity`: all rungs on tiny models, the summary in the manifest, and failure by exit status."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from build import parity
from export.job import Job
from export.proof.ladder import TRACE_FILE, load_trace
from export.stage import ROOT
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import ParityRow


@pytest.fixture(scope="module")
def windowed(compile_case):
    """A case proved by the real command: its output, its exit status, and the rows that the manifest then held."""
    compiled = compile_case("windowed")
    command = [sys.executable, "-m", "build.parity", f"{compiled.name}.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=compiled.folder, env=environment, capture_output=True, text=True, check=False)
    return SimpleNamespace(compiled=compiled, result=result, rows=Artifact.open(compiled.artifact).manifest.parity)


def status_here(compiled, monkeypatch):
    """The command's exit status in this process, which also does the work for which the command starts another."""

    def start(job, module):
        monkeypatch.setattr(sys, "argv", [module, str(job.path)])
        assert importlib.import_module(module).main() == 0

    monkeypatch.chdir(compiled.folder)
    monkeypatch.setattr(sys, "argv", ["parity", f"{compiled.name}.yaml"])
    monkeypatch.setattr(Job, "start", start)
    return parity.main()


def check_rows(rows, rungs, printed):
    assert rows is not None
    assert "".join(row.rung for row in rows) == rungs
    assert all(row.passed and row.top1_agreement == 1.0 for row in rows)
    assert printed.count("pass") == len(rungs)


def test_every_rung_passes_and_the_manifest_says_so(windowed):
    assert windowed.result.returncode == 0, windowed.result.stdout + windowed.result.stderr
    check_rows(windowed.rows, "123445", windowed.result.stdout)
    assert [row.bound for row in windowed.rows[-2:]] == [0.0, 0.0]


def test_with_several_slots_every_rung_passes(compile_case, monkeypatch, capsys):
    compiled = compile_case("int8")
    assert status_here(compiled, monkeypatch) == 0
    rows = Artifact.open(compiled.artifact).manifest.parity
    check_rows(rows, "123445", capsys.readouterr().out)
    assert [(row.bound, row.max_abs) for row in rows[-2:]] == [(0.0, 0.0)] * 2


def test_a_wrong_answer_fails_the_artifacts_rung(windowed):
    compiled = windowed.compiled
    cases, expected = load_trace(compiled.workspace / TRACE_FILE)
    expected[-1][-1] = expected[-1][-1] * 1.001
    rows = parity.run_artifact_rungs(Artifact.open(compiled.artifact), cases, expected)
    assert {row.rung: row.passed for row in rows} == {"3": False, "4": True, "5": True}


def test_a_failed_rung_is_the_exit_status(windowed, monkeypatch, capsys):
    failed = ParityRow(rung="1", compared="x", max_abs=1.0, max_rel=1.0, top1_agreement=0.5, bound=0.1, passed=False)
    monkeypatch.setattr(parity, "run_export_rungs", lambda *_: [failed])
    assert status_here(windowed.compiled, monkeypatch) == 1
    assert "FAIL" in capsys.readouterr().out
