"""The rival's loop must compute what ours computes, or its speed would mean nothing.

The printed figures must follow from the rounds.
"""

import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from rich.table import Table

from build.bench import __main__ as module
from build.bench import limits, line_up, probes
from build.bench.__main__ import run_once
from build.bench.contenders import SCHEMES, Contender, Task
from build.bench.formats import FORMATS
from build.bench.levels import distinct_levels, held_levels, kernel_level
from build.bench.line_up import known_names
from build.bench.machine_limits import Limit, LimitsProcess, MachineLimits, Prepared
from build.bench.plot import draw_speeds
from build.bench.processes import json_of
from build.bench.report import decode_table, limits_table, markdown, memory_table, prefill_table, write_json
from build.bench.rival_onnxruntime import OnnxruntimeEngine
from build.bench.rival_transformers import TransformersEngine, load_model
from build.kernels.cpu.level import LEVELS
from build.kernels.cpu.limits import READERS
from build.tools.random_checkpoint import SHAPES
from build.tools.variants import VARIANTS
from export.configuration.config import artifact_dir
from export.job import Job
from runtime.artifact.bounds import relative_bound
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import CpuLevel
from runtime.bench import BenchReport, Speeds, Workload
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError
from tests.helpers.artifacts import WINDOW
from tests.helpers.bench_runs import contender, measured, outcome

STEPS = 20  # past the window of 8 and, with the longest prompt, past two chunks


@pytest.mark.parametrize("name", ["windowed", "fp16", "int8"])
@pytest.mark.parametrize("prompt", [1, 5, 17])
def test_onnxruntime_loop_gives_the_logits_of_the_engine(compile_case, name, prompt):
    case = compile_case(name)
    ours, theirs = SideBySide(Engine.open(case.artifact, threads=2), 1), OnnxruntimeEngine(case.graphs, 2)
    rng = np.random.default_rng(prompt)
    vocab_size = ours.manifest.model.vocab_size
    for _ in range(2):  # the second time with stale caches
        ours.reset()
        theirs.reset()
        ids = rng.integers(vocab_size, size=(ours.batch, prompt)).tolist()
        check(theirs.prefill(ids), ours.prefill(ids), ours.manifest)
        for _ in range(STEPS):
            step = rng.integers(vocab_size, size=ours.batch).tolist()
            check(theirs.decode(step), ours.decode(step), ours.manifest)
    assert theirs.position == len(ours.engine.tokens(0)) == prompt + STEPS


def check(found, expected, manifest):
    assert found.shape == expected.shape
    bound = relative_bound(
        manifest.model, manifest.shape.cache_len, manifest.cache_dtype, rounding=manifest.quantization.rounding
    )
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("prompt", [1, 17])
def test_transformers_loop_gives_the_logits_of_the_engine(compile_case, prompt):
    case = compile_case("windowed")
    ours, theirs = (
        SideBySide(Engine.open(case.artifact, threads=2), 1),
        TransformersEngine(load_model(case.folder / "checkpoint", torch.float32)),
    )
    for found, expected in rival_logits(theirs, ours, prompt, ours.manifest.model.vocab_size):
        check(found, expected, ours.manifest)


@pytest.mark.parametrize("prompt", [1, 17])
def test_genai_loop_gives_the_logits_of_transformers(compile_case, tmp_path, monkeypatch, prompt):
    """The model has no window."""
    rival = pytest.importorskip("build.bench.rival_genai", exc_type=ImportError, reason="needs `make setup BENCH=1`")
    monkeypatch.setattr(rival, "ROOT", tmp_path)
    case = compile_case("int4")
    model, checkpoint = Artifact.open(case.artifact).manifest.model, case.folder / "checkpoint"
    reference = TransformersEngine(load_model(checkpoint, torch.float32))
    bound = relative_bound(model, prompt + STEPS, "fp32")
    for found, expected in rival_logits(
        rival.GenaiEngine(rival.built(checkpoint, "fp32"), 40, 1), reference, prompt, model.vocab_size
    ):
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def rival_logits(theirs, reference, prompt, vocab_size):
    """Logits of both after the same ids, twice: the second time after a reset."""
    rng = np.random.default_rng(prompt)
    for _ in range(2):
        reference.reset()
        theirs.reset()
        ids = rng.integers(vocab_size, size=(1, prompt)).tolist()
        yield theirs.prefill(ids), reference.prefill(ids)
        for _ in range(STEPS):
            step = rng.integers(vocab_size, size=1).tolist()
            yield theirs.decode(step), reference.decode(step)


