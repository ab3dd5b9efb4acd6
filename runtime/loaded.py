"""An artifact's functions in memory, behind one surface for every kind of machine; and how much memory that takes."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Manifest
from runtime.tensor_file import numpy_dtype

PROCESS_BYTES = 300 * 10**6  # beside weights, caches and activations: the interpreter or the driver's own, libraries, kernels
ACTIVATIONS = 4  # of a token at once, each as wide as a state and both halves of a feed-forward, float32


@dataclass(frozen=True)
class Loaded:
    """What the engine calls, by tokens per call."""

    inputs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]  # ids and positions (B, T), which the next call reads
    functions: dict[int, Callable[[], NDArray[np.float32]]]  # to the outputs (B, T or 1, n_outputs), in memory that the next call uses again
    caches: list[Any]  # one for each cache of the signature: arrays on a CPU, tensors on a GPU


def device_bytes(manifest: Manifest) -> int:
    """What an artifact takes where it runs: weights, caches, and a generous estimate of activations and of what no tensor holds."""
    model = manifest.model
    weights = sum(prod(spec.shape) * numpy_dtype(spec.dtype).itemsize for spec in manifest.weights)
    caches = sum(prod(spec.shape) * numpy_dtype(spec.dtype).itemsize for spec in manifest.graphs[-1].signature.caches)
    tokens = manifest.shape.batch * sum(graph.tokens for graph in manifest.graphs)  # each graph keeps its own
    experts = model.experts_per_token or 1
    return weights + caches + PROCESS_BYTES + tokens * ACTIVATIONS * 4 * (model.dim + 2 * experts * model.hidden_dim)
