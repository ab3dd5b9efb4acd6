"""The rival's loop must compute what ours computes, or its speed would mean nothing.

The printed figures must follow from the rounds.
"""

import sys

import msgspec
import numpy as np
import pytest
import torch

from build.bench import __main__ as module
from build.bench import contenders, report
from build.bench.__main__ import run_once, run_rounds
from build.bench.contenders import Contender
from build.bench.plot import draw_speeds
from build.bench.report import MachineLimits, Result, goals_table, ratios, results_table
from build.bench.rival_onnxruntime import OnnxruntimeEngine
from build.bench.rival_transformers import TransformersEngine, load_model
from build.tools.variants import VARIANTS
from runtime.artifact.bounds import relative_bound
from runtime.artifact.folder import Artifact
from runtime.bench import DecodeSpeed, Measured, PrefillSpeed, Speeds, Workload
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError
from tests.helpers.artifacts import WINDOW

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


def result(what, scheme, prefill, decode, gb_s):
    return Result(
        what,
        scheme,
        prefill,
        512 / prefill,
        dict(zip((64, 4096), decode, strict=True)),
        gb_s,
        300.0,
        260.0 if what == "ours" else None,
    )


LIMITS = MachineLimits(20.0, 1e-6)
RESULTS = [
    result("ours", "fp32", 100.0, (30.0, 20.0), 16.0),
    result("ours", "int8", 110.0, (75.0, 60.0), 11.0),
    result("onnxruntime", "fp32", 90.0, (20.0, 10.0), 10.0),
    result("llama.cpp", "Q8_0", 80.0, (50.0, 4.0), 1.0),
]


def test_ratios_are_of_the_contenders_that_ran():
    found = {goal.what: value for goal, value in ratios(RESULTS, LIMITS)}
    assert found == {
        "decode fp32 / onnxruntime fp32, same graph": 1.5,
        "decode int8 / llama.cpp Q8_0": 1.5,
        "decode fp32, share of read bandwidth": 0.8,
        "decode int8, share of read bandwidth": 0.55,
        "decode int8 at 4096 / at 64": 0.8,
    }


def test_goals_name_what_is_compiled_and_what_runs_beside_it():
    assert set(contenders.SCHEMES) <= set(VARIANTS)
    ours = {("ours", scheme) for scheme in (*contenders.SCHEMES, contenders.LARGE_LABEL)}
    rivals = {(what, scheme) for what, schemes in contenders.RIVAL_SCHEMES.items() for scheme in schemes}
    for goal in report.GOALS:
        assert ("ours", goal.ours[0]) in ours
        assert goal.other[:2] in ours | rivals | {("machine", "")}


def test_tables_have_a_row_for_each_contender_and_goal():
    columns = {column.header: list(column.cells) for column in results_table(RESULTS, LIMITS, flops=5.0).columns}
    assert columns["what"] == ["ours", "ours", "onnxruntime", "llama.cpp"]
    assert columns["prefill 512"] == ["100", "110", "90", "80"]
    assert columns["of peak"] == ["50%", "55%", "45%", "40%"]
    assert columns["of read"] == ["80%", "55%", "50%", "5%"]
    assert columns["over MB"] == ["40", "40", "", ""]
    verdicts = list(goals_table(RESULTS, ratios(RESULTS, LIMITS)).columns[3].cells)
    # 1.5 of 1.6, 1.5 of 1.7, shares, 0.8 of 0.7, 40 of 150 MB
    assert verdicts == ["missed", "missed", "missed", "missed", "reached", "reached"]


def test_rounds_alternate_and_give_medians(monkeypatch):
    speeds = {"a": [1.0, 100.0, 3.0], "b": [7.0, 5.0, 6.0]}  # tokens per second, round by round
    order = []

    def run_once(entry):
        order.append(entry.what)
        speed = speeds[entry.what][len(order) - 1 >> 1]
        return Measured(
            Speeds((PrefillSpeed(512, 1.0, 10 * speed),), (DecodeSpeed(64, 1.0, speed, 1, speed / 4),), ()), 100 * speed
        )

    monkeypatch.setattr(module, "run_once", run_once)
    monkeypatch.setattr(module, "measured_limits", lambda _threads: MachineLimits(float(len(order)), 10.0 - len(order)))
    results, limits = run_rounds([Contender("a", "fp32", ()), Contender("b", "fp32", ())], 3, 1)
    assert order == ["a", "b"] * 3
    assert limits == MachineLimits(4.0, 10.0)  # the best of 0, 2 and 4, and of 10, 8 and 6
    assert [(r.prefill_tok_s, r.decode_tok_s, r.gb_s, r.peak_rss_mb) for r in results] == [
        (30.0, {64: 3.0}, 0.75, 300.0),
        (60.0, {64: 6.0}, 1.5, 600.0),
    ]


def test_limits_are_measured(capfd):
    """Both kernels run and give plausible figures: each is more than 0.1 and less than 10,000."""
    found = module.measured_limits(1)
    assert 0.1 < found.read_gb_s < 1e4
    assert 0.1 < found.float32_gflop_s < 1e4
    assert "is not valid" not in capfd.readouterr().err  # as LLVM says of a processor that it does not know


def test_plot_names_every_contender(tmp_path):
    draw_speeds(RESULTS, 512, tmp_path / "x.svg")
    drawing = (tmp_path / "x.svg").read_text()
    assert drawing.startswith("<?xml")
    assert all(f"{r.what} {r.scheme}" in drawing for r in RESULTS)  # as comments beside the glyphs


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
    for measured in (ours, theirs):
        assert [p.prompt_tokens for p in measured.speeds.prefill] == [16]
        (decode,) = measured.speeds.decode
        assert decode.context == 8
        assert min(measured.speeds.prefill[0].tok_s, decode.tok_s, decode.gb_s, measured.peak_rss_mb) > 0
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
