"""int8 with a float32 scale for each output: q = round(w / scale), symmetric; or, carried from a checkpoint, in groups.

Carried numbers may have zero points or minimums; see `export.checkpoints.encodings.encoding`.
"""

import numpy as np

from export.weights.encoded import (
    carry_bytes,
    load_bytes,
    minimum_steps,
    parts_beside,
    row_scales,
    scale_steps,
    specs_beside,
)
from export.weights.format import (
    SCALE_SUFFIX,
    ZERO_POINT_SUFFIX,
    Array,
    Float32,
    Format,
    MatrixLayout,
    ModelTensor,
    Packing,
    Storage,
)
from export.weights.panels import panels_of, to_dot_panels, to_panels, to_vector_panels
from export.weights.widening import RESULT, Step, Stored, Widening
from runtime.artifact.layouts import DOT, PANEL, VECTOR
from runtime.artifact.manifest import TensorSpec

LARGEST = 127  # symmetric: -128 is left unused, so that negation is exact


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype="int8"), *specs_beside(tensor))


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Store with scale = max |row| / 127; a row of zeros, or of numbers too small for a scale, has scale 1."""
    scale = row_scales(rows, LARGEST)
    quantized = np.rint(rows / scale[:, None]).clip(-LARGEST, LARGEST).astype(np.int8)
    return {tensor.name: quantized, tensor.name + SCALE_SUFFIX: scale}


def _widening(tensor: ModelTensor) -> Widening:
    stored = tensor.stored
    if stored.group_size is None:
        inputs: tuple[Stored | str, ...] = (Stored(), Stored(SCALE_SUFFIX))
        return Widening((Step(RESULT, "DequantizeLinear", inputs, {"axis": 0}),))
    casts, scale = scale_steps(tensor)
    inputs = (Stored(), scale, *([Stored(ZERO_POINT_SUFFIX)] if stored.zero_points else []))
    attributes = {"axis": 1, "block_size": stored.group_size}
    if not stored.minimums:
        return Widening((*casts, Step(RESULT, "DequantizeLinear", inputs, attributes)))
    scaled = Step("scaled", "DequantizeLinear", inputs, attributes)
    return Widening((*casts, scaled, *minimum_steps(tensor, "scaled", RESULT)))


def _panels(stored: Storage, n: int, k: int) -> MatrixLayout:
    """Panels: if activations are rounded too, with four steps of K side by side, as integer dot products take them."""
    beside = parts_beside(stored, n, k)
    if stored.rounds:
        return MatrixLayout(f"panels_{PANEL}k{DOT}", (panels_of(n), -(-k // DOT), PANEL, DOT), "int8", *beside)
    return MatrixLayout(f"panels_{PANEL}", (panels_of(n), k, PANEL), "int8", *beside)


def _to_panels(stored: Storage, rows: Array, workers: int) -> Array:
    return (to_dot_panels if stored.rounds else to_panels)(rows, workers)


def _vectors(stored: Storage, n: int, k: int) -> MatrixLayout:
    shape = (panels_of(n), -(-k // VECTOR), PANEL, VECTOR)
    return MatrixLayout(f"panels_{PANEL}k{VECTOR}", shape, "int8", *parts_beside(stored, n, k))


INT8 = Format(
    _specs,
    _store,
    load_bytes,
    _widening,
    {
        "panels": Packing(_panels, _to_panels),
        "vectors": Packing(_vectors, lambda _stored, rows, workers: to_vector_panels(rows, workers)),
    },
    carry=carry_bytes,
    roundings=("int8", "int16"),
    multiplies_float16=True,
    working_bytes=8,  # quotients and their rounding; after that, only the scales are kept
)
