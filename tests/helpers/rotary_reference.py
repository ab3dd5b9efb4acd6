"""Rotary frequencies and the factors that come with them, in numpy float64, from the papers' definitions.

Nothing here calls the project's code; only the records that describe a scaling are its.
"""

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.rotary import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    QueryScaling,
    RopeScaling,
    YarnScaling,
)

Float64 = NDArray[np.float64]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float64:
    """Radians per position of each pair, (head_dim / 2,)."""
    plain = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    match scaling:
        case None:
            return plain
        case LinearScaling():
            return plain / scaling.factor
        case DivisorScaling():
            return plain / np.array(scaling.divisors)
        case Llama3Scaling():
            turns = scaling.original_context * plain / (2 * np.pi)  # within the original context
            share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        case YarnScaling():
            share = 1 - yarn_ramp(head_dim, theta, scaling)
    share = np.clip(share, 0, 1)  # of the unscaled frequency
    return plain * (share + (1 - share) / scaling.factor)


def yarn_ramp(head_dim: int, theta: float, scaling: YarnScaling) -> Float64:
    """0 up to the pair that turns `beta_fast` times within the original context, 1 from that with `beta_slow` on."""
    first, last = (
        head_dim / 2 * np.log(scaling.original_context / (2 * np.pi * turns)) / np.log(theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return (np.arange(head_dim // 2) - first) / (last - first if last > first else 1e-3)


def magnitude(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def query_factor(scaling: QueryScaling | None, position: int) -> float:
    """What a query at a position is multiplied by."""
    if scaling is None:
        return 1.0
    return float(1 + scaling.beta * np.log1p(max(position, 0) // scaling.original_context))
