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

from export.checkpoints.encodings.encoding import MIDDLE, EncodedRows, Encoding, Offsets, check_finite
from export.checkpoints.quantized.matrix import Float32, QuantizedMatrix
from export.checkpoints.quantized.module import Module
from export.checkpoints.source import Array
from runtime.errors import UserError

INT4_BITS = 4
MIDDLE_OF_INT8 = 128  # between numbers without and with a sign
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
    """A matrix that an `AffineStorage` holds, to be carried as it is."""

    scale_name: str  # for errors
    storage: AffineStorage
    encoding: Encoding
    bits: int
    order: Order | None = None

    def read(self, rows: slice) -> EncodedRows:
        """Some rows; raises `UserError` for a scale that is NaN or infinite."""
        stored = self.storage.numbers(rows)
        if self.order is not None:
            stored = stored[:, self.order]
        scales = self.storage.scales(rows).astype(self.encoding.scales)
        found = EncodedRows(self._shifted(stored), scales, self._offsets(rows, scales), self.order)
        check_finite(found, self.scale_name, rows.start or 0)
        return found

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def _shifted(self, stored: NDArray[np.uint8]) -> Array:
        if self.encoding.numbers == "int8":
            return (stored.astype(np.int16) - MIDDLE_OF_INT8).astype(np.int8)
        # Without offsets, the zero point of an int4 is its middle.
        return stored + np.uint8(MIDDLE - self._middle) if self.encoding.offsets == "none" else stored

    def _offsets(self, rows: slice, scales: Array) -> Array | None:
        if self.encoding.offsets == "none":
            return None
        zero_points = self.storage.zero_points(rows) - (MIDDLE_OF_INT8 if self.encoding.numbers == "int8" else 0)
        if self.encoding.offsets == "minimums":
            return scales * -zero_points.astype(np.float32)
        return zero_points.astype(np.int8 if self.encoding.numbers == "int8" else np.uint8)


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
            "int4" if bits <= INT4_BITS else "int8",
            None if by_rows else group_size,
            "float16" if dtype == "float16" and offsets != "minimums" else "float32",
            offsets,
            None if order is None else hashlib.sha256(order.tobytes()).hexdigest(),
        )
        encoded = AffineMatrix(module.of(scale), storage, encoding, bits, order)

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
    if zero_points.max() < (16 if bits <= INT4_BITS else 256):
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
