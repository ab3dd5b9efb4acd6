"""8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa) with a float32 scale for each output, or one for each group.

Only carried from checkpoints; nothing is rounded to it.
"""

from export.weights.encoded import carry_bytes, load_bytes, parts_beside, scale_steps, specs_beside, spread
from export.weights.format import Format, MatrixLayout, ModelTensor, Packing, Storage
from export.weights.panels import panels_of, to_panels, to_vector_panels
from export.weights.widening import RESULT, Step, Stored, Widening, cast
from runtime.artifact.layouts import PANEL, VECTOR
from runtime.artifact.manifest import TensorSpec


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype="uint8"), *specs_beside(tensor))


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
    None,
    load_bytes,
    _widening,
    {
        "panels": Packing(_panels, lambda _stored, rows, workers: to_panels(rows, workers)),
        "vectors": Packing(_vectors, lambda _stored, rows, workers: to_vector_panels(rows, workers)),
    },
    carry=carry_bytes,
    multiplies_float16=True,
)
