"""An engine without a library, whose functions answer with the ids that the rows of a call can see in their rings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import COLUMN, IDS, POSITIONS, SLOTS, Function, ModelConfig, Shape
from runtime.artifact.signatures import functions_of
from runtime.engines.engine import Engine
from runtime.engines.host import HostCaches
from runtime.engines.loaded_artifact import LoadedArtifact

VOCAB = 500


def model_with(windows: Sequence[int | None]) -> ModelConfig:
    """A model with a layer for each window."""
    return ModelConfig(
        family="mistral",
        dim=8,
        hidden_dim=8,
        n_layers=len(windows),
        n_heads=2,
        n_kv_heads=1,
        head_dim=4,
        vocab_size=VOCAB,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=tuple(windows),
        tied_embeddings=False,
    )


def seen(tokens: Sequence[int], windows: Sequence[int]) -> float:
    """What a ring engine answers after these tokens, as a number that float32 holds."""
    return _number([list(tokens[max(len(tokens) - window, 0) :]) for window in windows])


def ring_engine(windows: Sequence[int | None], shape: Shape) -> Engine:
    """An engine whose logits after a slot's tokens all are `seen(tokens, model.cache_lens(...))`.

    A function writes the ids of its rows into the ring of each layer, at their positions, and then reads for each row
    the columns that the mask of the layer shows.
    """
    model = model_with(windows)
    rings = [
        np.full((shape.slots, 1, length, 1), -1) for length in model.ring_lens(shape.cache_len, shape.longest_call)
    ]
    functions = {
        function.name: _RingCall(
            {spec.name: np.zeros(spec.shape, np.int64) for spec in function.signature.call},
            function,
            model.cache_lens(shape.cache_len),
            rings,
        )
        for function in functions_of(model, shape, "float32")
    }
    manifest: Any = SimpleNamespace(model=model, shape=shape, name="rings", target=SimpleNamespace(kind="llvm"))
    return Engine(manifest, Path(), LoadedArtifact(functions, HostCaches(rings)))


def _number(histories: list[list[int]]) -> float:
    return float(crc32(repr(histories).encode()) >> 8)


@dataclass(frozen=True)
class _RingCall:
    inputs: dict[str, NDArray[np.int64]]
    function: Function
    windows: Sequence[int]
    rings: Sequence[NDArray[np.int64]]

    def __call__(self) -> NDArray[np.float32]:
        """Logits (B, 1, vocab)."""
        tokens = self.function.tokens
        slots = np.repeat(self.inputs[SLOTS], tokens)
        rows = list(zip(slots, self.inputs[POSITIONS].ravel(), self.inputs[IDS].ravel(), strict=True))
        for slot, position, token_id in rows:
            if position >= 0:
                for ring in self.rings:
                    ring[slot, 0, position % ring.shape[2], 0] = token_id
        if tokens > 1:
            rows = [rows[self.inputs[COLUMN][0]]]
        numbers = [self._seen(slot, position) for slot, position, _ in rows]
        return np.repeat(np.array(numbers, np.float32), VOCAB).reshape(len(rows), 1, VOCAB)

    def _seen(self, slot: int, position: int) -> float:
        return _number(
            [
                [int(ring[slot, 0, p % ring.shape[2], 0]) for p in range(max(position - window + 1, 0), position + 1)]
                for ring, window in zip(self.rings, self.windows, strict=True)
            ]
        )
