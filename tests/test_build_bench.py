"""The rival's loop must compute what ours computes, or its speed would mean nothing; and the figures that are printed must follow from the rounds."""

import sys

import msgspec
import numpy as np
import pytest

from build import bench as module
from build.bench import Contender, OnnxruntimeEngine, Result, promises, results_table, run_once, run_rounds
from runtime.artifact import Artifact
from runtime.bench import DecodeSpeed, PrefillSpeed, Speeds, Workload
from runtime.bounds import relative_bound
from runtime.engine import Engine
from runtime.errors import UserError
from tests.artifacts import WINDOW

STEPS = 20  # past the window of 8 and, with the longest prompt, past two chunks


@pytest.mark.parametrize("name", ["windowed", "fp16", "int8"])
@pytest.mark.parametrize("prompt", [1, 5, 17])
def test_onnxruntime_loop_gives_the_logits_of_the_engine(compile_case, name, prompt):
    case = compile_case(name)
    ours, theirs = Engine.open(case.artifact, threads=2), OnnxruntimeEngine(case.graphs, 2)
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
    assert theirs.position == ours.position == prompt + STEPS


def check(found, expected, manifest):
    assert found.shape == expected.shape
    bound = relative_bound(manifest.model, manifest.shape.cache_len, manifest.cache_dtype, rounded=manifest.quantization.dynamic)
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def test_room_is_that_of_the_engine(compile_case):
    case = compile_case("int8")
    ours, theirs = Engine.open(case.artifact, threads=1), OnnxruntimeEngine(case.graphs, 1)
    for engine in (ours, theirs):
        engine.reset()
        engine.prefill([[1, 2, 3], [4, 5, 6]])
    assert ours.room() == theirs.room() == 37


RESULTS = [
    Result("ours", "fp32", 100.0, {64: 30.0, 512: 20.0}, 16.0),
    Result("ours", "int8", 110.0, {64: 75.0, 512: 50.0}, 11.0),
    Result("onnxruntime", "fp32", 90.0, {64: 20.0, 512: 10.0}, 10.0),
    Result("onnxruntime", "int8", 80.0, {64: 5.0, 512: 4.0}, 1.0),
]


def test_promises_are_ratios_of_decode_at_the_short_context():
    assert [(r.what, r.measured, r.at_least) for r in promises(RESULTS)] == [
        ("decode fp32 against onnxruntime fp32", 1.5, 1.0),
        ("decode int8 against our fp32", 2.5, 2.0),
    ]


def test_table_has_a_row_for_each_contender():
    table = results_table(RESULTS, 20.0, 128)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["what"] == ["ours", "ours", "onnxruntime", "onnxruntime"]
    assert columns["prefill 128"] == ["100.0", "110.0", "90.0", "80.0"]
    assert columns["share"] == ["80%", "55%", "50%", "5%"]
    assert columns["ratio"] == ["1.50", "3.75", "1.00", "0.25"]


def test_rounds_alternate_and_give_medians(monkeypatch):
    speeds = {"a": [1.0, 100.0, 3.0], "b": [7.0, 5.0, 6.0]}  # tokens per second, round by round
    order = []

    def run_once(entry):
        order.append(entry.what)
        speed = speeds[entry.what][len(order) - 1 >> 1]
        return Speeds((PrefillSpeed(128, 1.0, 10 * speed),), (DecodeSpeed(64, 1.0, speed, 1, speed / 4),), ())

    monkeypatch.setattr(module, "run_once", run_once)
    monkeypatch.setattr(module, "fresh_read_bandwidth", lambda _threads: float(len(order)))
    results, bandwidth = run_rounds([Contender("a", "fp32", ()), Contender("b", "fp32", ())], 3, 1)
    assert order == ["a", "b"] * 3
    assert bandwidth == 4.0  # the best of 0, 2 and 4
    assert [(r.prefill_tok_s, r.decode_tok_s, r.gb_s) for r in results] == [(30.0, {64: 3.0}, 0.75), (60.0, {64: 6.0}, 1.5)]


def test_the_worker_and_the_command_on_the_box_speak_the_same_json(compile_case):
    case = compile_case("windowed")
    workload = msgspec.json.encode(Workload((16,), (8,), 2, 1)).decode()
    flags = ("--json", "--repeats", "1", "--tokens", "2", "--prompt-tokens", "16", "--context", "8", "--threads", "1")
    ours = run_once(Contender("ours", "fp32", (sys.executable, "-m", "runtime.bench", str(case.artifact), *flags)))
    command = (sys.executable, "-m", "build.bench", module.WORKER_FLAG, str(case.graphs.folder), workload, "1")
    theirs = run_once(Contender("onnxruntime", "fp32", command))
    for speeds in (ours, theirs):
        assert [p.prompt_tokens for p in speeds.prefill] == [16]
        assert [d.context for d in speeds.decode] == [8]
        assert min(speeds.prefill[0].tok_s, speeds.decode[0].tok_s, speeds.decode[0].gb_s) > 0
    weights = sum(a.nbytes for name, a in Artifact.open(case.artifact).weights().items() if not name.startswith("tok_embeddings"))
    assert ours.decode[0].bytes_per_step == theirs.decode[0].bytes_per_step == weights + 2 * 2 * 2 * 16 * 4 * WINDOW  # layers, k and v, heads, dim


def test_a_contender_that_fails_is_named():
    with pytest.raises(UserError, match="measuring ours int8 ended with status 3"):
        run_once(Contender("ours", "int8", (sys.executable, "-c", "raise SystemExit(3)")))


def test_cuda_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nfrontend: {checkpoint: none}\nbackend: {target: cuda}\n")
    with pytest.raises(UserError, match=r"backend.target is cuda, expected llvm.*--set backend.target=llvm"):
        module.main([str(tmp_path / "x.yaml")])
