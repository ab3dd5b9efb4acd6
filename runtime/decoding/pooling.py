"""From the hidden states of a text to one vector."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Pool
from runtime.decoding.whole_texts import Outputs

POOLS: Mapping[Pool, Callable[[Outputs], NDArray[np.float32]]] = {  # (tokens, dim) to (dim,)
    "last": lambda states: states[-1],
    "mean": lambda states: states.mean(0, dtype=np.float64).astype(np.float32),
}


def pooled(states: Outputs, pool: Pool, *, normalize: bool) -> NDArray[np.float32]:
    """Pool hidden states (tokens, dim) into one vector (dim,), of length 1 if `normalize`; zeros stay zeros."""
    vector = POOLS[pool](states)
    length = np.linalg.norm(vector.astype(np.float64))
    return (vector / length).astype(np.float32) if normalize and length > 0 else vector
