"""8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa) with a float32 scale for each output, or one for each group.

Numbers are rounded with a scale for each output; those with groups come from checkpoints.
"""

import ml_dtypes
import numpy as np

from export.weights.encoded import carry_bytes, load_bytes, parts_beside, row_scales, scale_steps, specs_beside, spread
from export.weights.format import SCALE_SUFFIX, Array, Float32, Format, MatrixLayout, ModelTensor, Packing, Storage
from export.weights.panels import panels_of, to_panels, to_vector_panels
from export.weights.widening import RESULT, Step, Stored, Widening, cast
from runtime.artifact.layouts import PANEL, VECTOR
from runtime.artifact.manifest import TensorSpec

LARGEST = 448  # finite number of e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype="uint8"), *specs_beside(tensor))


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Store with scale = max |row| / 448; a row of zeros, or of numbers too small for a scale, has scale 1."""
    scale = row_scales(rows, LARGEST)
    quotients = (rows / scale[:, None]).clip(-LARGEST, LARGEST)  # beyond, there is only NaN
    numbers = quotients.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return {tensor.name: numbers, tensor.name + SCALE_SUFFIX: scale}


def _widening(tensor: ModelTensor) -> Widening:
    number = cast("numbers", Stored(number="FLOAT8E4M3FN"), "FLOAT")
    casts, scale = scale_steps(tensor)
    return Widening((number, *casts, *spread(tensor, "scales", scale), Step(RESULT, "Mul", ("numbers", "scales"))))


def _panels(stored: Storage, n: int, k: int) -> MatrixLayout:
    return MatrixLayout(f"panels_{PANEL}", (panels_of(n), k, PANEL), "uint8", *parts_beside(stored, n, k))


def _vectors(stored: Storage, n: int, k: int) -> MatrixLayout:
    shape = (panels_of(n), -(-k // VECTOR), PANEL, VECTOR)
    return MatrixLayout(f"panels_{PANEL}k{VECTOR}", shape, "uint8", *parts_beside(stored, n, k))


FLOAT8 = Format(
    _specs,
    _store,
    load_bytes,
    _widening,
    {
        "panels": Packing(_panels, lambda _stored, rows, workers: to_panels(rows, workers)),
        "vectors": Packing(_vectors, lambda _stored, rows, workers: to_vector_panels(rows, workers)),
    },
    carry=carry_bytes,
    multiplies_float16=True,
    working_bytes=8,  # quotients and their limits; after that, only the scales are kept
)
