"""The calls that feed a prompt: none takes less time together, counted by brute force."""

from functools import cache

import pytest

from runtime.engines.call_sizes import CALL_COST, call_sizes

AVAILABLE = [((16, 4), (1,)), ((16,), (1, 2, 4, 8)), ((128, 16), (1, 2, 4)), ((6, 2), (1, 2)), ((5,), ()), ((7, 3), ())]


def least_cost(length, sizes):
    """The least sum over the calls of their tokens and CALL_COST, tried in every way."""

    @cache
    def cost(left):
        return 0 if left <= 0 else min(size + CALL_COST + cost(left - size) for size in sizes)

    return cost(length)


@pytest.mark.parametrize(("chunks", "step_rows"), AVAILABLE)
def test_no_other_calls_take_less(chunks, step_rows):
    sizes = {*chunks, *step_rows}
    for length in range(1, 3 * max(sizes)):
        found = call_sizes(length, chunks, step_rows)
        assert set(found) <= sizes
        assert sum(found) + CALL_COST * len(found) == least_cost(length, sizes), length
        # full calls, the last of which alone may have room for more
        assert 0 < length - sum(found[:-1]) <= found[-1]
        assert found == sorted(found, reverse=True)


def test_a_long_prompt_is_mostly_full_calls_of_the_largest_size():
    found = call_sizes(100_000, (128, 16), (1,))
    assert found[:780] == [128] * 780
    assert sum(found) - 100_000 < 128


def test_the_worked_example():
    assert call_sizes(19, (16, 4), (1,)) == [16, 4]


def test_no_tokens_take_no_call():
    assert call_sizes(0, (16, 4), (1,)) == []
