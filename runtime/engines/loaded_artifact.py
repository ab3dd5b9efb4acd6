"""An artifact's functions in memory, behind one surface for every kind of machine; and how much memory that takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Graph, Manifest, ModelConfig, Shape
from runtime.artifact.tensor_file import tensor_bytes

PROCESS_BYTES = (
    300 * 10**6
)  # beside weights, caches and activations, generously: the interpreter or the driver's own, libraries, kernels
LIVE_STATES = (
    3  # of a token at once, each as wide as a state and a feed-forward; measured with `make memory` on the CPU
)
PADDING_ID = 0  # any valid id: the key and value of padding are never seen
SMALLER = "compile with a smaller shape.cache_len or a narrower quantize.scheme"  # what to do where memory is short


MAX_STEPS_IN_FLIGHT = 2  # one that is waited for, and one that the device goes on with


class DeviceSampler(Protocol):
    """Decode steps of one sequence that draw their own ids: a step reads the id that the one before it drew, and needs nobody in between.

    At most MAX_STEPS_IN_FLIGHT may be started and not yet finished.
    """

    def begin(self, token_id: int, position: int) -> None:
        """The id that the next step is fed, and its position."""

    def start(self, temperature: float, top_k: int, draw: float) -> None:
        """Start a step. `top_k` 0 is all ids, `draw` a number of 0 to 1."""

    def finish(self) -> int:
        """The id that the oldest step on its way has drawn; -1 where its logits were infinite or no numbers."""

    def abandon(self) -> None:
        """Wait for the steps on their way, and forget what they drew."""


@dataclass(frozen=True)
class LoadedArtifact:
    """What the engine calls, by tokens per call."""

    inputs: dict[
        int, tuple[NDArray[np.int64], NDArray[np.int64]]
    ]  # ids and positions (B, T), which the next call reads
    functions: dict[
        int, Callable[[], NDArray[np.float32]]
    ]  # to the outputs (B, T or 1, n_outputs), in memory that the next call uses again
    caches: list[Any]  # one for each cache of the signature: arrays on a CPU, tensors on a GPU
    device_sampler: DeviceSampler | None = None  # where the library can draw ids


def device_bytes(manifest: Manifest) -> int:
    """What an artifact takes where it runs: weights, caches, activations, and a generous estimate of what no tensor holds."""
    held = sum(map(tensor_bytes, manifest.weights)) + sum(map(tensor_bytes, manifest.graphs[-1].signature.caches))
    return held + activation_bytes(manifest.model, manifest.shape, manifest.graphs) + PROCESS_BYTES


def activation_bytes(model: ModelConfig, shape: Shape, graphs: Sequence[Graph]) -> int:
    """What the graphs' activations take, float32; each graph keeps its own."""
    tokens = shape.batch * sum(graph.tokens for graph in graphs)
    return 4 * tokens * LIVE_STATES * (model.dim + model.hidden_dim * (model.experts_per_token or 1))
