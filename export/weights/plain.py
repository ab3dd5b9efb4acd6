"""Plain numbers: float32, float16 and bfloat16, without scales."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from export.weights.format import (
    Array,
    Float32,
    Format,
    MatrixLayout,
    ModelTensor,
    Packing,
    Storage,
)
from export.weights.panels import panels_of, to_pair_panels, to_panels, to_vector_panels
from export.weights.widening import RESULT, Stored, Widening, cast
from runtime.artifact.layouts import PAIR, PANEL, VECTOR
from runtime.artifact.manifest import TensorSpec


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype=tensor.stored.dtype),)  # type: ignore[arg-type]


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    return {tensor.name: rows.astype(tensor.stored.dtype, copy=False)}


def _store_bfloat16(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    return {tensor.name: rows.astype(ml_dtypes.bfloat16, copy=False)}


def _load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    return stored[tensor.name].astype(np.float32)


def _as_it_is(_tensor: ModelTensor) -> None:
    return None


def _cast(_tensor: ModelTensor) -> Widening:
    return Widening((cast(RESULT, Stored(), "FLOAT"),))


def _panels(stored: Storage, n: int, k: int) -> MatrixLayout:
    return MatrixLayout(f"panels_{PANEL}", (panels_of(n), k, PANEL), stored.dtype)


def _bfloat16_panels(_stored: Storage, n: int, k: int) -> MatrixLayout:
    """Store bfloat16 as uint16, since numpy, in which weights are handed over, has no bfloat16."""
    return MatrixLayout(f"panels_{PANEL}k{PAIR}", (panels_of(n), -(-k // PAIR), PANEL, PAIR), "uint16")


def _vectors(stored: Storage, n: int, k: int) -> MatrixLayout:
    steps = VECTOR // np.dtype(stored.dtype).itemsize
    return MatrixLayout(f"panels_{PANEL}k{steps}", (panels_of(n), -(-k // steps), PANEL, steps), stored.dtype)


PANELS = Packing(_panels, lambda _stored, rows, workers: to_panels(rows, workers))
VECTORS = Packing(_vectors, lambda _stored, rows, workers: to_vector_panels(rows, workers))
BFLOAT16_PANELS = Packing(
    _bfloat16_panels, lambda _stored, rows, workers: to_pair_panels(rows.view(np.uint16), workers)
)

FLOAT32 = Format(_specs, _store, _load, _as_it_is, {"panels": PANELS, "vectors": VECTORS}, kept_bytes=4)
FLOAT16 = Format(
    _specs,
    _store,
    _load,
    _cast,
    {"panels": PANELS, "vectors": VECTORS},
    multiplies_float16=True,
    working_bytes=2,
    kept_bytes=2,
)
BFLOAT16 = Format(
    _specs,
    _store_bfloat16,
    _load,
    _cast,
    {"panels": BFLOAT16_PANELS},
    roundings=("bfloat16",),
    working_bytes=2,
    kept_bytes=2,
)
