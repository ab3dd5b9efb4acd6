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
    encoding_of,
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
from export.weights.widening import RESULT, Step, Stored, Widening, cast
from runtime.artifact.layouts import PANEL, VECTOR, WORD, WORD_ZERO
from runtime.artifact.manifest import TensorSpec

LARGEST = 15
SEARCH = 2**18  # numbers whose scales are searched together
SHRINK = tuple(1 - 0.03 * i for i in range(9))  # of the range that a scale covers; beyond 24 % the error only grows


def _specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    n, k = tensor.shape
    # Two numbers per byte, the lower half first, as in ONNX.
    return (TensorSpec(name=tensor.name, shape=(n, k // 2), dtype="uint8"), *specs_beside(tensor))


def _store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Store a few rows at a time, which bounds the memory of the search for scales and keeps it in the CPU's cache."""
    count = max(SEARCH // rows.shape[1], 1)
    parts = [_search(tensor, rows[start : start + count]) for start in range(0, len(rows), count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _search(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Round to nearest, with the candidate scale (and zero point) that minimizes each group's squared error.

    Symmetric: w = (q - 8) scale. The number with the largest magnitude can be represented exactly by -8, so each
    candidate scale is that number over -8, times a shrinking factor that trades its error for the error of all others.
    Asymmetric: w = (q - zero) scale; the candidates shrink the range.
    """
    n, k = rows.shape
    size, count = tensor.stored.group_size or k, encoding_of(tensor.stored).groups(k)
    padded = np.zeros((n, count * size), np.float32)
    padded[:, :k] = rows
    grouped = padded.reshape(n, count, size)
    best_scale, best_zero = np.ones((n, count), np.float16), np.full((n, count), WORD_ZERO, np.uint8)
    best_error = np.full((n, count), np.inf, np.float32)
    best = np.full(grouped.shape, WORD_ZERO, np.uint8)
    for scale, zero in _candidates(grouped, zero_points=tensor.stored.zero_points):
        wide = scale.astype(np.float32)[..., None]
        quantized = (np.rint(grouped / wide) + zero[..., None]).clip(0, LARGEST)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite scale is never better
            error = np.square((quantized - zero[..., None]) * wide - grouped).sum(-1)
        better = error < best_error
        best_error[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
        best[better] = quantized[better].astype(np.uint8)
    best_scale[np.isinf(best_error)] = np.inf  # too large for every scale, which whoever stores it must refuse
    flat: NDArray[np.uint8] = best.reshape(n, count * size)[:, :k]
    stored: dict[str, Array] = {tensor.name: _bytes(tensor.stored, flat), tensor.name + SCALE_SUFFIX: best_scale}
    return stored | ({tensor.name + ZERO_POINT_SUFFIX: best_zero} if tensor.stored.zero_points else {})


def _candidates(grouped: Float32, *, zero_points: bool) -> list[tuple[NDArray[np.float16], NDArray[np.float32]]]:
    """Scales and zero points (N, groups) to try; scales are float16 numbers, and never zero."""
    smallest = float(np.finfo(np.float16).tiny)
    candidates = []
    if zero_points:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        for factor in SHRINK:
            scale = np.maximum((high - low) * np.float32(factor / LARGEST), smallest).astype(np.float16)
            candidates.append((scale, np.rint(-low * np.float32(factor) / scale.astype(np.float32)).clip(0, LARGEST)))
        return candidates
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
    for factor in (*SHRINK, *(-8 / 7 * factor for factor in SHRINK)):  # the largest number becomes -8, or 7
        scale = (largest * np.float32(-factor / WORD_ZERO)).astype(np.float16)
        scale[np.abs(scale) < smallest] = smallest
        candidates.append((scale, np.full(scale.shape, WORD_ZERO, np.float32)))
    return candidates


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
    multiplies_int8=True,
    multiplies_float16=True,
    multiple=WORD,  # eight numbers are packed together
    working_bytes=1,
)
