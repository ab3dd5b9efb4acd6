"""Log probabilities of tokens, before any penalty or filter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.filters import highest_ids


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of the chosen token, and the likeliest tokens with theirs, best first.

    The chosen token need not be among the likeliest.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def row_logprobs(
    logits: NDArray[np.float32], chosen: Sequence[int] | NDArray[np.int64], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Log probabilities of each row of logits (n, vocab): of its chosen id, and of its likeliest ids.

    `counts` says how many of the likeliest ids each row asks for; 0 is none. The logits hold neither NaN nor infinity.
    """
    found = []
    for row, token_id, count in zip(logits, chosen, counts, strict=True):
        log_sum = _log_sum(row)
        found.append(TokenLogprobs(float(row[token_id]) - log_sum, tuple(_likeliest(row, count, log_sum))))
    return found


def _log_sum(logits: NDArray[np.float32]) -> float:
    """The logarithm of the sum of exponentials, in float64."""
    distances = logits.astype(np.float64)
    highest = float(logits.max())
    distances -= highest
    return highest + math.log(np.exp(distances, out=distances).sum())


def _likeliest(logits: NDArray[np.float32], count: int, log_sum: float) -> list[tuple[int, float]]:
    if count == 0:
        return []
    ids = highest_ids(logits, count)
    best = ids[np.argsort(-logits[ids], kind="stable")][:count]  # of equal ones, the first
    return [(token_id, float(logits[token_id]) - log_sum) for token_id in best.tolist()]
