"""Which prefill function comes next."""

import math

import pytest

from runtime.scheduling.chunking import chunk_of_prompt, next_chunk

SIZES = (128, 16)


def unknown(size):
    return math.inf


def fed(tokens, choose):
    """Sizes of all calls until no token is left."""
    sizes = []
    while tokens > 0:
        sizes.append(choose(tokens))
        tokens -= sizes[-1]
    return sizes


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (1, [16]),
        (16, [16]),
        (17, [16, 16]),
        (113, [128]),
        (128, [128]),
        (130, [128, 16]),
        (300, [128, 128, 16, 16, 16]),
    ],
)
def test_a_prompt_alone_is_fed_by_the_fewest_columns(tokens, sizes):
    assert fed(tokens, lambda rest: next_chunk(rest, SIZES, unknown, None)) == sizes
    assert fed(tokens, lambda rest: chunk_of_prompt(rest, SIZES)) == sizes


def test_measured_times_decide_between_one_large_call_and_several_small_ones():
    flat = {128: 3.0, 16: 2.0}  # a call costs more than its columns
    assert next_chunk(17, SIZES, flat.__getitem__, None) == 128
    assert next_chunk(16, SIZES, flat.__getitem__, None) == 16
    assert chunk_of_prompt(17, SIZES) == 16


def test_a_budget_bounds_the_call():
    seconds = {128: 0.2, 16: 0.03}.__getitem__
    assert next_chunk(1000, SIZES, seconds, 0.1) == 16
    assert next_chunk(1000, SIZES, seconds, 0.2) == 128
    assert next_chunk(1000, SIZES, seconds, 0.001) == 16, "a prompt goes on all the same"
    assert next_chunk(1000, SIZES, unknown, 0.1) == 16, "the first call of all is a careful one"
