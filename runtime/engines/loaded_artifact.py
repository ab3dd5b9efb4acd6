"""An artifact's functions in memory, behind one interface for every kind of machine, and how much memory they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Function, Manifest, ModelConfig
from runtime.artifact.tensor_file import tensor_bytes

# A generous estimate of what a process holds beyond weights, caches and activations: the interpreter's or the driver's
# own memory, libraries, kernels.
PROCESS_BYTES = 300 * 10**6
# States of a token that are alive at once, each as wide as a state and a feed-forward; measured with `make memory` on
# the CPU.
LIVE_STATES = 3
PADDING_ID = 0  # any valid id: the key and value of padding are never seen
HIDDEN = -1  # a position that is neither written nor seen
SMALLER = "compile with a smaller shape.cache_len or a narrower quantize.scheme"  # what to do when memory is short


MAX_STEPS_IN_FLIGHT = 2  # the one that the host waits for, and the one that the device runs next


class Call(Protocol):
    """One compiled function bound to its tensors."""

    @property
    def inputs(self) -> Mapping[str, NDArray[np.int64]]:
        """The inputs by name, which the next call reads."""

    def __call__(self) -> NDArray[np.float32]:
        """The outputs (B, T or 1, n_outputs) for the current inputs, in memory that the next call reuses."""


class Caches(Protocol):
    """The rings of every slot."""

    def copy(self, source: int, target: int, columns: int) -> None:
        """Copy what a slot holds in the first columns of each ring (all, if the ring has fewer) to another slot."""

    def read(self, slot: int, columns: int) -> list[NDArray[Any]]:
        """Copies of these columns in the host's memory, (n_kv_heads, columns, width) each."""

    def write(self, slot: int, columns: Sequence[NDArray[Any]]) -> None:
        """Put back what `read` returned."""


class DeviceSampler(Protocol):
    """Steps of one row that draw their own ids.

    A step reads the id that the step before it drew, without the host in between. At most MAX_STEPS_IN_FLIGHT may be
    started and not yet finished.
    """

    def begin(self, token_id: int, position: int, slot: int) -> None:
        """Set the id that the next step is fed, its position and its slot."""

    def start(self, temperature: float, top_k: int, draw: float) -> None:
        """Start a step. `top_k` 0 means all ids; `draw` is a number from 0 to 1."""

    def finish(self) -> int:
        """Wait for the oldest step in flight; the id that it drew, or -1 if its logits were infinite or NaN."""

    def abandon(self) -> None:
        """Wait for the steps in flight, and discard what they drew."""


@dataclass(frozen=True)
class LoadedArtifact:
    """The functions that the engine calls, by name, and the caches that they update."""

    functions: Mapping[str, Call]
    caches: Caches
    device_sampler: DeviceSampler | None = None  # if the library can draw ids
    cpu_level: str | None = None  # LLVM's name of the processor whose library runs; None if no library does


def device_bytes(manifest: Manifest) -> int:
    """Memory that a running artifact takes: weights, caches, activations, and a generous estimate of the rest."""
    held = sum(map(tensor_bytes, manifest.weights)) + sum(map(tensor_bytes, manifest.caches))
    return held + activation_bytes(manifest.model, manifest.functions) + PROCESS_BYTES


def activation_bytes(model: ModelConfig, functions: Sequence[Function]) -> int:
    """Memory that the functions' float32 activations take; each function keeps its own."""
    tokens = sum(function.rows * function.tokens for function in functions)
    return 4 * tokens * LIVE_STATES * (model.dim + model.hidden_dim * (model.experts_per_token or 1))
