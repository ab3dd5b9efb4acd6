"""The predictions of `make plan` are what a compile then measures.

They come from headers alone, without torch and TVM.
"""

import json
import subprocess
import sys

import pytest

from build import __main__ as build_command
from build.packing.pack import packed_weights
from build.tools.footprint import Footprint, caches_of
from build.tools.plan import file_bytes, plan
from build.tools.random_checkpoint import SHAPES, headers, write_random_checkpoint
from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.configuration.config import CompileConfig, load_config
from export.job import Job
from export.pipeline import export_model
from export.results import export_record
from export.stage import ROOT
from runtime.artifact.folder import Artifact
from runtime.engines.engine import Engine
from runtime.engines.loaded_artifact import PROCESS_BYTES
from runtime.errors import UserError
from tests.helpers.artifacts import CASES, ONE_LEVEL, rings_of, write_case

HOST_PEAKS = ("host: export, peak memory", "host: build, peak memory")


def config(**sections: object) -> CompileConfig:
    return CompileConfig.model_validate(
        {"name": "x", "frontend": {"checkpoint": "."}, "backend": {"target": "llvm"}, **sections}
    )


def rows(text: str) -> dict[str, float | None]:
    """The lines of a printed table, in MB, by name."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("  ")
        value = rest.split()
        if value and name.startswith(("artifact", "caches", "box", "host")):
            found[name] = None if value[0] == "-" else float(value[0].replace(",", ""))
    return found


@pytest.mark.parametrize("case", CASES)
def test_weights_tokenizer_and_caches_are_exact(compile_case, case):
    compiled = compile_case(case)
    footprint = plan(compiled.config, compiled.checkpoint)
    sizes = {entry.path: entry.size for entry in Artifact.open(compiled.artifact).manifest.files}
    # Which levels change no kernel, and what `native` is, only the compile finds out.
    further = {f"library.{cpu}.so" for cpu in compiled.config.backend.cpu[1:]}
    exact = {name for name in sizes if not name.startswith("library")}
    assert footprint.files.keys() == {*exact, "library.so", *further, "manifest.json"}
    for name in exact:
        assert footprint.files[name] == sizes[name], name
    caches = rings_of(Engine.open(compiled.artifact))
    assert footprint.caches.sequences * footprint.caches.sequence_bytes == sum(array.nbytes for array in caches)
    assert file_bytes(compiled.graphs.record.weights) == (compiled.graphs.folder / "weights.safetensors").stat().st_size


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_exact_is_within_what_the_table_says(compile_case, case):
    """Here the library's constants are about as large as the library; in a model of gigabytes they are negligible."""
    compiled = compile_case(case)
    footprint = plan(compiled.config, compiled.checkpoint)
    library = (compiled.artifact / "library.so").stat().st_size
    manifest = (compiled.artifact / "manifest.json").stat().st_size
    assert abs(footprint.files["library.so"] - library) < 300_000
    # CPU flags and tool versions, which LLVM and pip know
    assert abs(footprint.files["manifest.json"] - manifest) < 1_000
    disk = sum(path.stat().st_size for path in compiled.workspace.rglob("*") if path.is_file())
    assert abs(footprint.workspace - disk) < 400_000


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A random model of 24 million parameters, planned and then compiled with the commands that a person uses."""
    folder = tmp_path_factory.mktemp("plan")
    SHAPE = {
        **SHAPES["tiny"],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "vocab_size": 20000,
        "num_attention_heads": 32,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "medium", SHAPE)  # type: ignore[arg-type]
        write_random_checkpoint(folder / "checkpoint", "medium", 2)
    text = {
        "name": "medium",
        "frontend": {"checkpoint": "checkpoint"},
        "backend": {"target": "llvm", "cpu": ONE_LEVEL},
    }
    (folder / "medium.yaml").write_text(json.dumps(text))

    def run(module: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            [sys.executable, "-m", module, "medium.yaml"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    run.folder = folder
    return run


def test_the_plan_is_within_three_percent_of_the_compile(command, monkeypatch, capsys):
    """Compare line by line, as printed.

    The weights (86 MB here) are large enough that the library's 0.3 MB do not count.
    """
    planned = rows(command("build.tools.plan").stdout)
    made = command("build")
    assert made.returncode == 0, made.stderr
    measured = rows(made.stdout)
    assert list(planned) == list(measured)
    assert planned["artifact: weights.safetensors"] == measured["artifact: weights.safetensors"]
    for name in (
        "artifact, in all",
        "caches, a slot",
        "host: workspace on disk",
        "host: workspace and artifact on disk",
    ):
        assert measured[name] == pytest.approx(planned[name], rel=0.03), name
    # 3 % where the constants were measured; what loaded libraries take (0.35 GB of these peaks) differs by kernel and
    # cores
    for name in HOST_PEAKS:
        assert measured[name] == pytest.approx(planned[name], rel=0.1), name
    monkeypatch.chdir(command.folder)
    monkeypatch.setattr(sys, "argv", ["build", "medium.yaml"])
    assert build_command.main() == 0  # in this process: nothing is made, so no memory is measured
    again = rows(capsys.readouterr().out)
    assert again.pop("host: build, peak memory") is None  # nothing was built
    assert measured.pop("host: build, peak memory") > 100
    assert again == measured


def test_ministral_keeps_44_percent():
    checkpoint = headers("ministral-8b", {})
    footprint = plan(load_config(ROOT / "yaml" / "ministral-8b.yaml"), checkpoint)
    caches = footprint.caches
    assert (caches.full_layers, caches.window_layers) == (9, 27)
    assert caches.full_bytes == 9 * 131072 * 2 * 8 * 128 * 2  # slots, keys and values, heads, head_dim, float16
    ring = 32768 + 512  # a window, and what a call of 512 tokens adds, less one, in whole blocks of 16
    assert caches.window_bytes == 27 * ring * 2 * 8 * 128 * 2
    assert caches.share == pytest.approx((9 * 131072 + 27 * ring) / (36 * 131072))
    assert round(caches.share, 2) == 0.44


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),  # as counted on the models' cards; of the last two text models, from their sizes
    [
        ("fp16", "7b", 7_241_732_096),
        ("mistral-7b-v0.1", "7b-v0.1", 7_241_732_096),
        ("mixtral-8x7b", "mixtral-8x7b", 46_702_792_704),
        ("ministral-3-8b", "ministral-3-8b", 8_489_553_920),
        ("mistral-small-24b", "mistral-small-24b", 23_572_403_200),
    ],
)
def test_shipped_configs_are_planned_at_full_depth(name, shape, parameters):
    settings = load_config(ROOT / "yaml" / f"{name}.yaml")
    checkpoint = headers(shape, {})
    assert checkpoint.source_bytes == 2 * parameters
    footprint = plan(settings, checkpoint)
    each = 1 if settings.quantize.scheme == "int8" else 2
    table = checkpoint.model.vocab_size * checkpoint.model.dim  # of embeddings, which stay float16
    expected = each * parameters + (2 - each) * table
    assert footprint.files["weights.safetensors"] == pytest.approx(expected, rel=0.01)  # 1 % is for scales
    held = footprint.files["weights.safetensors"] + footprint.caches.sequence_bytes
    process = PROCESS_BYTES if settings.backend.target == "cuda" else 0  # memory that the driver keeps besides
    assert footprint.box_peak == pytest.approx(held + process, rel=0.02)
    for peak in (footprint.export_peak, footprint.build_peak):
        assert peak < 10**9  # weights are streamed: a process holds blocks, not the model


def test_windows_of_every_layer_bound_the_caches():
    by_length = [
        plan(config(shape={"cache_len": n}), headers("7b-v0.1", {})).caches.sequence_bytes for n in (4096, 32768)
    ]
    assert by_length[0] == by_length[1]
    longer = plan(config(), headers("7b-v0.1", {"sliding_window": 8192})).caches.sequence_bytes
    assert longer * (4096 + 128) == by_length[0] * (8192 + 128)  # each with the columns that a call of 128 adds


def test_memory_does_not_follow_the_depth():
    def peaks(layers: int) -> Footprint:
        shallow = {**SHAPES["7b"], "num_hidden_layers": layers}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHAPES, "7b", shallow)  # type: ignore[arg-type]
            return plan(config(), headers("7b", {}))

    assert peaks(64).export_peak == peaks(1).export_peak
    assert peaks(64).build_peak - peaks(1).build_peak < 63e6  # of 27 GB of weights


def test_rows_that_pair_neighbours_are_read_whole(tmp_path):
    from dataclasses import replace

    write_random_checkpoint(tmp_path / "x", "tiny", 1)
    plain = open_checkpoint(tmp_path / "x", "auto", {})
    weights = {
        name: replace(w, parts=tuple(replace(p, interleaved_heads=4) for p in w.parts))
        for name, w in plain.weights.items()
        if "wo" in name
    }
    interleaved = Checkpoint(plain.model, None, plain.source_bytes, weights, plain.source)
    from export.memory_use import storing_bytes

    whole = 64 * 64 * (2 + 2 + 4)  # bfloat16 as read, in its other order, and as float32
    assert storing_bytes(interleaved, export_record(config(), plain)) == whole


def test_every_function_shares_the_caches_that_are_counted(compile_case):
    manifest = Artifact.open(compile_case("batched").artifact).manifest
    for function in manifest.functions:
        found = caches_of(manifest.model, manifest.shape, function.signature.caches)
        assert found == caches_of(manifest.model, manifest.shape, manifest.caches)
        assert found.sequences == 3
    assert packed_weights(compile_case("batched").graphs.record, "llvm") == manifest.weights


def test_nothing_but_headers_is_read(tmp_path):
    """A checkpoint that lacks its last byte has no valid header.

    With its data replaced by holes, the plan stays the same.
    """
    write_random_checkpoint(tmp_path / "x", "tiny", 1)
    before = plan(config(), open_checkpoint(tmp_path / "x", "auto", {}))
    for path in (tmp_path / "x").glob("*.safetensors"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert plan(config(), open_checkpoint(tmp_path / "x", "auto", {})) == before


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / "x.yaml").write_text(
        json.dumps({"name": "x", "frontend": {"checkpoint": "nowhere"}, "backend": {"target": "llvm"}})
    )
    command = [sys.executable, "-m", "build.tools.plan", "x.yaml"]
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "the checkpoint nowhere does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere", "auto", {})


def test_the_plan_loads_no_torch_and_no_tvm():
    code = (
        "import sys, build.tools.plan; "
        "print([name for name in ('torch', 'tvm', 'tvm_ffi', 'onnx', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            {"prefill_chunk": 2**17, "cache_len": 2**17},
            "function prefill_131072 computes 24576 numbers for each of 131072 tokens at once, "
            "expected at most 2147483647 numbers in all; "
            "make shape.slots, shape.prefill_chunk or shape.cache_len smaller",
        ),
        (
            {"slots": 1024, "prefill_chunk": 16, "cache_len": 2**21},
            "function prefill_16 has past_key_values.0.key [1024, 8, 2097152, 128] float32, expected at most "
            "1099511627776 elements; make shape.slots, shape.prefill_chunk or shape.cache_len smaller",
        ),
    ],
)
def test_sizes_that_no_kernel_can_index_are_refused_from_headers(shape, sentence):
    with pytest.raises(UserError) as error:
        export_record(config(shape=shape), headers("ministral-8b", {}))
    assert str(error.value) == sentence


def test_such_sizes_are_refused_before_any_weight_is_stored(tmp_path):
    path = write_case("huge", CASES["windowed"], tmp_path)
    job = Job.load(
        path,
        [
            f"frontend.checkpoint={tmp_path / 'checkpoint'}",
            f"workspace.path={tmp_path / 'work'}",
            "shape.step_rows=[1, 100000000]",
        ],
    )
    with pytest.raises(UserError, match="expected at most 2147483647 elements; make shape"):
        export_model(job)
    assert list((tmp_path / "work").rglob("*.safetensors")) == []
