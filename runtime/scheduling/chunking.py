"""Which call feeds the next tokens of a prompt."""

import math
from collections.abc import Callable, Sequence

SecondsOf = Callable[[int], float]


def next_chunk(tokens: int, sizes: Sequence[int], seconds_of: SecondsOf, budget: float | None) -> int:
    """The size of the function that feeds the first of `tokens` tokens; `sizes` are those there are, descending.

    Without a budget, the size that is expected to feed all tokens soonest. With one, the same among the sizes whose
    time stays within it, or the smallest size if none does.
    """
    allowed = [size for size in sizes if budget is None or seconds_of(size) <= budget] or [sizes[-1]]
    return _quickest(tokens, allowed, seconds_of)[0]


def chunk_of_prompt(tokens: int, sizes: Sequence[int]) -> int:
    """As `next_chunk`, but from the number of tokens alone, so that a prompt is always fed by the same calls."""
    return _quickest(tokens, sizes, float)[0]


def _quickest(tokens: int, sizes: Sequence[int], seconds_of: SecondsOf) -> tuple[int, float]:
    """The first size of the quickest way to feed `tokens` tokens, and its seconds for all of them.

    As long as they fill the largest function, it is taken: it computes a token in the least time. A smaller rest
    either fills a part of the smallest function that holds it, or the whole of a smaller one, with calls for what is
    then left.
    """
    largest = sizes[0]
    if tokens > largest:
        return largest, math.inf  # nobody asks for the seconds of more than a rest
    holding = min(size for size in sizes if size >= tokens)
    whole = (holding, _known(holding, seconds_of))
    smaller = [size for size in sizes if size < tokens]
    if not smaller:
        return whole
    rest = tokens - smaller[0]
    split = (smaller[0], _known(smaller[0], seconds_of) + _quickest(rest, sizes, seconds_of)[1])
    return min(whole, split, key=lambda way: way[1])


def _known(size: int, seconds_of: SecondsOf) -> float:
    """Seconds of a call; before anything was measured, in units of a token's."""
    seconds = seconds_of(size)
    return float(size) if math.isinf(seconds) else seconds
