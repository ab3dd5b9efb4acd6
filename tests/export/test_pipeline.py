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
    monkeypatch.setattr("export.pipeline.store_checkpoint", lambda *_: pytest.fail("weights were stored"))
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
    assert "the tokenizer has the special id 999, expected 0 to 319; correct it in the checkpoint" in refused(folder)


@pytest.mark.parametrize("slots", [2**31 - 1, 2**29])
def test_caches_that_cannot_be_compiled(folder, slots):
    found = refused(folder, f"shape.cache_len={slots}")
    assert f"compiling with caches of {slots} slots takes" in found
    assert "make shape.cache_len smaller" in found


def test_a_machine_with_little_memory(folder, monkeypatch):
    monkeypatch.setattr(memory_use, "machine_memory", lambda: 10**8)
    assert "this machine has 0.1 GB" in refused(folder)


def test_the_machine_has_memory():
    assert 10**8 < machine_memory() < 10**14


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_the_place_of_the_artifact_is_somebody_elses(folder, monkeypatch, kind):
    monkeypatch.setattr(Job, "start", lambda *_: pytest.fail("the export was run"))
    place = folder / "out" / "planned"
    place.parent.mkdir(exist_ok=True)
    if kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"out/planned exists and is not an artifact"):
        compile_job(Job.load(folder / "planned.yaml", []))
    assert place.is_symlink() or place.exists()
