"""Sequences side by side: each step is timed exactly, and begins behind the context alone."""

import numpy as np
import pytest

from runtime.benchmarks.sequences import SequencesReport, SequencesWorkload, SlotSequences, measure_sequences
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock

ROW_S, STEP_S = 0.25, 0.5  # exact in binary, so that sums of them are exact too


def clocked_model(**sizes):
    """A step takes STEP_S and, for each of its rows, ROW_S."""
    clock = SimulatedClock()
    return FakeSlotModel(clock=clock, seconds=lambda kind, size, rows: STEP_S + ROW_S * rows, **sizes), clock


def measured(workload, **sizes):
    model, clock = clocked_model(**sizes)
    return measure_sequences(SlotSequences(model), model.vocab, workload, clock)


def test_rates_are_those_of_all_sequences():
    report = measured(SequencesWorkload((1, 4), (8, 40), steps=6, repeats=2))
    assert [(s.context, s.sequences, s.step_s, s.tok_s) for s in report.speeds] == [
        (context, n, STEP_S + ROW_S * n, n / (STEP_S + ROW_S * n)) for context in (8, 40) for n in (1, 4)
    ]
    assert report.skipped == ()


def test_more_sequences_than_a_step_has_rows_take_several_steps():
    (speed,) = measured(SequencesWorkload((3,), (8,), steps=2, repeats=1), slots=3, step_rows=(1, 2)).speeds
    assert speed.step_s == 2 * STEP_S + 3 * ROW_S


@pytest.mark.parametrize("windows", [(None,), (8, None), (8,)])
def test_every_restart_brings_back_the_context(windows):
    """Also the columns of a ring that the steps before have overwritten; the model itself checks what it sees."""
    model, _ = clocked_model(windows=windows)
    sequences = SlotSequences(model)
    context = [token % model.vocab for token in range(30)]
    sequences.fill(context)
    expected = None
    for count in (2, 4):
        sequences.restart(count)
        assert [list(model.tokens(slot)) for slot in range(count)] == [context] * count
        logits = sequences.decode([5] * count)
        expected = logits[0] if expected is None else expected
        np.testing.assert_array_equal(logits, [expected] * count)
        for _ in range(30):
            sequences.decode([1] * count)


def test_what_does_not_fit_is_skipped_aloud():
    report = measured(SequencesWorkload((2, 5), (27, 28), steps=4, repeats=1), cache_len=32)
    assert [(s.context, s.sequences) for s in report.speeds] == [(27, 2)]
    assert report.skipped == (
        "skipped: 5 sequences, more than the 4 slots",
        "skipped: 4 steps from a context of 28, more than the 32 tokens that a slot holds",
    )
    assert report.table().endswith("\n".join(report.skipped))


def test_the_table_has_a_row_for_each_case():
    header, *rows = measured(SequencesWorkload((1, 4), (8,), steps=2, repeats=1)).table().splitlines()
    assert header.split("  ")[-1] == "times one sequence"
    assert [row.split() for row in rows] == [["8", "1", "1.3", "750.00", "1.00"], ["8", "4", "2.7", "1,500.00", "2.00"]]
    assert len({len(line) for line in (header, *rows)}) == 1


def test_a_table_without_a_single_sequence_compares_with_none():
    report = measured(SequencesWorkload((4,), (8,), steps=2, repeats=1))
    assert report.table().splitlines()[1].split()[-1] == "-"
    assert isinstance(report, SequencesReport)
