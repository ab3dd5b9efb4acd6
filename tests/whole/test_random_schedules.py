"""Requests that come and go at random on compiled artifacts give, to the bit, what each gives alone.

`make soak` runs them with new seeds for as long as one likes.
"""

import os
import time
from functools import partial

import pytest

from runtime.engines.engine import Engine
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.artifacts import CASES
from tests.helpers.checked_bits import CheckedBits
from tests.helpers.random_schedules import Schedule, all_alone, check_run, random_schedule, run_schedule

SHAPE = Schedule(requests=10, longest_prompt=30, most_tokens=16, spread=30)
SETTINGS = [
    SchedulerSettings(),
    SchedulerSettings(snapshot_bytes=2**20, stall_budget=0.0, steps_per_chunk=1),
    SchedulerSettings(reuse="exact", speculate=True),
    SchedulerSettings(reuse="off", speculate=False),
]
SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))


def check_schedule(engine, seed):
    """One schedule under every setting, and each request alone: all of them must agree in every bit."""
    arrivals, seen = random_schedule(seed, SHAPE), {}
    expected = all_alone(partial(CheckedBits, engine, seen), arrivals)
    for settings in SETTINGS:
        model = CheckedBits(engine, seen)
        check_run(run_schedule(Scheduler(model, settings, time.perf_counter), arrivals), expected)
        assert model.repeated


@pytest.mark.parametrize("name", CASES)
def test_every_request_gives_the_bits_that_it_gives_alone(compile_case, name):
    engine = Engine.open(compile_case(name).artifact, threads=2)
    for seed in range(2):
        check_schedule(engine, seed)


@pytest.mark.skipif(not SOAK_MINUTES, reason="it runs for as long as SOAK_MINUTES says")
def test_soak(compile_case):
    engines = [Engine.open(compile_case(name).artifact, threads=2) for name in CASES]
    seed, end = int(time.time()), time.monotonic() + 60 * SOAK_MINUTES
    while time.monotonic() < end:
        for engine in engines:
            check_schedule(engine, seed)
        print(f"seed {seed}: the same bits on {len(engines)} artifacts")
        seed += 1
