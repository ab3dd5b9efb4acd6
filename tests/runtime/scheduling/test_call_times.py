"""Predicted times of calls."""

import math

import pytest

from runtime.scheduling.call_times import CallTimes


def measured(**seconds):
    times = CallTimes()
    for size, value in seconds.items():
        times.add(int(size.removeprefix("of_")), value)
    return times


def test_nothing_is_known_at_first():
    assert math.isinf(CallTimes().at_most(4))
    assert math.isinf(CallTimes().about(4))


def test_the_first_times_count_alike_and_old_ones_fade():
    times = CallTimes()
    for seconds in (3.0, 1.0):
        times.add(4, seconds)
    assert times.at_most(4) == 2.0
    for _ in range(100):
        times.add(4, 1.0)
    assert times.at_most(4) == pytest.approx(1.0, abs=1e-3)


def test_a_larger_size_takes_no_more_for_each_token_and_no_less_in_all():
    times = measured(of_4=1.0, of_16=2.0)
    assert times.at_most(8) == 2.0  # as 16 tokens, and twice 4 tokens
    assert times.at_most(2) == 1.0  # as 4 tokens
    assert times.at_most(32) == 4.0  # twice 16 tokens


def test_one_slow_call_does_not_rule_a_size_out_for_ever():
    times = measured(of_16=100.0, of_4=1.0)
    assert times.at_most(16) == 4.0
    assert times.about(16) == 4.0


def test_a_size_that_was_not_tried_is_taken_for_its_neighbour():
    assert measured(of_4=1.0, of_16=2.0).about(6) == 1.0
