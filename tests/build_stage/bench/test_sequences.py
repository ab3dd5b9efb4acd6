"""Sequences side by side: what is compared with what, round by round, and what llama.cpp is asked for."""

import importlib.util
import sys

import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from build.bench import sequences as module
from build.bench.contenders import LLAMA, OURS, RIVAL_SCHEMES, SCHEMES
from build.bench.sequences import PAIRS, Case, SequencesContender, our_command, run_sequences
from build.bench.sequences_report import SPEED_UP_GOALS, goals_table, over_rival, sequences_tables, speed_ups
from runtime.benchmarks.sequences import SequencesReport, SequencesSpeed, SequencesWorkload
from runtime.benchmarks.spread import Spread
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import write_tiny_mistral

installed = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs `make setup BENCH=1`")
SAMPLES = {
    Case("ours int8", 64, 1): [100.0, 50.0, 80.0],
    Case("ours int8", 64, 4): [250.0, 150.0, 200.0],
    Case("llama.cpp Q8_0", 64, 1): [50.0, 50.0, 80.0],
    Case("llama.cpp Q8_0", 64, 4): [200.0, 200.0, 100.0],
}


def test_pairs_are_known_schemes_of_both():
    assert set(PAIRS) <= set(SCHEMES)
    assert set(PAIRS.values()) <= set(RIVAL_SCHEMES[LLAMA])
    assert {goal.scheme for goal in SPEED_UP_GOALS} <= set(PAIRS)


def test_ratios_are_of_figures_of_the_same_round():
    assert speed_ups(SAMPLES) == {
        Case("ours int8", 64, 4): Spread.of([2.5, 3.0, 2.5]),
        Case("llama.cpp Q8_0", 64, 4): Spread.of([4.0, 4.0, 1.25]),
    }
    assert over_rival(SAMPLES) == {
        Case("ours int8", 64, 1): Spread.of([2.0, 1.0, 1.0]),
        Case("ours int8", 64, 4): Spread.of([1.25, 0.75, 2.0]),
    }


def test_goals_that_are_missed_are_named():
    goals = [list(column.cells) for column in goals_table(SAMPLES).columns]
    assert goals == [
        ["4 sequences / one, int8, context 64", "int8 / llama.cpp Q8_0, least ahead: 1 sequences, context 64"],
        ["2.50 (2.50-2.75)", "1.00 (1.00-1.50)"],
        ["2.60", "1.00"],
        ["missed", "reached"],
    ]


def test_tables_have_a_row_for_each_engine_and_context():
    figures, ups, ahead, _ = ([list(column.cells) for column in table.columns] for table in sequences_tables(SAMPLES))
    assert figures == [["ours int8", "llama.cpp Q8_0"], ["64", "64"], ["80.0", "50.0"], ["200.0", "200.0"]]
    assert ups == [["ours int8", "llama.cpp Q8_0"], ["64", "64"], ["2.50 (2.50-2.75)", "4.00 (2.62-4.00)"]]
    assert ahead == [["ours int8"], ["64"], ["1.00 (1.00-1.50)"], ["1.25 (1.00-1.62)"]]


def test_without_a_rival_there_is_nothing_to_be_ahead_of():
    ours = {case: tok_s for case, tok_s in SAMPLES.items() if case.label.startswith(OURS)}
    assert [table.title for table in sequences_tables(ours)] == [
        "sequences side by side: tokens per second in all, medians",
        "times the speed of one sequence, median (quartiles)",
        "goals of sequences side by side",
    ]


def test_rounds_alternate(monkeypatch):
    order = []

    def json_of(command, what):
        order.append(what)
        return msgspec.json.encode(SequencesReport((SequencesSpeed(4, 64, 0.5, float(len(order))),)))

    monkeypatch.setattr(module, "json_of", json_of)
    samples = run_sequences([SequencesContender("a", "x", ()), SequencesContender("b", "y", ())], 3)
    assert order == ["a x", "b y"] * 3
    assert samples == {Case("a x", 64, 4): [1.0, 3.0, 5.0], Case("b y", 64, 4): [2.0, 4.0, 6.0]}


def test_our_command_is_one_of_the_box(tmp_path):
    command = our_command(tmp_path, SequencesWorkload((1, 4), (64, 1024), 8, 1), 2)
    assert command[:3] == (sys.executable, "-m", "runtime.bench")
    given = dict(zip(command[5::2], command[6::2], strict=True))
    assert given == {
        "--sequences": "1,4",
        "--context": "64,1024",
        "--tokens": "8",
        "--repeats": "1",
        "--threads": "2",
    }


@installed
def test_llama_continues_copies_of_one_context(tmp_path):
    """Each row gives what the context and the row's own ids give alone, also after a restart."""
    from build.bench.rival_llama_sequences import LlamaSequences
    from build.tools.llama_engine import LlamaEngine

    write_tiny_mistral(tmp_path / "huggingface", intermediate_size=128, sliding_window=None)
    write_gguf(tmp_path / "x.gguf", tmp_path / "huggingface", GGMLQuantizationType.F32, for_llama_cpp=True)
    engine = LlamaEngine(tmp_path / "x.gguf", 64, 1, batch=4)
    sequences = LlamaSequences(engine)
    context = list(range(3, 20))
    sequences.fill(context)
    found = []
    for ids in ([5, 6, 7, 8], [5, 6]):
        sequences.restart(len(ids))
        sequences.decode(ids)
        found.append(sequences.decode([9] * len(ids)))
    alone = LlamaEngine(tmp_path / "x.gguf", 64, 1)
    for row, token_id in enumerate([5, 6, 7, 8]):
        alone.reset()
        expected = alone.prefill([[*context, token_id, 9]])[0]
        for logits in found:
            if row < len(logits):
                np.testing.assert_allclose(logits[row], expected, atol=1e-3 * np.abs(expected).max())
