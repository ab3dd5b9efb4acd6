"""Which calls feed a prompt: the sizes that together take the least time."""

from collections.abc import Sequence
from functools import cache

# What a call takes beyond its tokens, in tokens: reading the weights, which a step of one row waits for.
CALL_COST = 8


def call_sizes(length: int, chunks: Sequence[int], step_rows: Sequence[int]) -> list[int]:
    """Sizes of the calls that feed `length` tokens, in order, the last of which may have room for more.

    Full calls of the largest size come first. The rest is divided so that the sum of all sizes, and of CALL_COST for
    each, is least.
    Worked example with sizes 16, 4 and 1: 19 tokens are 16 + 4 (cost 36), rather than 16 + 16 (48).
    """
    sizes = tuple(sorted({*chunks, *step_rows}, reverse=True))
    whole = max(length // sizes[0] - 1, 0)
    return [sizes[0]] * whole + _divided(length - whole * sizes[0], sizes)


@cache
def _plans(length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the first call for each number of tokens up to `length`, `sizes` being in descending order."""
    first, costs = [0], [0]
    for tokens in range(1, length + 1):
        cost, size = min((size + CALL_COST + costs[max(tokens - size, 0)], -size) for size in sizes)
        first.append(-size)
        costs.append(cost)
    return tuple(first)


def _divided(length: int, sizes: tuple[int, ...]) -> list[int]:
    plans = _plans(2 * sizes[0], sizes)
    found = []
    while length > 0:
        found.append(plans[length])
        length -= plans[length]
    return sorted(found, reverse=True)
