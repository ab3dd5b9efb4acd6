"""The measurement on the box.

A fake engine with its own clock must be timed exactly, and bytes must be counted as numpy counts them.
"""

import json
import subprocess
import sys
import types

import msgspec
import numpy as np
import pytest

from runtime import bench as module
from runtime.artifact.manifest import ModelConfig, Quantization, Shape, TensorSpec, WeightSpec
from runtime.artifact.signatures import functions_of, graphs_of
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.bench import BenchReport, Workload, cache_bytes, counts, measure, weight_bytes
from runtime.benchmarks.second_turn import SecondTurnReport
from runtime.benchmarks.sequences import SequencesReport
from runtime.engines import read_bandwidth
from runtime.errors import UserError
from tests.helpers.fake_slot_model import FakeSlotModel

VOCAB = 50
TOKEN_S, STEP_S = 0.25, 0.5  # exact in binary, so that sums of them are exact too
MODEL = ModelConfig(
    family="mistral",
    dim=16,
    hidden_dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=(12, None),
    tied_embeddings=False,
)


class ClockedEngine:
    """An engine that takes TOKEN_S per prefilled token and STEP_S per decode step, on its own clock."""

    def __init__(self, clock, *, batch=1, cache_len=None):
        self.clock, self.batch, self.cache_len = clock, batch, cache_len
        self.length = 0

    def room(self):
        return None if self.cache_len is None else self.cache_len - self.length

    def reset(self):
        self.length = 0

    def prefill(self, prompts):
        assert len(prompts) == self.batch
        assert self.length == 0
        self._advance(len(prompts[0]), TOKEN_S * len(prompts[0]))
        return np.zeros((self.batch, VOCAB), np.float32)

    def decode(self, ids):
        assert len(ids) == self.batch
        self._advance(1, STEP_S)
        return np.zeros((self.batch, VOCAB), np.float32)

    def _advance(self, tokens, seconds):
        self.length += tokens
        assert self.cache_len is None or self.length <= self.cache_len
        self.clock.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def test_rates_are_those_of_the_engine_for_all_rows(clock):
    speeds = measure(
        ClockedEngine(clock, batch=3),
        VOCAB,
        Workload((8, 20), (4,), steps=6, repeats=2),
        lambda context: 1000 * context,
    )
    assert [(p.prompt_tokens, p.ttft_s, p.tok_s) for p in speeds.prefill] == [
        (8, 8 * TOKEN_S, 3 / TOKEN_S),
        (20, 20 * TOKEN_S, 3 / TOKEN_S),
    ]
    (decode,) = speeds.decode
    assert (decode.context, decode.step_s, decode.tok_s) == (4, STEP_S, 3 / STEP_S)
    assert decode.bytes_per_step == 7000  # 4 tokens at the first step, 10 after the last, 7 in the middle
    assert decode.gb_s == pytest.approx(7000 / STEP_S / 1e9)
    assert speeds.skipped == ()


def test_the_first_round_does_not_count(clock):
    engine = ClockedEngine(clock)
    calls = []

    def slow_at_first(prompts):
        calls.append(len(prompts[0]))
        clock.now += 1000.0 if len(calls) == 1 else 1.0
        return np.zeros((1, VOCAB), np.float32)

    engine.prefill = slow_at_first
    speeds = measure(engine, VOCAB, Workload((8,), (), steps=1, repeats=1), lambda _: 1)
    assert calls == [8, 8]
    assert speeds.prefill[0].ttft_s == 1.0


def test_what_does_not_fit_the_caches_is_skipped_aloud(clock):
    speeds = measure(
        ClockedEngine(clock, cache_len=32), VOCAB, Workload((32, 33), (28, 29), steps=4, repeats=1), lambda _: 1
    )
    assert [p.prompt_tokens for p in speeds.prefill] == [32]
    assert [d.context for d in speeds.decode] == [28]
    assert len(speeds.skipped) == 2
    assert "33 tokens" in speeds.skipped[0]
    assert "context of 29" in speeds.skipped[1]


