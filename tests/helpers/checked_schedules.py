"""Random schedules on an engine, of which every result must have the bits that the same tokens gave before."""

import time
from dataclasses import replace
from functools import partial

from runtime.engines.slot_model import capacity_of
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.checked_bits import CheckedBits
from tests.helpers.random_schedules import Schedule, all_alone, check_run, random_schedule, run_schedule

SHAPE = Schedule(requests=10, longest_prompt=30, most_tokens=16, spread=30)
SETTINGS = [
    SchedulerSettings(),
    SchedulerSettings(snapshot_bytes=2**20, stall_budget=0.0, steps_per_chunk=1),
    SchedulerSettings(reuse="exact", speculate=True),
    SchedulerSettings(reuse="off", speculate=False),
]


def check_schedule(engine, seed):
    """One schedule under every setting, and each request alone: all of them must agree in every bit."""
    seen = {}
    fresh_model = partial(CheckedBits, engine, seen)
    shape = replace(SHAPE, longest_prompt=min(SHAPE.longest_prompt, capacity_of(fresh_model()) or SHAPE.longest_prompt))
    arrivals = random_schedule(seed, fresh_model, shape)
    expected = all_alone(fresh_model, arrivals)
    for settings in SETTINGS:
        model = CheckedBits(engine, seen)
        check_run(run_schedule(Scheduler(model, settings, time.perf_counter), arrivals), expected)
        assert model.repeated
