"""Requests that come and go at random give the same tokens as alone, whatever they share the model with."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from runtime.decoding.logprobs import row_logprobs
from runtime.scheduling.requests import Scored
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.random_schedules import Schedule, all_alone, check_run, random_schedule, run_schedule


def seconds(kind, size, rows):
    return 0.002 * size if kind == "prefill" else 0.005 + 0.0002 * rows


MODELS = {
    "full": {},
    "tight": {"cache_len": 64},
    "windows": {"windows": (12,)},
    "mixed windows": {"windows": (7, None, 20)},
    "repeating": {"repeats": 4.0, "step_rows": (1, 2, 4, 8)},
    "repeating windows": {"repeats": 4.0, "windows": (9, 31), "step_rows": (1, 2, 4, 8)},
    "one slot": {"slots": 1, "step_rows": (1,)},
    "one chunk": {"chunks": (16,)},
    "more slots than rows": {"slots": 6, "step_rows": (1, 2)},
}
SETTINGS = {
    "default": SchedulerSettings(),
    "exact": SchedulerSettings(reuse="exact"),
    "off": SchedulerSettings(reuse="off", speculate=False, steps_per_chunk=1),
    "snapshots": SchedulerSettings(snapshot_bytes=400, stall_budget=0.01),
}


@cache
def schedule_and_tokens(model, seed):
    new_model = partial(FakeSlotModel, **MODELS[model])
    arrivals = random_schedule(seed, new_model)
    return arrivals, all_alone(new_model, arrivals)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_request_gives_the_tokens_that_it_gives_alone(settings, model, seed):
    arrivals, expected = schedule_and_tokens(model, seed)
    clock = SimulatedClock()
    scheduler = Scheduler(FakeSlotModel(clock=clock, seconds=seconds, **MODELS[model]), SETTINGS[settings], clock)
    check_run(run_schedule(scheduler, arrivals), expected)


class Noting(Scheduler):
    """A scheduler that keeps the scores of prompts."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scores = {}

    def turn(self):
        events = super().turn()
        for event in events:
            if isinstance(event, Scored):
                self.scores.setdefault(event.request_id, []).extend(event.tokens)
        return events


def scores_alone(model, ids):
    logits = np.stack([model.prefill(0, [token]) for token in ids[:-1]]) if len(ids) > 1 else np.empty((0, 1))
    return row_logprobs(logits, ids[1:], [2] * (len(ids) - 1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_prompts_are_scored_among_others_as_alone(settings, model, seed):
    """A third of the requests; all get what follows as without scores."""
    arrivals, expected = schedule_and_tokens(model, seed)
    scored = [
        replace(arrival, request=replace(arrival.request, prompt_logprobs=2)) if number % 3 == 0 else arrival
        for number, arrival in enumerate(arrivals)
    ]
    clock = SimulatedClock()
    scheduler = Noting(FakeSlotModel(clock=clock, seconds=seconds, **MODELS[model]), SETTINGS[settings], clock)
    check_run(run_schedule(scheduler, scored), expected)
    for arrival in scored[::3]:
        alone = scores_alone(FakeSlotModel(**MODELS[model]), arrival.request.prompt_ids)
        found = scheduler.scores.get(arrival.request.request_id, [])
        assert found == alone[: len(found)]
        assert arrival.cancelled is not None or len(found) == len(alone)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("windows", [(None,), (12,)])
@pytest.mark.parametrize("snapshot_bytes", [0, 300])
def test_where_results_depend_on_the_call_prompts_give_the_same_bits_as_alone(snapshot_bytes, windows, seed):
    """Each first step has log probabilities, in which a single other bit of the logits would show."""
    new_model = partial(FakeSlotModel, windows=windows, chunks=(8, 4), same_bits=False)
    arrivals = [replace(arrival, cancelled=None) for arrival in random_schedule(seed, new_model, Schedule(logprobs=24))]
    settings = SchedulerSettings(snapshot_bytes=snapshot_bytes)
    scheduler = Scheduler(new_model(), settings, SimulatedClock())
    crowd = run_schedule(scheduler, arrivals)
    assert scheduler.statistics.prefix_hits > 0
    for arrival in arrivals:
        only = run_schedule(Scheduler(new_model(), settings, SimulatedClock()), [replace(arrival, turn=0)])
        for key, steps in only.steps.items():
            assert crowd.steps[key][0] == steps[0], key