def test_room_is_that_of_the_engine(compile_case):
    case = compile_case("int8")
    ours, theirs = SideBySide(Engine.open(case.artifact, threads=1), 1), OnnxruntimeEngine(case.graphs, 1)
    for engine in (ours, theirs):
        engine.reset()
        engine.prefill([[1, 2, 3]])
    assert ours.room() == theirs.room() == 37


OUTCOMES = [
    outcome(
        contender("ours", "fp32", compile_s=7.4), measured(100.0, {64: 30.0, 4096: 20.0}, gb_s=16.0, held_mb=260.0)
    ),
    outcome(contender("ours", "int8", model="1.1B"), measured(50.0, {64: 12.0}), disturbed=True),
    outcome(contender("ours", "int8", level="x86-64-v3"), measured(110.0, {64: 75.0, 4096: 60.0}), read=40.0),
    outcome(contender("llama.cpp", "Q8_0"), *(measured(tok_s, {64: tok_s}) for tok_s in (80.0, 90.0, 120.0))),
]
LABELS = ["ours fp32", "ours int8, 1.1B", "ours int8, avx2", "llama.cpp Q8_0"]


def cells(table):
    return {column.header: list(column.cells) for column in table.columns}


def test_tables_have_a_row_for_each_contender():
    decode = cells(decode_table(OUTCOMES))
    assert decode["contender"] == LABELS
    assert decode["at 64"][:3] == ["30.0 (30.0-30.0)", "12.0 (12.0-12.0)", "75.0 (75.0-75.0)"]
    assert decode["at 64"][3] == "90.0 (85.0-105.0)"
    assert decode["at 4096"] == ["20.0 (20.0-20.0)", "", "60.0 (60.0-60.0)", ""]
    assert decode["of read"] == ["0.80", "0.50", "0.25", "0.50"]
    assert decode["disturbed"] == ["", "1 of 1", "", ""]
    prefill = cells(prefill_table(OUTCOMES, 512))
    assert prefill["tok/s"] == ["100 (100-100)", "50 (50-50)", "110 (110-110)", "90 (85-105)"]
    assert prefill["of peak"][0] == "1.00 (1.00-1.00)"
    assert prefill["peak"] == ["float32", "float32", "float32", ""]
    memory = cells(memory_table(OUTCOMES))
    assert (memory["over weights and caches, MB"], memory["compile s"]) == (["40", "", "", ""], ["7", "", "", ""])


def test_the_limits_are_shown_with_how_far_they_moved():
    assert [row[0] for row in zip(*cells(limits_table(OUTCOMES)).values(), strict=True)] == [
        "reading, GB/s",
        "float32 on avx2, GFLOP/s",
    ]
    assert cells(limits_table(OUTCOMES))["least"] == ["20.0", "100"]
    assert cells(limits_table(OUTCOMES))["most"] == ["40.0", "100"]


def test_tables_are_written_as_markdown():
    table = Table(title="speeds")
    table.add_column("what")
    table.add_column("tok/s", justify="right")
    table.add_row("ours", "1.0")
    assert markdown(table) == "speeds:\n\n| what | tok/s |\n|---|---:|\n| ours | 1.0 |"


def test_json_has_every_run(tmp_path):
    write_json(tmp_path / "x.json", "a machine", OUTCOMES, [{"what": "decode"}], {"rounds": 3})
    record = json.loads((tmp_path / "x.json").read_text())
    assert (record["machine"], record["rounds"], record["goals"]) == ("a machine", 3, [{"what": "decode"}])
    assert [result["disturbed"] for result in record["results"]] == [0, 1, 0, 0]
    assert [len(result["runs"]) for result in record["results"]] == [1, 1, 1, 3]
    assert record["results"][3]["decode_tok_s"]["64"] == {"low": 85.0, "median": 90.0, "high": 105.0}
    assert record["results"][2]["runs"][0]["before"]["read"]["best"] == 40.0


def test_schemes_are_variants_and_known_formats():
    assert {own.variant for own in SCHEMES.values()} <= set(VARIANTS)
    assert {own.format for own in SCHEMES.values()} <= set(FORMATS)


def test_contenders_are_asked_for_by_names_without_a_level():
    assert [o.entry.name for o in OUTCOMES] == ["fp32", "1.1B int8", "int8", "llama.cpp Q8_0"]
    assert {o.entry.name for o in OUTCOMES} <= known_names()


