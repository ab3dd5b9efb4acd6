"""Drafts: the same tokens with and without, and as many as pay."""

import numpy as np
import pytest

from runtime.decoding.options import SamplingOptions
from runtime.scheduling.requests import Request
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from runtime.scheduling.speculation import FIRST_GUESS, RETRY_AFTER, Candidate, DraftHistory, DraftPlanner
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.random_schedules import Arrival, alone, run_schedule

ROWS = (1, 2, 4, 8)


def ids(seed, length):
    return np.random.default_rng(seed).integers(24, size=length).tolist()


def planner(**seconds):
    known = {int(size.removeprefix("of_")): value for size, value in seconds.items()}
    return DraftPlanner(ROWS, lambda rows: known[min(size for size in known if size >= rows)])


def test_as_many_drafts_as_pay():
    likely = [Candidate(0.9, 7)]
    assert planner(of_1=1.0, of_8=1.0).drafts(likely, 1) == [7]
    assert planner(of_1=1.0, of_2=1.5, of_4=1.8, of_8=8.0).drafts(likely, 1) == [3]
    assert planner(of_1=1.0, of_2=2.0, of_4=4.0, of_8=8.0).drafts(likely, 1) == [0]
    assert planner(of_1=1.0, of_2=1.5, of_8=8.0).drafts([Candidate(0.3, 7)], 1) == [0]


def test_rows_that_would_be_empty_are_filled_with_the_likeliest_drafts():
    free = planner(of_1=1.0, of_8=1.0)
    assert free.drafts([Candidate(0.9, 7), Candidate(0.3, 7), Candidate(0.9, 1)], 3) == [4, 0, 1]
    assert free.drafts([Candidate(0.9, 7)], 8) == [0], "there are none"
    assert free.drafts([Candidate(0.05, 7)], 1) == [0]
    assert free.drafts([], 3) == []


def test_nobody_loses_by_the_drafts_of_others():
    assert planner(of_2=1.0, of_4=1.02, of_8=1.5).drafts([Candidate(0.9, 7), Candidate(0.0, 0)], 2) == [2, 0]
    dear = planner(of_2=1.0, of_4=1.5, of_8=2.0)
    assert dear.drafts([Candidate(0.9, 7), Candidate(0.0, 0)], 2) == [0, 0]
    assert dear.drafts([Candidate(0.99, 7), Candidate(0.9, 7)], 2) == [3, 3], "the likeliest would be 5 and 1"


def test_a_time_that_rules_drafts_out_is_measured_anew_from_time_to_time():
    dear = planner(of_1=1.0, of_8=100.0)
    plans = [dear.drafts([Candidate(0.9, 7)], 1) for _ in range(2 * RETRY_AFTER)]
    assert plans.count([1]) == 2
    assert plans.count([0]) == len(plans) - 2


def test_chances_are_learned_whether_drafts_are_checked_or_not():
    history = DraftHistory()
    tokens = [1, 2, 3, 4] * 5
    history.propose(tokens, 4)
    assert history.chance == FIRST_GUESS
    for token in (1, 2, 3, 4) * 5:
        history.learn([token])
        tokens = [*tokens, token]
        history.propose(tokens, 4)
    assert history.chance > 0.95
    for _ in range(20):
        history.learn([9])
    assert history.chance < 0.05


def test_a_long_prompt_is_read_in_several_steps():
    history = DraftHistory()
    tokens = [1, 2, 3, 4] * 1000
    found = []
    for _ in range(5):
        history.propose(tokens, 4)
        found.append(len(history.proposal.drafts))
    assert found == [0, 0, 0, 4, 4]


@pytest.mark.parametrize("windows", [(None,), (9,), (9, None)])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.4, seed=7),
        SamplingOptions(temperature=0.7, top_p=0.95, seed=3, repetition_penalty=1.05, frequency_penalty=0.1),
    ],
)
def test_tokens_and_the_slot_are_the_same_with_and_without(windows, options):
    made = {"windows": windows, "repeats": 6.0, "step_rows": ROWS}
    request = Request("a", ids(1, 20), 120, options, eos_ids=(23,))
    slots, accepted = [], []
    for speculate in (False, True):
        clock = SimulatedClock()
        model = FakeSlotModel(clock=clock, seconds=lambda kind, size, rows: 1.0, **made)
        scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
        result = run_schedule(scheduler, [Arrival(0, request)])
        assert (result.tokens["a", 0], result.ends["a", 0]) == alone(FakeSlotModel(**made), request)
        slots.append(list(model.tokens(0)))
        accepted.append(scheduler.statistics.drafts_accepted)
    assert slots[0] == slots[1]
    assert accepted[0] == 0
    assert accepted[1] > 10


COSTS = {  # seconds of a step by its size: flat as on a GPU, as an int8 model on a CPU, and in proportion
    "flat": lambda size: 1.0,
    "cpu": lambda size: 0.8 + 0.2 * size,
    "in proportion": lambda size: float(size),
}


def seconds_for(repeats, cost, speculate, sequences=1):
    """Seconds of the steps in which `sequences` requests get 400 tokens each."""
    clock = SimulatedClock()
    model = FakeSlotModel(
        repeats=repeats,
        step_rows=ROWS,
        cache_len=1000,
        clock=clock,
        seconds=lambda kind, size, rows: COSTS[cost](size) if kind == "step" else 0.0,
    )
    scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
    options = SamplingOptions(temperature=1.0, seed=1)
    run_schedule(scheduler, [Arrival(0, Request(name, ids(name, 20), 400, options)) for name in range(sequences)])
    return clock.now


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("repeats", [0.0, 3.0, 4.0, 6.0])
def test_drafts_never_cost_more_than_three_percent(cost, sequences, repeats):
    plain, drafted = (seconds_for(repeats, cost, speculate, sequences) for speculate in (False, True))
    assert plain / drafted >= 0.97


@pytest.mark.parametrize(("cost", "gain"), [("flat", 4.0), ("cpu", 2.0)])
def test_a_text_that_repeats_itself_is_written_faster(cost, gain):
    plain, drafted = (seconds_for(12.0, cost, speculate) for speculate in (False, True))
    assert plain / drafted >= gain
