"""Matrices of whole numbers of at most 8 bits, whose weights are scale * (number - zero point).

GPTQ, AWQ and compressed-tensors store such numbers in different places, which `AffineStorage` hides. Products of a
float16 or bfloat16 scale and a number are exact in float32, and so are their sums that stand for a weight.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import NUMBERS, EncodedRows, Encoding, Offsets, check_finite
from export.checkpoints.quantized.matrix import Float32, QuantizedMatrix
from export.checkpoints.quantized.module import Module
from export.checkpoints.source import Array
from runtime.errors import UserError

NARROW, WIDE = 4, 8  # bits of the kinds of numbers in which such matrices are carried
Order = NDArray[np.int32]
ZeroPoints = NDArray[np.int16]


class AffineStorage(Protocol):
    """Reads rows of a matrix (N, K); columns are as the matrix has them."""

    def numbers(self, rows: slice) -> NDArray[np.uint8]:
        """Numbers (n, K), from 0 to 2 ** bits - 1."""

    def scales(self, rows: slice) -> Array:
        """Scales (n, groups), as stored."""

    def zero_points(self, rows: slice) -> ZeroPoints:
        """Zero points (n, groups), on the scale of the numbers; up to 2 ** bits."""


@dataclass(frozen=True)
class AffineMatrix:
    """A matrix that an `AffineStorage` holds, to be carried as it is.

    Numbers and zero points are both moved by `shift`, which changes no weight: so that the middle of what the storage
    can hold becomes the zero point that is meant where an encoding has none.
    """

    scale_name: str  # for errors
    storage: AffineStorage
    encoding: Encoding
    shift: int
    order: Order | None = None

    def read(self, rows: slice) -> EncodedRows:
        """Some rows; raises `UserError` for a scale that is NaN or infinite."""
        stored = self.storage.numbers(rows)
        if self.order is not None:
            stored = stored[:, self.order]
        # A sum below 0 wraps to the bits of that number as int8.
        numbers = (stored + np.uint8(self.shift % 256)).view(NUMBERS[self.encoding.numbers].dtype)
        scales = self.storage.scales(rows).astype(self.encoding.scales)
        found = EncodedRows(numbers, scales, self._offsets(rows, scales), self.order)
        check_finite(found, self.scale_name, rows.start or 0)
        return found

    def _offsets(self, rows: slice, scales: Array) -> Array | None:
        if self.encoding.offsets == "none":
            return None
        zero_points = self.storage.zero_points(rows) + np.int16(self.shift)
        if self.encoding.offsets == "minimums":
            return scales * -zero_points.astype(np.float32)
        return zero_points.astype(NUMBERS[self.encoding.numbers].dtype)


def affine_matrix(
    module: Module,
    packing: str,
    shape: tuple[int, int],
    storage: AffineStorage,
    *,
    bits: int,
    group_size: int,
    scale: str,
    stored: Sequence[str],
    order: Order | None = None,
) -> QuantizedMatrix:
    """A matrix of `bits` bits in groups; `scale` is how the name of its scales ends, `stored` names its tensors.

    All its zero points are read, since on them depends how it can be carried.
    """
    columns = shape[1]
    by_rows = group_size == columns
    group = np.arange(columns) // group_size  # of each column
    if order is not None:
        group = group[np.argsort(order)]
    dtype = module.source.tensors[module.of(scale)].dtype
    offsets = _offsets_of(storage.zero_points(slice(0, shape[0])), bits, exact_minimums=dtype != "float32")
    encoded = None
    if offsets is not None:
        encoding = Encoding(
            "int4" if bits <= NARROW else "int8",
            None if by_rows else group_size,
            "float16" if dtype == "float16" and offsets != "minimums" else "float32",
            offsets,
            None if order is None else hashlib.sha256(order.tobytes()).hexdigest(),
        )
        shift = NUMBERS[encoding.numbers].middle - 2 ** (bits - 1)
        encoded = AffineMatrix(module.of(scale), storage, encoding, shift, order)

    def floats(rows: slice) -> Float32:
        zero_points = storage.zero_points(rows)[:, group]
        scales = storage.scales(rows).astype(np.float32)[:, group]
        return scales * (storage.numbers(rows) - zero_points)

    details = "with a scale for each row" if by_rows else f"in groups of {group_size}"
    ordered = "" if order is None else ", columns ordered by their activations"
    return QuantizedMatrix(shape, packing, details + ordered, tuple(stored), floats, encoded)


def _offsets_of(zero_points: ZeroPoints, bits: int, *, exact_minimums: bool) -> Offsets | None:
    """The offsets that keep these zero points; None if only a minimum could, and it would be rounded."""
    if (zero_points == 2 ** (bits - 1)).all():
        return "none"
    held = NARROW if bits <= NARROW else WIDE
    if zero_points.max() - 2 ** (bits - 1) < 2 ** (held - 1):  # above the middle
        return "zero_points"
    return "minimums" if exact_minimums else None


def order_of(module: Module, ending: str, columns: int, group_size: int) -> Order | None:
    """The order of columns in which groups follow each other, from the group of each column; None for their own.

    Raises `UserError` if the tensor does not divide the columns into whole groups.
    """
    if not module.has(ending):
        return None
    module.check(ending, ("int32", "int64"), (columns,), f"{columns} columns")
    group = module.read(ending).astype(np.int64)
    fault = _fault_of(group, columns // group_size, group_size)
    if fault is not None:
        raise UserError(
            f"{module.where}: the tensor {module.of(ending)} names {fault}, expected each of the groups 0 to "
            f"{columns // group_size - 1} for {group_size} columns; fetch the checkpoint again"
        )
    order = np.argsort(group, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(columns)) else order


def _fault_of(group: NDArray[np.int64], count: int, size: int) -> str | None:
    """What keeps the groups of columns from being `count` groups of a size; None if nothing does."""
    outside = group[(group < 0) | (group >= count)]
    if len(outside):
        return f"the group {outside[0]}"
    sizes = np.bincount(group, minlength=count)
    wrong = np.flatnonzero(sizes != size)
    return f"{sizes[wrong[0]]} columns in group {wrong[0]}" if len(wrong) else None
