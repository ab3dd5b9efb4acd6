"""Stages on disk: keys, all-or-nothing results, and one run at a time."""

import subprocess
import sys
import threading

import pytest

from export import stage
from export.stage import locked, our_modules, run_stage, stage_folder, stage_key, tool_versions


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of three modules, one of which is not imported by the other two."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "top.py").write_text("from package import middle\nimport json\n")
    (package / "middle.py").write_text("VALUE = 1\n")
    (package / "other.py").write_text("VALUE = 2\n")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    return package


def key(inputs=None, tools=("numpy",)):
    return stage_key(inputs or {"a": 1, "b": {"c": None}}, "package.top", tools)


@pytest.mark.usefixtures("project")
def test_key_is_stable_and_ignores_the_order_of_inputs():
    assert key() == key() == key({"b": {"c": None}, "a": 1})
    assert len(key()) == stage.KEY_LENGTH


@pytest.mark.usefixtures("project")
def test_key_changes_with_inputs():
    assert len({key(), key({"a": 2, "b": {"c": None}}), key({"a": 1, "b": {"c": 0}}), key({"a": 1})}) == 4


def test_key_changes_with_code_that_is_imported_only(project):
    before = key()
    (project / "other.py").write_text("VALUE = 3\n")
    assert key() == before
    (project / "middle.py").write_text("VALUE = 3\n")
    assert key() != before


@pytest.mark.parametrize(
    "text", ["VALUE = 1  # a comment\n", '"""A docstring."""\n\nVALUE = 1\n', "VALUE = (\n    1\n)\n"]
)
def test_key_ignores_comments_docstrings_and_formatting(project, text):
    before = key()
    (project / "middle.py").write_text(text)
    assert key() == before


@pytest.mark.usefixtures("project")
def test_key_ignores_what_a_person_sees_of_a_stage(project, monkeypatch):
    monkeypatch.setattr(stage, "PRESENTATION", frozenset({"package.middle"}))
    before = key()
    (project / "middle.py").write_text("VALUE = 3\n")
    assert key() == before


@pytest.mark.usefixtures("project")
def test_key_changes_with_tool_versions(monkeypatch):
    before = key()
    assert key(tools=("numpy", "onnx")) != before
    monkeypatch.setattr(stage, "version", lambda _: "0.0.1")
    assert key() != before


def test_tool_versions_are_the_installed_ones():
    import numpy

    assert tool_versions(["numpy"]) == {"numpy": numpy.__version__}


def test_our_modules_follows_imports():
    found = our_modules("export.onnx_graphs.tracing")
    assert {
        "export.onnx_graphs.tracing",
        "export.static_model.model",
        "export.static_model.rope",
        "runtime.artifact.manifest",
        "runtime.artifact.tensor_file",
    } <= set(found)
    assert not [name for name in found if name.startswith("build")]


def test_the_key_of_weights_knows_nothing_of_configuration_and_graphs():
    """So neither a message about a config nor a change of the model's graphs causes a model to be quantized again."""
    found = our_modules("export.weights.storing")
    rooms = {name.rpartition(".")[0] for name in found}
    assert {"export.checkpoints", "export.weights"} <= rooms
    assert not rooms & {"export.configuration", "export.onnx_graphs", "export.proof"}


def test_a_stage_runs_once(tmp_path):
    runs = []

    def fill(folder):
        runs.append(folder)
        (folder / "result").write_text("made")

    folder = run_stage(tmp_path, "graphs", "k1", fill)
    assert folder == stage_folder(tmp_path, "graphs", "k1") == run_stage(tmp_path, "graphs", "k1", fill)
    assert (folder / "result").read_text() == "made"
    assert len(runs) == 1
    assert runs[0] != folder  # filled elsewhere, then renamed


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "graphs", "k1", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leftover", ["graphs-k1.tmp", "graphs-k0.tmp", "graphs-k0"])
def test_what_an_earlier_run_left_is_in_nobodys_way(tmp_path, leftover):
    """A killed run leaves its temporary folder, and results under other keys are stale."""
    (tmp_path / leftover).mkdir()
    (tmp_path / leftover / "half").write_text("half")
    (tmp_path / "library-k0").mkdir()
    folder = run_stage(tmp_path, "graphs", "k1", lambda folder: (folder / "result").write_text("made"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs-k1", "library-k0"]
    assert [path.name for path in folder.iterdir()] == ["result"]


HOLD = """
import sys
from pathlib import Path
from export.stage import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_waits_and_says_so(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=stage.ROOT, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        told, entered = threading.Event(), threading.Event()
        messages = []

        def announce(message):
            messages.append(message)
            told.set()

        def second():
            with locked(tmp_path, announce):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(30)
        assert not entered.is_set()
        assert str(tmp_path) in messages[0]
        assert "waiting" in messages[0]
        holder.stdin.close()
        assert entered.wait(30)
        thread.join()


def test_a_killed_process_holds_no_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=stage.ROOT, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    messages = []
    with locked(tmp_path, messages.append):
        pass
    assert messages == []