def test_limits_are_measured_for_each_line_of_the_input(monkeypatch, capfd):
    """Every kernel runs and gives a plausible figure: each is more than 0.1 and less than 10,000."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr(probes, "SURVEY_SECONDS", 0.0)
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    monkeypatch.setattr(probes, "READERS", [reader for reader in READERS if reader.streams == 3])
    monkeypatch.setattr(probes, "READ_BYTES", 2 * probes.PIECE)
    monkeypatch.setattr("sys.stdin", ["\n", "\n"])
    limits.main("avx2,any")
    printed, problems = capfd.readouterr()
    first, *lines = printed.splitlines()
    assert msgspec.json.decode(first, type=Prepared).reader.startswith("3 streams")
    found = [msgspec.json.decode(line, type=MachineLimits) for line in lines]
    assert [set(one.peaks["avx2"]) for one in found] == [{"float32", "int8 dot", "int4 words"}] * 2
    assert set(found[0].peaks["any"]) == {"float32"}
    for limit in (limit for one in found for limit in one.all()):
        assert 0.1 < limit.typical <= limit.best < 1e4
    assert "is not valid" not in problems  # as LLVM says of a processor that it does not know


ANSWERS = """
import sys
print('{"reader": "in order"}', flush=True)
for line in sys.stdin:
    print('{"read": {"best": 2, "typical": 1}, "peaks": {}}', flush=True)
