"""What is known to be refused later is refused before a compile takes time."""

import json
import shutil

import pytest

from build.compile import compile_job
from export import memory_use
from export.job import Job
from export.pipeline import export_model
from runtime.errors import UserError
from runtime.process_memory import machine_memory
from tests.helpers.artifacts import Case, write_case

CASE = Case({"num_hidden_layers": 1, "sliding_window": None}, {"shape": {"prefill_chunk": 4, "cache_len": 8}})


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    write_case("planned", CASE, folder)
    return folder


@pytest.fixture
def folder(case, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(case, tmp_path / "copy"))
    monkeypatch.setattr("export.pipeline.store_weights", lambda *_: pytest.fail("weights were stored"))
    monkeypatch.setattr("export.onnx_graphs.tracing.trace_over", lambda *_: pytest.fail("graphs were traced"))
    return tmp_path / "copy"


def refused(folder, *settings):
    with pytest.raises(UserError) as told:
        export_model(Job.load(folder / "planned.yaml", settings))
    assert not [path for path in folder.glob("out/.work/planned/*") if path.name.startswith("weights-")]
    return str(told.value)


@pytest.mark.parametrize(("file", "key"), [("generation_config.json", "eos_token_id"), ("config.json", "bos_token_id")])
def test_special_ids_outside_the_vocabulary(folder, file, key):
    path = folder / "checkpoint" / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {key: 999}))
    if key == "bos_token_id":
        (folder / "checkpoint" / "tokenizer_config.json").write_text("{}")
        tokenizer = folder / "checkpoint" / "tokenizer.json"  # what its post-processor puts before a text would count
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"post_processor": None}))
    assert "the tokenizer has the special id 999, expected 0 to 319; correct it in the checkpoint" in refused(folder)


def test_caches_that_take_all_memory(folder, monkeypatch):
    monkeypatch.setattr(memory_use, "machine_memory", lambda: 10**10)
    found = refused(folder, "shape.cache_len=2147483647")
    assert "compiling with caches of 2147483647 slots takes 103.1 GB of memory, but this machine has 10.0 GB" in found


def test_caches_whose_graphs_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(memory_use, "machine_memory", lambda: 10**12)
    found = refused(folder, "shape.cache_len=2147483647")
    assert "the caches have 2147483647 slots of different lengths, and a graph can be written for at most" in found


def test_a_machine_with_little_memory(folder, monkeypatch):
    monkeypatch.setattr(memory_use, "machine_memory", lambda: 10**8)
    assert "storing the weights takes 0." in refused(folder)


def test_a_template_that_fails(folder):
    (folder / "checkpoint" / "chat_template.jinja").write_text("{% for %}")
    assert "checkpoint fails on one short message: " in refused(folder)


def test_stored_weights_do_not_hide_caches_that_take_all_memory(case, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(case, tmp_path / "copy"))
    export_model(Job.load(tmp_path / "copy" / "planned.yaml", []))
    monkeypatch.setattr(memory_use, "machine_memory", lambda: 10**10)
    monkeypatch.setattr("export.onnx_graphs.tracing.trace_over", lambda *_: pytest.fail("graphs were traced"))
    with pytest.raises(UserError, match="compiling with caches of 1000000000 slots takes"):
        export_model(Job.load(tmp_path / "copy" / "planned.yaml", ["shape.cache_len=1000000000"]))


def test_the_machine_has_memory():
    assert 10**8 < machine_memory() < 10**14


@pytest.mark.parametrize("kind", ["folder", "file", "link", "web app", "artifact with notes"])
def test_the_place_of_the_artifact_is_somebody_elses(folder, monkeypatch, kind):
    monkeypatch.setattr(Job, "start", lambda *_: pytest.fail("the export was run"))
    place = folder / "out" / "planned"
    place.parent.mkdir(exist_ok=True)
    if kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    elif kind == "web app":
        place.mkdir()
        (place / "manifest.json").write_text('{"name": "my web app"}')
    elif kind == "artifact with notes":
        place.mkdir()
        (place / "manifest.json").write_text('{"schema_version": 1, "build_key": "0", "files": []}')
        (place / "notes.txt").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"out/planned exists and is not an artifact"):
        compile_job(Job.load(folder / "planned.yaml", []))
    assert place.is_symlink() or place.exists()
