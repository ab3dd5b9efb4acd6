"""Requests that come and go at random on compiled artifacts give, to the bit, what each gives alone.

`make soak` runs the same with new seeds for as long as one likes.
"""

import pytest

from runtime.engines.engine import Engine
from tests.helpers.artifacts import CASES
from tests.helpers.checked_schedules import check_schedule


@pytest.mark.parametrize("name", CASES)
def test_every_request_gives_the_bits_that_it_gives_alone(compile_case, name):
    check_schedule(Engine.open(compile_case(name).artifact, threads=2), seed=list(CASES).index(name))
