"""Keys of results."""

import pytest

from export import stage
from export.stage import our_modules, stage_key, tool_versions


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