"""


def test_the_process_that_measures_limits_answers_until_it_is_closed():
    with LimitsProcess(1, ["avx2"], (sys.executable, "-c", ANSWERS)) as process:
        assert process.reader == "in order"
        assert [process.measure() for _ in range(2)] == [MachineLimits(Limit(2.0, 1.0), {})] * 2
    assert process._process.returncode == 0


def test_limits_that_cannot_be_measured_are_named():
    with pytest.raises(UserError, match="measuring the machine's limits failed"):
        LimitsProcess(1, [], (sys.executable, "-c", "raise SystemExit(1)"))


def test_plot_names_every_contender(tmp_path):
    draw_speeds(OUTCOMES, 512, tmp_path / "x.svg")
    drawing = (tmp_path / "x.svg").read_text()
    assert drawing.startswith("<?xml")
    assert all(label in drawing for label in LABELS)  # as comments beside the glyphs


def test_the_worker_and_the_command_on_the_box_speak_the_same_json(compile_case):
    case = compile_case("windowed")
    workload = msgspec.json.encode(Workload((16,), (8,), 2, 1)).decode()
    flags = ("--json", "--repeats", "1", "--tokens", "2", "--prompt-tokens", "16", "--context", "8", "--threads", "1")
    ours = run_once(Contender("ours", "fp32", (sys.executable, "-m", "runtime.bench", str(case.artifact), *flags)))
    theirs = run_once(
        Contender(
            "onnxruntime",
            "fp32",
            (sys.executable, "-m", "build.bench.rival_onnxruntime", str(case.graphs.path), workload, "1"),
        )
    )
    for found in (ours, theirs):
        assert [p.prompt_tokens for p in found.speeds.prefill] == [16]
        (decode,) = found.speeds.decode
        assert decode.context == 8
        assert min(found.speeds.prefill[0].tok_s, decode.tok_s, decode.gb_s, found.peak_rss_mb) > 0
    weights = sum(
        a.nbytes for name, a in Artifact.open(case.artifact).weights().items() if not name.startswith("tok_embeddings")
    )
    expected = weights + 2 * 2 * 2 * 16 * 4 * WINDOW  # layers, k and v, heads, dim
    assert ours.speeds.decode[0].bytes_per_step == theirs.speeds.decode[0].bytes_per_step == expected


def test_a_contender_that_fails_is_named():
    with pytest.raises(UserError, match="measuring ours int8 ended with status 3"):
        run_once(Contender("ours", "int8", (sys.executable, "-c", "raise SystemExit(3)")))


def test_cuda_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nfrontend: {checkpoint: none}\nbackend: {target: cuda}\n")
    with pytest.raises(
        UserError, match=r"backend.target is cuda, expected a target whose rivals run here.*--set backend.target=llvm"
    ):
        module.main([str(tmp_path / "x.yaml")])


def test_a_level_is_known_by_llvms_name():
    assert kernel_level("x86-64-v3").name == "avx2"
    assert kernel_level("haswell").name == "avx2"
    assert distinct_levels(("x86-64-v3", "haswell", "x86-64")) == ("x86-64-v3", "x86-64")
    assert held_levels(("best", "x86-64-v4", "x86-64-v3"), [CpuLevel(cpu="x86-64-v3", features=())]) == [
        "best",
        "x86-64-v3",
    ]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("name: x\nfrontend: {checkpoint: none.gguf}\nbackend: {target: llvm}\n")
    return str(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "int9"], "--only names 'int9', expected some of .*1.1B int8"),
        (["--levels", "best,x86-64-v9"], "x86-64-v9'?, which LLVM does not know"),
        (["--contexts", "64,-1"], "'64,-1' is not a list of token counts"),
        (["--prompt", "0"], "--prompt is 0, expected at least 1"),
        (["--again", "-1"], "--again is -1, expected at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(config, flags, message):
    with pytest.raises(UserError, match=message):
        module.main([config, *flags])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["fp32"], ["ours fp32"]),
        (["onnxruntime fp32"], ["onnxruntime fp32"]),
        (["fp32", "onnxruntime fp32", "int8"], ["ours fp32", "ours int8", "onnxruntime fp32"]),
    ],
)
def test_our_graphs_can_be_measured_in_onnxruntime_alone(config, monkeypatch, asked, expected):
    job = Job.load(Path(config))
    monkeypatch.setattr("build.tools.variants.fitting_variants", lambda _job, *, is_quantized: list(VARIANTS))
    monkeypatch.setattr(line_up, "is_quantized", lambda _config: False)
    monkeypatch.setattr(line_up, "flops_per_token", lambda _config: 1.0)
    monkeypatch.setattr(line_up, "compiled", lambda job, scheme, *_: ([Contender("ours", scheme, ())], job))
    monkeypatch.setattr(line_up, "_graphs", lambda _job: Path("graphs.json"))
    task = Task(Workload((16,), (8,), 2, 1), 1)
    assert [entry.label for entry in line_up.contenders(job, task, large=False, only=asked)] == expected


def test_the_large_model_is_written_and_read_by_both_sides(config, monkeypatch):
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 64}
    monkeypatch.setitem(SHAPES, "1.1b", {**SHAPES["1.1b"], **small, "num_attention_heads": 4})
    monkeypatch.setattr("build.tools.variants.fitting_variants", lambda _job, *, is_quantized: [])
    monkeypatch.setattr(line_up, "is_quantized", lambda _config: False)
    monkeypatch.setattr(line_up.importlib.util, "find_spec", lambda _name: True)
    operations_of = []

    def compiled(job, scheme, _task, operations, model):
        operations_of.append(operations)
        return [Contender("ours", scheme, (), model=model)], job

    monkeypatch.setattr(line_up, "compiled", compiled)
    monkeypatch.setattr(line_up, "_own_model", lambda *_: [])
    task = Task(Workload((16,), (8, 64), 2, 1), 1)
    for _ in range(2):  # the second time, its files are there
        found = line_up.contenders(Job.load(Path(config)), task, large=True, only=["1.1B int8", "1.1B llama.cpp Q8_0"])
        assert [entry.label for entry in found] == ["ours int8, 1.1B", "llama.cpp Q8_0, 1.1B"]
    attention, hidden = 4 * 32 * 32, 3 * 32 * 32  # wq, wk, wv and wo have 4 heads of 8 each; w1, w2, w3
    assert set(operations_of) == {2 * (attention + hidden)}
    gguf = Path(next(part for part in found[1].command if part.endswith(".gguf")))
    assert {tensor.name for tensor in GGUFReader(gguf).tensors} >= {"token_embd.weight", "blk.0.attn_q.weight"}


def test_a_matrix_larger_than_the_memory_that_is_read_is_read_again_and_again(monkeypatch):
    monkeypatch.setattr(probes, "READ_BYTES", 2**16)
    [probe] = probes.read_probes(LEVELS[-1], 1, READERS[:1], 2**17)
    probe.call()
    assert probe.rate(2.0) == probe.work / 2e9


def test_a_forced_level_must_be_the_one_that_ran(monkeypatch):
    """The engine says which of an artifact's levels ran, here another one."""
    reported = BenchReport(
        *("x", "x", "none", "fp32", "a processor", "x86-64-v3", 1, 0.1, 1.0, 1.0, "among them", 1, 1.0, "numpy"),
        speeds=Speeds((), (), ()),
    )
    monkeypatch.setattr(module, "json_of", lambda command, what, environment: msgspec.json.encode(reported))
    assert run_once(contender("ours", "fp32", level="x86-64-v3")).speeds == reported.speeds
    assert run_once(contender("ours", "fp32")).speeds == reported.speeds
    with pytest.raises(UserError, match="measuring ours fp32, avx2: it ran code for x86-64-v3, expected znver4"):
        run_once(contender("ours", "fp32", level="znver4"))


def test_a_forced_level_is_in_the_environment_of_its_process():
    forced = {"RUNTIME_CPU_LEVEL": "x86-64-v3"}
    program = (sys.executable, "-c", "import os; print(1); print(os.environ['RUNTIME_CPU_LEVEL'])")
    assert json_of(program, "ours", forced) == b"x86-64-v3"


@pytest.mark.parametrize("label", SCHEMES)
def test_every_scheme_can_name_an_artifacts_folder(label):
    assert artifact_dir(Path(f"demo-bench-{label}.yaml")).name == f"demo-bench-{label}"
