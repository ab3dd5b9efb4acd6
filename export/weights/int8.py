"""int8 with one float32 scale for each output: q = round(w / scale), symmetric."""

from collections.abc import Mapping

import numpy as np

from export.weights.format import (
    SCALE_SUFFIX,
    Array,
    Float32,
    Format,
    MatrixLayout,
    ModelTensor,
    Packing,
    Scales,
    Storage,
    Widening,
    WideningInput,
)
from export.weights.panels import panels_of, to_dot_panels, to_panels, to_vector_panels
from runtime.artifact.layouts import DOT, PANEL, VECTOR
from runtime.artifact.manifest import TensorSpec

LARGEST = 127  # symmetric: -128 is left unused, so that negation is exact


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name=tensor.name, shape=tensor.shape, dtype="int8"),
        TensorSpec(name=tensor.name + SCALE_SUFFIX, shape=tensor.shape[:1], dtype="float32"),
    )


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Store with scale = max |row| / 127; a row of zeros, or of numbers too small for a scale, has scale 1."""
    largest = np.abs(rows).max(axis=1)
    scale = (largest / np.float32(LARGEST)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))  # zeros, and numbers so small that their scale would be zero
    quantized = np.rint(rows / scale[:, None]).clip(-LARGEST, LARGEST).astype(np.int8)
    return {tensor.name: quantized, tensor.name + SCALE_SUFFIX: scale}


def _load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    scale: Float32 = stored[tensor.name + SCALE_SUFFIX].astype(np.float32)
    return stored[tensor.name].astype(np.float32) * scale[:, None]


def _widening(_tensor: ModelTensor) -> Widening:
    return Widening((WideningInput(), WideningInput(SCALE_SUFFIX)), "DequantizeLinear", {"axis": 0})


def _panels(stored: Storage, n: int, k: int) -> MatrixLayout:
    """Panels: if activations are rounded too, with four steps of K side by side, as integer dot products take them."""
    if stored.dynamic:
        shape = (panels_of(n), -(-k // DOT), PANEL, DOT)
        return MatrixLayout(f"panels_{PANEL}k{DOT}", shape, "int8", ((n,), "float32"))
    return MatrixLayout(f"panels_{PANEL}", (panels_of(n), k, PANEL), "int8", ((n,), "float32"))


def _to_panels(stored: Storage, rows: Array, workers: int) -> Array:
    return (to_dot_panels if stored.dynamic else to_panels)(rows, workers)


def _vectors(_stored: Storage, n: int, k: int) -> MatrixLayout:
    shape = (panels_of(n), -(-k // VECTOR), PANEL, VECTOR)
    return MatrixLayout(f"panels_{PANEL}k{VECTOR}", shape, "int8", ((n,), "float32"))


INT8 = Format(
    _specs,
    _store,
    _load,
    _widening,
    {
        "panels": Packing(_panels, _to_panels),
        "vectors": Packing(_vectors, lambda _stored, rows, workers: to_vector_panels(rows, workers)),
    },
    scales=Scales.ROWS,
    multiplies_int8=True,
    multiplies_float16=True,
    working_bytes=8,  # quotients and their rounding; after that, only the scales are kept
)