def test_weight_bytes_are_the_bytes_of_the_file_without_an_untied_embedding(tmp_path):
    def spec(name, shape, dtype):
        return WeightSpec(name=name, shape=shape, dtype=dtype, layout="row_major")

    head = [
        spec("output.weight", (64, 16), "int8"),
        spec("output.weight_scale", (64,), "float32"),
        spec("norm.weight", (16,), "float32"),
    ]
    specs = [spec("tok_embeddings.weight", (64, 16), "float16"), *head]
    sizes = {}
    for name, chosen in {"all": specs, "without": head}.items():
        with TensorFileWriter(tmp_path / name, chosen) as writer:
            for s in chosen:
                writer.write(s.name, np.zeros(s.shape, s.dtype))
        sizes[name] = (
            (tmp_path / name).stat().st_size - int.from_bytes((tmp_path / name).read_bytes()[:8], "little") - 8
        )
    assert weight_bytes(specs, tied=False) == sizes["without"]  # every size is a multiple of 64, so nothing is padding
    assert weight_bytes(specs, tied=True) == sizes["all"]
    experts = [TensorSpec(name="layers.0.feed_forward.experts.w13.weight", shape=(8, 64), dtype="int8")]
    assert weight_bytes(experts, tied=False, experts=0.25) == 128  # two of eight


def test_cache_bytes_of_a_sequence_stop_growing_at_a_window():
    """Whatever else rings hold: other sequences, and columns that only a call needs."""
    shape = Shape(slots=3, step_rows=(1,), prefill_chunks=(4,), cache_len=100)

    def visible(context):
        keys = [np.zeros((1, 2, min(context, length), 8), np.float16) for length in (12, 100)]
        return 2 * sum(array.nbytes for array in keys)

    windows = MODEL.cache_lens(100)
    for caches in (functions_of(MODEL, shape, "float16")[-1], graphs_of(MODEL, shape, "float16")[-1]):
        found = [cache_bytes(caches.signature.caches, windows, n) for n in (1, 12, 13, 100)]
        assert found == [visible(n) for n in (1, 12, 13, 100)]


def test_cache_bytes_count_what_is_stored_beside_the_numbers():
    shape = Shape(slots=1, step_rows=(1,), prefill_chunks=(4,), cache_len=100)
    caches = functions_of(MODEL, shape, "int8")[-1].signature.caches
    assert cache_bytes(caches, MODEL.cache_lens(100), 20) == 2 * 2 * (12 + 20) * (8 + 4)


def test_bytes_of_a_step_grow_with_its_rows_but_for_weights_that_all_share():
    shape = Shape(slots=4, step_rows=(1, 4), prefill_chunks=(4,), cache_len=100)
    norm = WeightSpec(name="norm.weight", shape=(1000,), dtype="float32", layout="row_major")
    experts = WeightSpec(
        name="layers.0.feed_forward.experts.w13.weight", shape=(8, 100), dtype="int8", layout="row_major"
    )

    def step_bytes(rows, **changes):
        model = msgspec.structs.replace(MODEL, **changes)
        functions = functions_of(model, shape, "float32")
        manifest = types.SimpleNamespace(
            model=model, shape=shape, weights=(norm, experts), caches=functions[0].signature.caches
        )
        return module.step_bytes_of(manifest, rows)(10)

    column = 2 * 2 * 10 * 2 * 8 * 4
    assert step_bytes(1) == 4000 + 800 + column
    assert step_bytes(4) == 4000 + 800 + 4 * column
    mixture = {"n_experts": 8, "experts_per_token": 3}
    assert [step_bytes(rows, **mixture) - rows * column for rows in (1, 2, 4)] == [4300, 4600, 4800]


@pytest.mark.parametrize("text", ["", "12,", "0", "-3", "1.5", "a"])
def test_counts_refuses(text):
    with pytest.raises(UserError, match="expected positive numbers"):
        counts(text)


def test_counts_keeps_the_order_once():
    assert counts("512, 64,512") == (512, 64)


def test_bandwidth_is_within_what_memory_can_give():
    # Between a tenth of one DDR3 channel and more than the memory of any CPU: a wrong unit would be off by 1000.
    assert 1 < read_bandwidth.fresh_read_bandwidth(1) < 5000


def test_peak_memory_is_that_of_this_process_alone():
    program = (
        "import numpy as np; from runtime.process_memory import peak_memory as peak; "
        "a = peak(); np.ones(200 * 125_000); print(a, peak())"
    )
    ballast = np.ones(300 * 125_000)  # 300 MB in the parent process, which getrusage would count for the child
    run = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    before, after = (int(size) / 1e6 for size in run.stdout.split())
    assert before < ballast.nbytes / 1e6
    # 200, less what numpy's import had allocated and freed, and the kernel's lazy counting
    assert 190 < after - before < 220


