"""4-bit numbers in groups of neighbours in a row, each group with a scale and, if requested, a zero point or minimum.

Symmetric: w = (q - 8) scale with q from 0 to 15. With zero points: w = (q - zero) scale. Minimums are only carried from
checkpoints: w = q scale + minimum.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedRows
from export.weights.encoded import (
    arrays_beside,
    load_encoded,
    minimum_steps,
    parts_beside,
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
from export.weights.panels import int4_words, panels_of, to_panels, to_vector_panels
from export.weights.scale_search import GroupScales, search
from export.weights.widening import RESULT, Step, Stored, Widening, cast
from runtime.artifact.layouts import PANEL, VECTOR, WORD, WORD_ZERO
from runtime.artifact.manifest import TensorSpec


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    n, k = tensor.shape
    # Two numbers per byte, the lower half first, as in ONNX.
    return (TensorSpec(name=tensor.name, shape=(n, k // 2), dtype="uint8"), *specs_beside(tensor))


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Round to nearest, with the scale (and zero point) of each group that minimizes its squared error."""
    scales = search_scales(tensor, rows, None)
    return stored_numbers(tensor, scales.rounded(rows), scales)


def search_scales(tensor: ModelTensor, rows: Float32, importance: Float32 | None) -> GroupScales:
    """The best scales of some rows of a tensor; `importance` (K,) is that of the columns, if it is known."""
    size = tensor.stored.group_size or rows.shape[1]
    return search(rows, size, importance, zero_points=tensor.stored.zero_points)


def stored_numbers(tensor: ModelTensor, numbers: NDArray[np.uint8], scales: GroupScales) -> dict[str, Array]:
    """Numbers (N, K) from 0 to 15, with the zero points added, and their scales, as they are stored."""
    stored: dict[str, Array] = {
        tensor.name: _bytes(tensor.stored, numbers),
        tensor.name + SCALE_SUFFIX: scales.scale,
    }
    return stored | ({tensor.name + ZERO_POINT_SUFFIX: scales.zero} if tensor.stored.zero_points else {})


def _bytes(stored: Storage, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack numbers (N, K) from 0 to 15 to stored bytes (N, K / 2): in two's complement where ONNX's dtype is int4."""
    flat: NDArray[np.uint8] = numbers if _unsigned(stored) else numbers ^ np.uint8(WORD_ZERO)
    packed: NDArray[np.uint8] = flat[:, ::2] | flat[:, 1::2] << np.uint8(4)
    return packed


def unpacked(stored: Storage, data: Array) -> NDArray[np.uint8]:
    """Unpack stored bytes (N, K / 2) to numbers (N, K) from 0 to 15, without offsets."""
    pairs = data.view(np.uint8)
    numbers: NDArray[np.uint8] = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], -1).reshape(pairs.shape[0], -1)
    return numbers if _unsigned(stored) else numbers ^ np.uint8(WORD_ZERO)


def _unsigned(stored: Storage) -> bool:
    return stored.offsets != "none"


def _carry(tensor: ModelTensor, rows: EncodedRows) -> dict[str, Array]:
    return {tensor.name: _bytes(tensor.stored, rows.numbers), **arrays_beside(tensor, rows)}


def _load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    return load_encoded(tensor, unpacked(tensor.stored, stored[tensor.name]), stored)


def _widening(tensor: ModelTensor) -> Widening:
    stored = tensor.stored
    assert stored.group_size is not None
    number = "UINT4" if _unsigned(stored) else "INT4"
    casts, scale = scale_steps(tensor)
    inputs: tuple[Stored | str, ...] = (Stored(number=number), scale)
    if stored.zero_points:
        casts, inputs = (*casts, cast("zero_point", Stored(ZERO_POINT_SUFFIX), number)), (*inputs, "zero_point")
    attributes = {"axis": 1, "block_size": stored.group_size}
    if not stored.minimums:
        return Widening((*casts, Step(RESULT, "DequantizeLinear", inputs, attributes)))
    scaled = Step("scaled", "DequantizeLinear", inputs, attributes)
    return Widening((*casts, scaled, *minimum_steps(tensor, "scaled", RESULT)))


def _panels(stored: Storage, n: int, k: int) -> MatrixLayout:
    shape = (panels_of(n), k // WORD, PANEL)
    return MatrixLayout(f"panels_{PANEL}q{WORD}", shape, "int32", *parts_beside(stored, n, k))


def _vectors(stored: Storage, n: int, k: int) -> MatrixLayout:
    words = VECTOR // 4
    shape = (panels_of(n), -(-k // (words * WORD)), PANEL, words)
    return MatrixLayout(f"panels_{PANEL}q{WORD}k{words}", shape, "int32", *parts_beside(stored, n, k))


def _to_panels(stored: Storage, rows: Array, workers: int) -> Array:
    return to_panels(int4_words(unpacked(stored, rows)), workers)


def _to_vectors(stored: Storage, rows: Array, workers: int) -> Array:
    return to_vector_panels(int4_words(unpacked(stored, rows)), workers)


INT4 = Format(
    _specs,
    _store,
    _load,
    _widening,
    {"panels": Packing(_panels, _to_panels), "vectors": Packing(_vectors, _to_vectors)},
    carry=_carry,
    words=True,
    roundings=("int8", "int16"),
    multiplies_float16=True,
    multiple=WORD,  # eight numbers are packed together
    working_bytes=1,
)
