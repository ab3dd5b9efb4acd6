"""What the formats with scales have in common: the tensors beside the numbers, their values, and their widening."""

from collections.abc import Mapping

import numpy as np

from export.checkpoints.encodings.encoding import EncodedRows, Encoding, decoded
from export.weights.format import (
    MINIMUM_SUFFIX,
    ORDER_SUFFIX,
    SCALE_SUFFIX,
    ZERO_POINT_SUFFIX,
    Array,
    Float32,
    ModelTensor,
    Storage,
)
from export.weights.panels import panels_of
from export.weights.widening import Step, Stored, cast, spread_steps
from runtime.artifact.layouts import PANEL
from runtime.artifact.manifest import TensorSpec
from runtime.artifact.schemes import Rounding

Part = tuple[tuple[int, ...], str]
OFFSET_SUFFIXES = {"zero_points": ZERO_POINT_SUFFIX, "minimums": MINIMUM_SUFFIX}
ZERO_POINT_DTYPES = {"int4": "uint8", "int8": "int8"}  # by the format


def encoding_of(stored: Storage) -> Encoding:
    """A stored matrix in a checkpoint's terms."""
    scales = stored.scales if stored.grouped else "float32"
    return Encoding(stored.dtype, stored.group_size, scales, stored.offsets)  # type: ignore[arg-type]


def carried_storage(encoding: Encoding, rounding: Rounding) -> Storage:
    """How a matrix is stored that keeps the numbers of a checkpoint."""
    return Storage(
        dtype=encoding.numbers,
        group_size=encoding.group_size,
        offsets=encoding.offsets,
        rounding=rounding,
        scales=encoding.scales if encoding.group_size is not None else "float16",
        reordered=encoding.order is not None,
    )


def row_scales(rows: Float32, largest: int) -> Float32:
    """The scale (N,) with which each row of floats (N, K) fills the range of numbers up to `largest`; 1 for zeros."""
    scale = (np.abs(rows).max(axis=1) / np.float32(largest)).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))  # zeros, and numbers so small that their scale would be zero


def specs_beside(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    """The stored tensors beside the numbers: scales, offsets and order, as far as there are any."""
    stored, (n, k) = tensor.stored, tensor.shape
    encoding = encoding_of(stored)
    shape = (n, encoding.groups(k)) if stored.grouped else (n,)
    found = [TensorSpec(name=tensor.name + SCALE_SUFFIX, shape=shape, dtype=encoding.scales)]
    if stored.offsets != "none":
        name = tensor.name + OFFSET_SUFFIXES[stored.offsets]
        found.append(TensorSpec(name=name, shape=shape, dtype=_offset_dtype(stored)))  # type: ignore[arg-type]
    if stored.reordered:
        found.append(TensorSpec(name=tensor.name + ORDER_SUFFIX, shape=(k,), dtype="int32"))
    return tuple(found)


def _offset_dtype(stored: Storage) -> str:
    return stored.scales if stored.minimums else ZERO_POINT_DTYPES[stored.dtype]


def arrays_beside(tensor: ModelTensor, rows: EncodedRows) -> dict[str, Array]:
    """The arrays for `specs_beside`."""
    stored = tensor.stored
    found: dict[str, Array] = {tensor.name + SCALE_SUFFIX: rows.scales if stored.grouped else rows.scales[:, 0]}
    if rows.offsets is not None:
        found[tensor.name + OFFSET_SUFFIXES[stored.offsets]] = rows.offsets
    if rows.order is not None:
        found[tensor.name + ORDER_SUFFIX] = rows.order
    return found


def load_encoded(tensor: ModelTensor, numbers: Array, stored: Mapping[str, Array]) -> Float32:
    """The exact values of a weight, from numbers as `EncodedRows` has them and the stored arrays beside them."""
    offsets, scales = OFFSET_SUFFIXES.get(tensor.stored.offsets), stored[tensor.name + SCALE_SUFFIX]
    rows = EncodedRows(
        numbers,
        scales if tensor.stored.grouped else scales[:, None],
        stored[tensor.name + offsets] if offsets else None,
        stored[tensor.name + ORDER_SUFFIX].astype(np.int32) if tensor.stored.reordered else None,
    )
    return decoded(rows, encoding_of(tensor.stored))


def carry_bytes(tensor: ModelTensor, rows: EncodedRows) -> dict[str, Array]:
    """Stored arrays of rows whose numbers take a byte each: as they are."""
    return {tensor.name: rows.numbers, **arrays_beside(tensor, rows)}


def load_bytes(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    """The exact values of a weight whose numbers take a byte each."""
    return load_encoded(tensor, stored[tensor.name], stored)


def scale_steps(tensor: ModelTensor) -> tuple[tuple[Step, ...], Stored | str]:
    """Steps that make the scales float32, and the input that then stands for them."""
    if encoding_of(tensor.stored).scales == "float32":
        return (), Stored(SCALE_SUFFIX)
    return (cast("scale", Stored(SCALE_SUFFIX), "FLOAT"),), "scale"


def spread(tensor: ModelTensor, label: str, given: Stored | str) -> tuple[Step, ...]:
    """Steps from one number for each group to one for each weight."""
    n, k = tensor.shape
    size = tensor.stored.group_size or k
    return spread_steps(label, given, n, encoding_of(tensor.stored).groups(k), size, k)


def minimum_steps(tensor: ModelTensor, scaled: str, label: str) -> tuple[Step, ...]:
    """Steps that add each group's minimum to its scaled numbers."""
    given: Stored | str = Stored(MINIMUM_SUFFIX)
    steps: tuple[Step, ...] = ()
    if tensor.stored.scales != "float32":
        steps, given = (cast("minimum", given, "FLOAT"),), "minimum"
    return (*steps, *spread(tensor, "minimums", given), Step(label, "Add", (scaled, "minimums")))


def parts_beside(stored: Storage, n: int, k: int) -> tuple[Part, Part | None, Part | None]:
    """Shapes and dtypes of packed scales, offsets and order; of scales of groups, one step of a panel for each."""
    order: Part | None = ((k,), "int32") if stored.reordered else None
    if not stored.grouped:
        return ((n,), "float32"), None, order
    shape = (panels_of(n), encoding_of(stored).groups(k), PANEL)
    return (shape, stored.scales), ((shape, _offset_dtype(stored)) if stored.offsets != "none" else None), order
