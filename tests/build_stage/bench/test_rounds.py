"""Rounds: the order of the contenders, limits beside each run, and runs that are repeated or marked."""

from dataclasses import replace

import pytest

from build.bench.contenders import Contender
from build.bench.machine_limits import best_of, change, medians_of
from build.bench.rounds import Machine, run_rounds
from build.bench.turns import rotated
from tests.helpers.bench_runs import limits, measured

ENTRIES = [Contender(what, "fp32", ()) for what in "abc"]


class Fake:
    """A machine whose read limits are those of a list, in order, and which counts the runs of each contender."""

    def __init__(self, *reads):
        self.reads, self.order = list(reads), []

    def machine(self, repeats=0):
        return Machine(self.measure, self.limits, repeats)

    def measure(self, entry):
        self.order.append(entry.what)
        return measured(100.0, {64: float(len(self.order))})

    def limits(self):
        return limits(self.reads.pop(0) if self.reads else 20.0)


def speeds(outcomes):
    return {o.entry.what: [run.measured.speeds.decode[0].tok_s for run in o.runs] for o in outcomes}


def test_every_round_runs_all_contenders_from_another_one_on():
    fake = Fake()
    outcomes = run_rounds(ENTRIES, 3, fake.machine())
    assert fake.order == [*"abc", *"bca", *"cab"]
    assert speeds(outcomes) == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert [outcome.disturbed for outcome in outcomes] == [0, 0, 0]


@pytest.mark.parametrize(("turn", "expected"), [(0, "abc"), (1, "bca"), (3, "abc"), (5, "cab")])
def test_turns_start_from_another_one_on(turn, expected):
    assert "".join(rotated("abc", turn)) == expected


def test_a_run_has_the_better_of_the_limits_around_it():
    [outcome] = run_rounds(ENTRIES[:1], 1, Fake(20.0, 22.0).machine())
    assert outcome.runs[0].limits.read.best == 22.0


def test_a_disturbed_run_is_repeated():
    fake = Fake(20.0, 20.0, 20.0, 16.0, 20.0, 21.0)
    outcomes = run_rounds(ENTRIES[:2], 1, fake.machine(repeats=2))
    assert fake.order == [*"abb"]
    assert speeds(outcomes) == {"a": [1.0], "b": [3.0]}
    assert [outcome.disturbed for outcome in outcomes] == [0, 0]


def test_a_run_that_stays_disturbed_is_marked_and_the_least_disturbed_one_counts():
    """Of b, limits fall by 50 %, by 25 % and by 60 % (of the lower one)."""
    fake = Fake(20.0, 20.0, 24.0, 16.0, 20.0, 16.0, 32.0, 20.0)
    outcomes = run_rounds(ENTRIES[:2], 1, fake.machine(repeats=2))
    assert fake.order == [*"abbb"]
    assert speeds(outcomes) == {"a": [1.0], "b": [3.0]}
    assert [outcome.disturbed for outcome in outcomes] == [0, 1]


def test_a_run_at_limits_that_are_unusual_is_disturbed_though_they_do_not_move():
    fake = Fake(*[20.0] * 4, 10.0, 10.0)
    outcomes = run_rounds(ENTRIES, 1, fake.machine())
    assert [outcome.disturbed for outcome in outcomes] == [0, 0, 1]


def test_what_is_usual_is_known_only_at_the_end():
    """The first run looked undisturbed."""
    outcomes = run_rounds(ENTRIES, 1, Fake(10.0, 10.0).machine())
    assert [outcome.disturbed for outcome in outcomes] == [1, 0, 0]


def test_limits_are_combined_one_by_one():
    found = [limits(20.0, 100.0), limits(10.0, 200.0), limits(30.0, 50.0)]
    assert medians_of(found) == limits(20.0, 100.0)
    assert best_of(found) == limits(30.0, 200.0)
    assert change(found[0], found[1]) == 1.0  # each has doubled or halved
    peaks = {"avx2": {"float32": replace(found[0].peaks["avx2"]["float32"], typical=55.0)}}
    assert change(found[0], replace(found[0], peaks=peaks)) == pytest.approx(0.1)