@pytest.fixture
def fake_command(monkeypatch):
    """Everything but the engine and the bandwidth is real."""
    shape = Shape(slots=2, step_rows=(1, 2), prefill_chunks=(4,), cache_len=64)
    manifest = types.SimpleNamespace(
        model=MODEL,
        shape=shape,
        name="fake",
        quantization=Quantization(scheme="int8"),
        target=types.SimpleNamespace(kind="llvm", dtype="fp32"),
        caches=functions_of(MODEL, shape, "float32")[0].signature.caches,
        weights=(WeightSpec(name="norm.weight", shape=(1000,), dtype="float32", layout="row_major"),),
    )

    class FakeEngine(ClockedEngine):
        @classmethod
        def open(cls, path, *, threads, minimum_build=0):
            assert (path.name, threads) == ("folder", 3)
            engine = cls(types.SimpleNamespace(now=0.0), cache_len=64)
            engine.manifest, engine.cpu_level = manifest, "x86-64-v3"
            return engine

    def one_text(engine, batch):
        assert batch == 1
        return engine

    monkeypatch.setattr("runtime.engines.engine.Engine", FakeEngine)
    monkeypatch.setattr("runtime.engines.side_by_side.SideBySide", one_text)
    monkeypatch.setattr(module, "fresh_read_bandwidth", lambda _threads: 10.0)
    return [
        "folder",
        "--prompt-tokens",
        "8,100",
        "--context",
        "16",
        "--tokens",
        "4",
        "--threads",
        "3",
        "--repeats",
        "2",
    ]


def test_json_is_one_object_that_reads_back_as_the_report(fake_command, capsys):
    assert module.main([*fake_command, "--json"]) == 0
    text = capsys.readouterr().out
    report = msgspec.json.decode(text, type=BenchReport)
    assert text == json.dumps(json.loads(text)) + "\n"
    assert (report.threads, report.scheme, report.bandwidth_gb_s, report.weight_bytes_per_step) == (
        3,
        "int8",
        10.0,
        4000,
    )
    assert [p.prompt_tokens for p in report.speeds.prefill] == [8]
    # keys and values of one window of 12 and one of 18 tokens
    assert report.speeds.decode[0].bytes_per_step == 4000 + 2 * (12 + 18) * 2 * 8 * 4
    assert report.peak_rss_mb > 10
    assert len(report.speeds.skipped) == 1


def test_table_has_every_figure_and_its_unit(fake_command, capsys):
    assert module.main(fake_command) == 0
    text = capsys.readouterr().out
    for part in (
        "TTFT, 8 tokens",
        "decode, context 16",
        "tok/s",
        "GB/s",
        "of the bandwidth",
        "MB resident",
        "skipped: a prompt of 100",
    ):
        assert part in text


@pytest.mark.parametrize("flag", ["--tokens", "--threads", "--repeats"])
def test_a_count_below_one_is_refused(fake_command, flag):
    with pytest.raises(UserError, match=f"{flag} is 0, expected at least 1"):
        module.main([*fake_command, flag, "0"])


@pytest.fixture
def slots_command(monkeypatch):
    """A model with slots in place of an engine, and nothing that is measured without them."""
    model = FakeSlotModel(cache_len=900)
    model.manifest = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=model.vocab), tokenizer=None)
    model.folder = "folder"
    engine = types.SimpleNamespace(open=lambda path, *, threads, minimum_build: model)
    monkeypatch.setattr("runtime.engines.engine.Engine", engine)
    return ["folder", "--context", "16", "--tokens", "4", "--repeats", "1"]


@pytest.mark.parametrize(
    ("flags", "report", "measured"),
    [
        (["--sequences", "1,4,8"], SequencesReport, lambda report: [s.sequences for s in report.speeds] == [1, 4]),
        (["--second-turn", "1,8,400"], SecondTurnReport, lambda report: [t.new_tokens for t in report.turns] == [1, 8]),
    ],
)
def test_a_part_takes_the_place_of_the_usual_measurement(slots_command, capsys, flags, report, measured):
    assert module.main([*slots_command, *flags, "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=report)
    assert measured(found)
    assert module.main([*slots_command, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-len(found.skipped) :] == list(found.skipped)


def test_speculation_needs_a_tokenizer(slots_command):
    with pytest.raises(UserError, match="--speculation needs a tokenizer, but folder has none: leave the flag out"):
        module.main([*slots_command, "--speculation"])
