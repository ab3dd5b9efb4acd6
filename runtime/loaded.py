"""An artifact's functions in memory, behind one surface for every kind of machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Loaded:
    """What the engine calls, by tokens per call."""

    inputs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]  # ids and positions (B, T), which the next call reads
    functions: dict[int, Callable[[], NDArray[np.float32]]]  # to the outputs (B, T or 1, n_outputs), in memory that the next call uses again
    caches: list[Any]  # one for each cache of the signature: arrays on a CPU, tensors on a GPU
