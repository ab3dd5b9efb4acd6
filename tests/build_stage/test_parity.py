"""`python -m build.parity`: all rungs on tiny models through the real command, the summary in the manifest, and failure by exit status."""

import subprocess
import sys

import pytest

from build import parity
from export.proof.ladder import TRACE_FILE, load_trace
from export.stage import ROOT
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import ParityRow


def run_parity(compiled) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "build.parity", f"{compiled.name}.yaml"]
    return subprocess.run(
        command,
        cwd=compiled.folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("case", "rungs"), [("windowed", "12344"), ("int8", "123445")])
def test_every_rung_passes_and_the_manifest_says_so(compile_case, case, rungs):
    compiled = compile_case(case)
    result = run_parity(compiled)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = Artifact.open(compiled.artifact).manifest.parity
    assert rows is not None
    assert "".join(row.rung for row in rows) == rungs
    assert all(row.passed and row.top1_agreement == 1.0 for row in rows)
    assert result.stdout.count("pass") == len(rungs)
    if case == "int8":  # a batch of two: the last rung is exact
        assert (rows[-1].bound, rows[-1].max_abs) == (0.0, 0.0)


def test_a_wrong_answer_fails_the_artifacts_rung(compile_case):
    compiled = compile_case("windowed")
    assert run_parity(compiled).returncode == 0
    cases, expected = load_trace(compiled.workspace / TRACE_FILE)
    expected[-1][-1] = expected[-1][-1] * 1.001
    rows = parity.run_artifact_rungs(Artifact.open(compiled.artifact), cases, expected)
    assert {row.rung: row.passed for row in rows} == {"3": False, "4": True}


def test_a_failed_rung_is_the_exit_status(compile_case, monkeypatch, capsys):
    compiled = compile_case("windowed")
    assert run_parity(compiled).returncode == 0
    failed = ParityRow(rung="1", compared="x", max_abs=1.0, max_rel=1.0, top1_agreement=0.5, bound=0.1, passed=False)
    monkeypatch.chdir(compiled.folder)
    monkeypatch.setattr(sys, "argv", ["parity", f"{compiled.name}.yaml"])
    monkeypatch.setattr(parity, "run_export_rungs", lambda *_: [failed])
    assert parity.main() == 1
    assert "FAIL" in capsys.readouterr().out
