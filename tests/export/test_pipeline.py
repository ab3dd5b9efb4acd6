"""What is known to be refused later is refused before a compile takes time."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from build.compile import compile_job
from export import memory_use
from export.calibration.fixed_text import OPTICKS
from export.job import Job
from export.pipeline import export_model
from export.weights.stored import StoredWeights
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


class Traced(Exception):
    """Ends an export whose weights are stored."""


@pytest.fixture
def stored(case, tmp_path, monkeypatch):
    """A function that exports with some settings as far as the stored weights, and returns them with their folder."""
    monkeypatch.chdir(shutil.copytree(case, tmp_path / "copy"))

    def trace(*_arguments):
        raise Traced

    monkeypatch.setattr("export.onnx_graphs.tracing.trace_over", trace)

    def export(*settings):
        with pytest.raises(Traced):
            export_model(Job.load(tmp_path / "copy" / "planned.yaml", settings))
        (folder,) = (path for path in (tmp_path / "copy").glob("out/.work/planned/*") if path.is_dir())
        return StoredWeights.open(folder)

    return export


def test_a_text_of_the_users_is_calibrated_on(stored, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"The text number {i} says nothing new."}) for i in range(100)))
    found = {
        method: stored("quantize.scheme=int4", f"quantize.method={method}", f"quantize.calibration={text}")
        for method in ("search", "weighted_search", "gptq")
    }
    assert {method: weights.record.quantization.method for method, weights in found.items()} == {m: m for m in found}
    weights = found["gptq"]  # the last, which took the place of the others
    record = msgspec.json.decode((weights.folder / "rounding.json").read_bytes())
    assert record["text"] == str(text)
    assert 3000 < record["tokens"] <= 16 * 512
    rounded = {tensor.name for tensor in weights.record.tensors if tensor.stored.grouped}
    assert {error["tensor"] for error in record["errors"]} == rounded != set()


def test_without_a_tokenizer_the_weights_alone_count(stored, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("checkpoint", name).unlink()
    assert stored("quantize.scheme=int4").record.quantization.method == "search"
    told = " ".join(capsys.readouterr().err.split())
    assert "checkpoint has no tokenizer to read a calibration text with, so quantize.method is search instead" in told


def test_a_method_that_solves_needs_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "checkpoint" / name).unlink()
    found = refused(folder, "quantize.scheme=int4", "quantize.method=gptq")
    assert "quantize.method is gptq, which reads a calibration text, but the checkpoint has no tokenizer; add" in found


def test_a_text_that_quality_is_measured_on(folder):
    (folder / "text").write_text(OPTICKS.open().content[1000:3000])
    found = refused(folder, "quantize.scheme=int4", "quantize.calibration=text")
    assert "quantize.calibration: text shares the words" in found


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
