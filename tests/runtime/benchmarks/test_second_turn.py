"""Second turns: a conversation is continued from its slot, also in rings that have wrapped, and timed exactly."""

import pytest

from runtime.benchmarks.second_turn import SecondTurnWorkload, measure_second_turn
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock


def measured(workload, **sizes):
    """Every token takes a second, in whatever call."""
    clock = SimulatedClock()
    model = FakeSlotModel(clock=clock, seconds=lambda kind, size, rows: rows, **sizes)
    return measure_second_turn(model, model.vocab, workload, clock)


@pytest.mark.parametrize(("windows", "wrapped"), [((None,), False), ((8, None), True), ((8,), True)])
def test_only_new_tokens_take_time(windows, wrapped):
    report = measured(SecondTurnWorkload(60, (1, 3, 40), repeats=2), windows=windows)
    assert [(t.new_tokens, t.continued_s.median, t.cold_s.median) for t in report.turns] == [
        (n, n, 60 + n) for n in (1, 3, 40)
    ]
    assert report.turns[2].share.median == 0.4
    assert report.wrapped is wrapped
    assert ("wrapped" in report.table().splitlines()[0]) is wrapped


def test_one_slot_is_enough():
    report = measured(SecondTurnWorkload(60, (3,), repeats=1), slots=1, step_rows=(1,))
    assert report.turns[0].continued_s.median == 3


def test_what_does_not_fit_is_skipped_aloud():
    report = measured(SecondTurnWorkload(60, (4, 5), repeats=1), cache_len=64)
    assert [turn.new_tokens for turn in report.turns] == [4]
    assert report.skipped == ("skipped: 5 new tokens behind 60, more than the 64 tokens that a slot holds",)


def test_the_table_sets_shares_of_time_beside_shares_of_tokens():
    _, header, row = measured(SecondTurnWorkload(60, (40,), repeats=1)).table().splitlines()
    assert row.split() == ["40", "40,000.0", "100,000.0", "0.400", "(0.400-0.400)", "0.400"]
    assert len(header) == len(row)
