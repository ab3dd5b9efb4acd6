"""An artifact's functions in memory, behind one interface for every kind of machine, and how much memory they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Graph, Manifest, ModelConfig, Shape
from runtime.artifact.tensor_file import tensor_bytes

# A generous estimate of what a process holds beyond weights, caches and activations: the interpreter's or the driver's
# own memory, libraries, kernels.
PROCESS_BYTES = 300 * 10**6
# States of a token that are alive at once, each as wide as a state and a feed-forward; measured with `make memory` on
# the CPU.
LIVE_STATES = 3
PADDING_ID = 0  # any valid id: the key and value of padding are never seen
SMALLER = "compile with a smaller shape.cache_len or a narrower quantize.scheme"  # what to do when memory is short


MAX_STEPS_IN_FLIGHT = 2  # the one that the host waits for, and the one that the device runs next


class DeviceSampler(Protocol):
    """Decode steps of one sequence that draw their own ids.

    A step reads the id that the step before it drew, without the host in between. At most MAX_STEPS_IN_FLIGHT may be
    started and not yet finished.
    """

    def begin(self, token_id: int, position: int) -> None:
        """Set the id that the next step is fed, and its position."""

    def start(self, temperature: float, top_k: int, draw: float) -> None:
        """Start a step. `top_k` 0 means all ids; `draw` is a number from 0 to 1."""

    def finish(self) -> int:
        """Wait for the oldest step in flight; the id that it drew, or -1 if its logits were infinite or NaN."""

    def abandon(self) -> None:
        """Wait for the steps in flight, and discard what they drew."""


@dataclass(frozen=True)
class LoadedArtifact:
    """The functions that the engine calls and their inputs, keyed by tokens per call."""

    # ids and positions (B, T), which the next call reads
    inputs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
    # return the outputs (B, T or 1, n_outputs) in memory that the next call reuses
    functions: dict[int, Callable[[], NDArray[np.float32]]]
    caches: list[Any]  # one for each cache of the signature: arrays on a CPU, tensors on a GPU
    device_sampler: DeviceSampler | None = None  # if the library can draw ids


def device_bytes(manifest: Manifest) -> int:
    """Memory that a running artifact takes: weights, caches, activations, and a generous estimate of the rest."""
    held = sum(map(tensor_bytes, manifest.weights)) + sum(map(tensor_bytes, manifest.graphs[-1].signature.caches))
    return held + activation_bytes(manifest.model, manifest.shape, manifest.graphs) + PROCESS_BYTES


def activation_bytes(model: ModelConfig, shape: Shape, graphs: Sequence[Graph]) -> int:
    """Memory that the graphs' float32 activations take; each graph keeps its own."""
    tokens = shape.batch * sum(graph.tokens for graph in graphs)
    return 4 * tokens * LIVE_STATES * (model.dim + model.hidden_dim * (model.experts_per_token or 1))
